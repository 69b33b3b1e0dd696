"""A backbone for transformers: a config, and a model that ``AutoBackbone`` builds from it, for UperNet, Mask2Former,
DETR ...

::

    config = DiffusionBackboneConfig.from_backbone(create_model("sd15_gdf", pretrained=True), out_indices=[0, 1, 2])
    segmenter = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config))

``save_pretrained`` of the whole model writes weights and architecture, and ``from_pretrained`` needs no other file.
Importing this module registers both classes. Images must be in [-1, 1], as an image processor with :data:`PROCESSOR`
returns them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.fusion import TimmExtractor
from diffusion_backbones.backbone.fusion.saving import describe_whole
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory.entry_points import build_described
from diffusion_backbones.factory.fusions import described_fusion
from diffusion_backbones.integrations import missing
from diffusion_backbones.loading.saved_folder import SavedConfig

try:
    from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
    from transformers.modeling_outputs import BackboneOutput
except ImportError as error:
    raise missing("transformers 5.2 or newer", "transformers", error) from error

PROCESSOR = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
"""Keywords for any transformers image processor, so that images are in [-1, 1]. Most have ImageNet's by default."""

__all__ = ["PROCESSOR", "DiffusionBackboneConfig", "DiffusionBackboneModel"]


class Held:
    """The backbone that a config was made from. Copies of the config share it; its JSON and pickle leave it out."""

    def __init__(self, backbone: Backbone | None = None):
        self.backbone = backbone

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __reduce__(self) -> Any:
        return Held, ()


class DiffusionBackboneConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """The config of a backbone, made by :meth:`from_backbone` or read from a folder.

    Args:
        backbone: Name, checkpoint, recipe, strides and architecture, from
            :func:`diffusion_backbones.backbone.fusion.saving.describe_whole`.
        trainable: Whether the denoiser is trained.
        out_features, out_indices: The returned maps, fine to coarse, by name (``level0`` ...) or position; all by
            default.

    Raises:
        TypeError: ``backbone`` is missing.
    """

    model_type = "diffusion_backbone"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        trainable: bool = False,
        out_features: Sequence[str] | None = None,
        out_indices: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        if not isinstance(backbone, dict):
            raise TypeError(
                "make a DiffusionBackboneConfig by DiffusionBackboneConfig.from_backbone(create_model(...)), got "
                f"backbone={backbone!r}"
            )
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.backbone, self.trainable, self.num_channels, self.held = backbone, trainable, 3, Held()
        self.stage_names = [f"level{i}" for i in range(_maps(backbone))]
        features, indices = out_features and list(out_features), out_indices
        if indices is not None:
            indices = list(indices)
        if features is None and indices is None:
            features = self.stage_names
        self.set_output_features_output_indices(out_features=features, out_indices=indices)

    @classmethod
    def from_backbone(cls, backbone: Backbone, **kwargs: Any) -> DiffusionBackboneConfig:
        """The config of a backbone. Models built from it, or from a copy, hold this very backbone, with its weights.

        Args:
            backbone: From :func:`~diffusion_backbones.create_model`, with any of its keywords.
            **kwargs: ``out_indices`` or ``out_features``, as for the class.

        Raises:
            ValueError: The backbone trains adapters or a prompt.
        """
        if isinstance(backbone.trainable, str):
            raise ValueError(
                f"a config holds trainable=True or False, and this backbone has trainable={backbone.trainable!r}; save "
                "it, and load it with one of those"
            )
        config = cls(json.loads(json.dumps(describe_whole(backbone))), backbone.trainable, **kwargs)
        config.held = Held(backbone)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON holds it, without the backbone itself."""
        return {key: value for key, value in super().to_dict().items() if key != "held"}


class DiffusionBackboneModel(BackboneMixin, PreTrainedModel):  # type: ignore[misc]
    """A backbone with the interface of transformers.

    Built from :meth:`DiffusionBackboneConfig.from_backbone` it holds that backbone. Built from a config that was read
    from a folder it has random weights, until ``from_pretrained`` of this model or of the one around it loads them.
    """

    config_class, main_input_name, has_attentions = DiffusionBackboneConfig, "pixel_values", False
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    config: DiffusionBackboneConfig

    def __init__(self, config: DiffusionBackboneConfig):
        super().__init__(config)
        empty = torch.get_default_device().type == "meta"  # as from_pretrained builds
        held = None if empty else config.held.backbone
        self.diffusion_backbone = held or _build(config.backbone, config.trainable, empty)
        self.num_features = self.diffusion_backbone.feature_info.channels()
        if overflowing := [name for name, part in self._diffusion() if part.encoder_overflows]:
            self._keep_in_fp32_modules = {f"{name}.encoder" for name in overflowing}
        self._trained = {name for name, p in self.named_parameters() if p.requires_grad}
        self._uncomputed = sorted(set(dict(self.named_buffers())) - set(self.state_dict())) if empty else []
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **call: Any,
    ) -> Any:
        """Images -> the chosen maps.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            output_hidden_states: Whether to return every map too, as ``hidden_states``.
            return_dict: False returns a tuple.
            **call: Keywords of the backbone's ``forward``, such as ``prompt``.

        Returns:
            ``feature_maps``, (B, C_i, ceil(H / s_i), ceil(W / s_i)) each.
        """
        n = len(self.stage_names)
        chosen = [i % n for i in self.out_indices]
        maps = dict(
            zip(
                every := range(n) if output_hidden_states else chosen,
                self.diffusion_backbone(pixel_values, list(every), **call),
                strict=True,
            )
        )
        output = BackboneOutput(
            feature_maps=tuple(maps[i] for i in chosen),
            hidden_states=tuple(maps.values()) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's dtype; an image encoder that overflows in float16 has another."""
        return self.diffusion_backbone.dtype

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What ``gradient_checkpointing_enable()``, and so ``TrainingArguments(gradient_checkpointing=True)``, calls.

        Raises:
            ValueError: The backbone is compiled, or only some layers are to be checkpointed.
        """
        if every_n_layers != 1:
            raise ValueError(
                f"a backbone checkpoints every block of its denoiser, so every_n_layers must be 1, got {every_n_layers}"
            )
        self.diffusion_backbone.set_grad_checkpointing(enable)
        if enable:
            for _, part in self._diffusion():
                part.denoiser.enable_gradient_checkpointing(gradient_checkpointing_func)  # type: ignore[operator]

    def _diffusion(self) -> list[tuple[str, DiffusionBackbone]]:
        """The diffusion backbone by its name in this model; of a fusion all of them."""
        return [(name, part) for name, part in self.named_modules() if isinstance(part, DiffusionBackbone)]

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights as they are: nothing is drawn again."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:  # noqa: ARG002
        """Repair what the loader did; transformers calls it with the model itself once it is loaded.

        The loader unfreezes every parameter, leaves buffers that are in no file uninitialised, and returns views into a
        file, at addresses where the CPU's kernels may round differently.
        """
        if module is not self:
            return
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in self._trained)
        for name in self._uncomputed:
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner).register_buffer(leaf, self.get_buffer(name).to("meta"), persistent=False)
        for _, part in self._diffusion():
            part.architecture.fill_buffers(part.denoiser, self.device)
        for other in (part for part in self.modules() if isinstance(part, TimmExtractor)):
            other.fill_buffers()


def _maps(described: dict[str, Any]) -> int:
    """How many maps what is described returns."""
    if "fusion" in described:
        return len(described["out_strides"] or described["levels"])
    config = SavedConfig(described, "backbone_config")
    return len(config.out_strides or config.declaration.recipe.levels)


def _build(described: dict[str, Any], trainable: bool, empty: bool) -> Backbone:
    """What is described, with random weights, or ``empty`` of any; where those that come are from is then known."""

    def single(config: SavedConfig, trainable: bool) -> DiffusionBackbone:
        backbone = build_described(config, trainable)
        if empty:
            backbone.provenance = dict(config.provenance)
        return backbone

    return (
        described_fusion(described, single, trainable)
        if "fusion" in described
        else single(SavedConfig(described, "backbone_config"), trainable)
    )


AutoConfig.register(DiffusionBackboneConfig.model_type, DiffusionBackboneConfig)
AutoBackbone.register(DiffusionBackboneConfig, DiffusionBackboneModel)
