"""Where modules were before they moved into rooms: their old paths stay importable for one release, with a warning.

Pickles and ``torch.save`` name classes by module, so files that were written before the move find theirs here.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "diffusion_backbones"
MOVED = {
    "activations": ("spec.activations",),
    "attention": ("ops.attention_maps",),
    "bench": ("evaluation.benchmark", "evaluation.benchmark_table"),
    "calls": (
        "backbone.call_arguments",
        "ops.noise",
        "ops.describe",
        "spec.levels",
        "spec.validation",
        "families.base",
    ),
    "capture": ("ops.recording",),
    "cards": ("reports.backbone_card", "reports.facts", "reports.markdown", "reports.measurements", "spec.schedule"),
    "checkpoint_cards": ("reports.checkpoint_card", "reports.facts"),
    "chunks": ("ops.micro_batching",),
    "compare": ("evaluation.deviation",),
    "compiling": ("surgery.compilation",),
    "conditioning": ("loading.prompts",),
    "costs": ("reports.costs",),
    "exporting": ("factory.export",),
    "exporting_cli": ("cli.export",),
    "extraction.overlap": ("extraction.prefetch",),
    "families.auraflow": ("families.transformer.auraflow",),
    "families.clip": ("families.text.clip",),
    "families.deepfloyd": ("families.unet.deepfloyd",),
    "families.dit": ("families.transformer.dit",),
    "families.encoders": ("families.image_encoders",),
    "families.flux": ("families.transformer.flux",),
    "families.flux2": ("families.transformer.flux2",),
    "families.hunyuan": ("families.transformer.hunyuan",),
    "families.joint": ("families.transformer.joint_attention",),
    "families.language": ("families.text.language_model",),
    "families.lumina": ("families.transformer.lumina",),
    "families.nextdit": ("families.transformer.nextdit",),
    "families.pixart": ("families.transformer.pixart",),
    "families.pixel": ("families.unet.pixel",),
    "families.qwen": ("families.transformer.qwen",),
    "families.sana": ("families.transformer.sana",),
    "families.sd3": ("families.transformer.sd3",),
    "families.transformer_steps": ("families.transformer.base",),
    "families.unet_steps": ("families.unet.execution_order",),
    "families.z_image": ("families.transformer.z_image",),
    "finetuning": ("surgery.trainable",),
    "folding": ("surgery.constant_folding",),
    "footprint": ("evaluation.memory_benchmark",),
    "hub": ("loading.hub",),
    "images": ("extraction.images",),
    "inputs": ("spec.input_format",),
    "interface": ("backbone.timm_mixin",),
    "ldm": ("loading.single_file", "loading.layouts"),
    "listing": ("reports.summary", "reports.facts"),
    "memory": ("surgery.memory_budget", "backbone.out_of_memory"),
    "noise": ("ops.noise",),
    "postops": ("ops.postprocessing",),
    "probe": ("surgery.introspection", "families.meta_trace"),
    "pyramid": ("ops.pyramid", "spec.levels"),
    "quantised": ("ops.quantization",),
    "recipe": ("spec.recipe", "spec.checkpoint", "spec.validation"),
    "registry": ("spec.registry", "spec.declaration", "spec.configs"),
    "saved": ("backbone.save_pretrained", "loading.saved_folder"),
    "scenes": ("evaluation.scenes",),
    "selection.cli": ("cli.select",),
    "selection.reach": ("selection.prefix_cost",),
    "sources": ("loading.source", "loading.weight_names"),
    "tensors": ("ops.safetensors_io", "ops.file_formats"),
    "tiny_encoder": ("factory.tiny_encoder",),
    "truncate": ("ops.truncation",),
    "version": ("_version",),
    "viz": ("evaluation.visualize", "evaluation.principal_components"),
}
"""Old module -> the modules that now hold its names. Removed with the next release."""


class OldPath(ModuleType):
    """Stands at an old path and gives the names that are elsewhere now; what is set on it is set there."""

    places: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        for place in self.places:
            module = import_module(f"{PACKAGE}.{place}")
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(
            f"module {self.__name__!r} has no attribute {name!r}; it moved to {', '.join(self.places)}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        for place in self.places:
            module = import_module(f"{PACKAGE}.{place}")
            if hasattr(module, name):
                setattr(module, name, value)
                return
        super().__setattr__(name, value)


class OldPaths(MetaPathFinder, Loader):
    """Finds old paths, after everything else that finds modules."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  (of the protocol, as is ``target``)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return OldPath(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        assert isinstance(module, OldPath)
        module.places = MOVED[module.__name__.partition(".")[2]]
        now = " and ".join(f"{PACKAGE}.{place}" for place in module.places)
        warnings.warn(
            f"{module.__name__} moved to {now}; the old path goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Make old paths importable."""
    if not any(isinstance(finder, OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(OldPaths())
