"""From a plan to a backbone, a step each: empty networks, fill, fold, quantize, wrap, compile."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone import fitting
from diffusion_backbones.backbone.conditioning import embedded
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.backbone.state import Conditioning
from diffusion_backbones.factory.locate import Resolved
from diffusion_backbones.factory.options import BuildOptions
from diffusion_backbones.loading.completed import Completed
from diffusion_backbones.loading.prompts import Prompter, misfit
from diffusion_backbones.ops import quantization, safetensors_io
from diffusion_backbones.ops.noise import CANVAS, UnknownProcess, canvas
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import SYMMETRIC
from diffusion_backbones.surgery import compilation, constant_folding, trainable
from diffusion_backbones.surgery.introspection import called, unreached
from diffusion_backbones.surgery.memory_budget import check_budget, check_canvas
from diffusion_backbones.surgery.plan import Plan


def plan_for(declaration: Declaration, configs: Configs, options: BuildOptions) -> Plan:
    """The plan of a declaration under the options of a build.

    Raises:
        KeyError: The network lacks an activation.
        ValueError: Levels that cannot be, or options that the recipe does not allow.
    """
    plan = Plan.of(declaration, configs, options.truncate).select(options.out_indices)
    if options.encoder_levels:
        if not options.out_strides:
            raise ValueError(
                "encoder_levels=True fills strides that the recipe lacks, so it needs out_strides=, such as (4, 8, 16, "
                "32)"
            )
        plan = plan.with_encoder_levels(options.out_strides)
    plan.check_postprocessing()
    return plan


class Builder:
    """Builds one backbone.

    Args:
        plan: What is read of which network.
        resolved: Where the weights are, if there are any.
        options: Of the build.
        folded: How the network was folded that is restored, path -> description; empty for one that was not.
    """

    denoiser: nn.Module
    encoder: nn.Module
    conditioning: dict[str, Tensor]

    def __init__(self, plan: Plan, resolved: Resolved, options: BuildOptions, folded: Mapping[str, Any]):
        device, dtype = options.device, options.dtype
        self.plan, self.resolved, self.options, self.folded = plan, resolved, options, folded
        self.name, self.network, self.recipe = plan.declaration.name, plan.architecture, plan.declaration.recipe
        self.fills = resolved.has_weights and device.type != "meta"
        self.folds = options.fold and not folded
        self.home = torch.device("cpu") if self.folds and self.fills else device  # device never holds what is dropped
        self.encoder_dtype = torch.float32 if dtype == torch.float16 and plan.encoder_overflows else dtype

    @cached_property
    def prompter(self) -> Prompter:
        """Embeds the recipe's prompt now, and those of calls later."""
        return Prompter(self.network, self.resolved.source, self.recipe.prompt_padding)

    def build(self) -> DiffusionBackbone:
        """All steps, one after another."""
        self.check()
        self.empty()
        self.fill()
        self.fold()
        self.quantize()
        backbone = self.wrap()
        if self.fills:
            fitting.find(backbone)
        if self.options.compile:
            compilation.compile_in_place(backbone, self.options.compile)
        return backbone

    def check(self) -> None:
        """Check that this network can be built as asked, before anything is read.

        Raises:
            FileNotFoundError: A part of the checkpoint is nowhere.
            MemoryError: The fixed noise of the recipe's ensemble does not fit.
            TypeError: Folding goes with nothing that is trained.
            ValueError: There is nothing to fold, or no prompt to train; or the noise level of a timestep is not known,
                or an inversion does not come by it.
        """
        options, process = self.options, self.network.forward_process
        if self.fills and isinstance(self.resolved.source, Completed):
            self.resolved.source.check()
        if isinstance(process, UnknownProcess) and self.recipe.noise != "none":
            raise ValueError(f"{self.resolved.source or self.name}: {process.reason}")
        if self.plan.inversion:
            self.plan.inversion.passed(self.recipe.all_timesteps)
            if options.trainable:
                raise TypeError(
                    f"{self.name}: trainable={options.trainable!r} trains one pass of the network, and "
                    "noise='inversion' runs it many times without a gradient; train with noise='fixed'"
                )
        constant_folding.check_fold(options.fold, self.folded, options.trainable, options.device, self.name)
        if self.recipe.noise == "fixed":
            size = self.recipe.ensemble * self.network.latent_channels * CANVAS**2 * torch.float32.itemsize
            check_canvas(size, self.recipe.ensemble, options.device, self.name)
        if options.trainable == "prompt":
            trainable.check_prompt(self.plan, options.prompt_tokens)

    def empty(self) -> None:
        """The stock networks, truncated: on ``meta`` where weights will be read, otherwise with PyTorch's
        initialization.
        """
        without_values = self.fills or self.options.device.type == "meta"
        with safetensors_io.unfilled() if without_values else self.options.device:
            denoiser = self.network.build_denoiser()
            encoder = self.network.image_encoder.build()
            constant_folding.restore(denoiser, self.folded)
        self.whole = {"denoiser": safetensors_io.shapes(denoiser), "encoder": safetensors_io.shapes(encoder)}
        self.denoiser = self.plan.cut(denoiser)
        self.encoder = self.network.image_encoder.truncate(encoder)
        self.quantized = self._quantized_names()
        if self.fills:
            self._check_budget(self.home, self.quantized if not self.folds else frozenset())
        else:
            nn.Module.to(self.denoiser, self.options.dtype)  # diffusers' own .to warns about layers of other networks
            nn.Module.to(self.encoder, self.encoder_dtype)

    def fill(self) -> None:
        """Read the weights, and embed the recipe's prompt; without weights the prompt is blank."""
        if not self.fills:
            embeddings = self.network.blank_conditioning()
        elif self.resolved.restored:
            embeddings = self._fill_from_saved()
        else:
            embeddings = self._fill_from_source()
        if self.options.prompt_tokens:
            embeddings = trainable.first_tokens(embeddings, self.options.prompt_tokens)
        device, dtype = self.options.device, self.options.dtype
        self.conditioning = {
            name: embeddings[name].to(device, dtype if embeddings[name].is_floating_point() else None)
            for name in self.network.conditioning_shapes
        }
        if self.fills:
            self.network.fill_buffers(self.denoiser, self.home)

    def fold(self) -> None:
        """Keep values in place of what does not depend on the image."""
        if not self.folds:
            return
        sites = [*self.plan.catalogue_sites, *self.plan.sites]
        constant_folding.fold(self.denoiser, self.network, self.conditioning, self.plan.received, sites)
        self.quantized &= set(self.denoiser.state_dict())

    def quantize(self) -> None:
        """Keep weights in eight bits that were not read so: random ones, and those that values were folded from."""
        if self.folds or not self.fills:
            quantization.quantize_(self.denoiser, self.quantized)
        if self.folds:
            self._check_budget(self.options.device, self.quantized)
            nn.Module.to(self.denoiser, self.options.device)
            nn.Module.to(self.encoder, self.options.device)

    def wrap(self) -> DiffusionBackbone:
        """The networks as a backbone: adapters first, then the hooks, which then see what adapters add."""
        plan, options = self.plan, self.options
        skipped = unreached(plan) if options.trainable else set()
        learned = trainable.learned(self.conditioning, skipped, self.name) if options.trainable == "prompt" else ()
        if options.trainable == "lora":
            trainable.add_lora(self.denoiser, options.lora_rank or trainable.RANK, skipped, self.name)
        fixed = self.recipe.noise == "fixed"
        restored = self.resolved.restored
        with options.device:
            backbone = DiffusionBackbone(
                plan,
                self.denoiser,
                self.encoder,
                Conditioning(self.conditioning, learned),
                canvas(self.recipe.seed, self.recipe.ensemble, self.network.latent_channels) if fixed else None,
                Recorder(self.denoiser, plan.denoiser_sites),
                Recorder(self.encoder, plan.encoder_sites),
                self.prompter,
                out_strides=options.out_strides or (restored.out_strides if restored else None),
                input_format=options.input_format or (restored.input_format if restored else SYMMETRIC),
                provenance=self.resolved.provenance,
                trainable=options.trainable,
                chunk=options.chunk,
                weight_dtype=options.weight_dtype,
            )
        if restored and self.fills:
            backbone.fitted.load_state_dict(restored.fits(backbone.fitted.state_dict()))
        trainable.unfreeze(backbone, options.trainable, skipped)
        return backbone.eval()

    def _fill_from_saved(self) -> dict[str, Tensor]:
        restored = self.resolved.restored
        assert restored is not None
        restored.load("denoiser", self.denoiser, self.whole["denoiser"], self.options.dtype, self.home, self._store)
        restored.load("encoder", self.encoder, self.whole["encoder"], self.encoder_dtype, self.home)
        embeddings = restored.embeddings()
        if wrong := misfit(self.network, {name: tensor.float() for name, tensor in embeddings.items()}):
            raise ValueError(f"{self.name}: the saved prompt does not belong to the network: {wrong}")
        return embeddings

    def _fill_from_source(self) -> dict[str, Tensor]:
        source, network = self.resolved.source, self.network
        assert source is not None
        embeddings = embedded(self.prompter, self.recipe)  # first, so that the text encoder is gone before weights come
        self._load(network.denoiser, "denoiser", self.denoiser, self.options.dtype, self._store)
        if network.encoder:
            self._load(network.encoder, "encoder", self.encoder, self.encoder_dtype, safetensors_io.as_read)
        return embeddings

    def _load(
        self, component: str, part: str, module: nn.Module, dtype: torch.dtype, store: safetensors_io.Store
    ) -> None:
        assert self.resolved.source is not None
        files = self.resolved.source.tensors(component, half=dtype in (torch.float16, torch.bfloat16))
        what = f"{self.plan.declaration.checkpoint.name} {component}"
        safetensors_io.load(module, files, self.whole[part], dtype, self.home, what, store)

    def _store(self, name: str, tensor: Tensor) -> Tensor:
        """A weight of the denoiser as it is kept; values are folded from whole ones."""
        return quantization.int8(tensor) if name in self.quantized and not self.folds else tensor

    def _quantized_names(self) -> frozenset[str]:
        if not self.options.weight_dtype:
            return frozenset()
        return quantization.quantized_names(self.denoiser, called(self.plan))

    def _check_budget(self, device: torch.device, quantized: frozenset[str]) -> None:
        parts = [(self.denoiser, self.options.dtype), (self.encoder, self.encoder_dtype)]
        check_budget(parts, device, self.name, quantized)
