"""A backbone as transformers' own: a config, and a model that ``AutoBackbone`` builds from it, under UperNet,
Mask2Former, DETR ...

::

    config = DiffusionBackboneConfig.from_backbone(create_model("sd15_gdf", pretrained=True), out_indices=[0, 1, 2])
    segmenter = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config))

``save_pretrained`` of the whole model writes weights and architecture, and ``from_pretrained`` needs no other file.
Importing this module registers both classes. Images must be in [-1, 1], which is what an image processor gives with
:data:`PROCESSOR`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.factory.entry_points import build
from diffusion_backbones.factory.save_pretrained import Described, describe
from diffusion_backbones.integrations import missing

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
"""Keywords of any transformers image processor, after which an image is in [-1, 1]. Most have ImageNet's by default."""


class Held:
    """A backbone that a config was made from. Copies of the config share it; its JSON and its pickle leave it out."""

    def __init__(self, backbone: DiffusionBackbone | None = None):
        self.backbone = backbone

    def __deepcopy__(self, memo: Any) -> Held:
        return self

    def __reduce__(self) -> Any:
        return Held, ()


class DiffusionBackboneConfig(BackboneConfigMixin, PreTrainedConfig):  # type: ignore[misc]
    """What a backbone is. Made by :meth:`from_backbone`, or read from a folder.

    Args:
        backbone: Name, checkpoint, recipe, strides and architecture, as
            :func:`diffusion_backbones.factory.save_pretrained.describe` puts them.
        trainable: Whether the denoiser is trained.
        out_features, out_indices: Which maps, fine to coarse, by name (``level0`` ...) or position; by default all.
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
                "a DiffusionBackboneConfig is made by DiffusionBackboneConfig.from_backbone(create_model(...)), got "
                f"backbone={backbone!r}"
            )
        kwargs.pop("stage_names", None)
        super().__init__(**kwargs)
        self.backbone, self.trainable, self.num_channels, self.held = backbone, trainable, 3, Held()
        described = Described(backbone, "backbone_config")
        self.stage_names = [
            f"level{i}" for i in range(len(described.out_strides or described.declaration.recipe.levels))
        ]
        features, indices = (
            out_features and list(out_features),
            out_indices if out_indices is None else list(out_indices),
        )
        if features is None and indices is None:
            features = self.stage_names
        self.set_output_features_output_indices(out_features=features, out_indices=indices)

    @classmethod
    def from_backbone(cls, backbone: DiffusionBackbone, **kwargs: Any) -> DiffusionBackboneConfig:
        """The config of a backbone. Models that are built from it, or from a copy, hold this very backbone, with its
        weights.

        Args:
            backbone: From :func:`~diffusion_backbones.create_model`, with any of its keywords.
            **kwargs: As for the class: ``out_indices`` or ``out_features``.

        Raises:
            ValueError: Adapters or a prompt are trained.
        """
        if isinstance(backbone.trainable, str):
            said = f"a config says trainable=True or False, and this backbone is trainable={backbone.trainable!r}"
            raise ValueError(f"{said}; save it, and read it back as one of those")
        config = cls(json.loads(json.dumps(describe(backbone))), backbone.trainable, **kwargs)
        config.held = Held(backbone)
        return config

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().to_dict().items() if key != "held"}


class DiffusionBackboneModel(BackboneMixin, PreTrainedModel):  # type: ignore[misc]
    """A backbone behind transformers' names.

    Built from a config of :meth:`DiffusionBackboneConfig.from_backbone` it holds that backbone; from one that was read
    from a folder it has random weights, until ``from_pretrained`` of this model or of the one around it loads them.
    """

    config_class, main_input_name, has_attentions = DiffusionBackboneConfig, "pixel_values", False
    input_modalities = ("image",)
    config: DiffusionBackboneConfig

    def __init__(self, config: DiffusionBackboneConfig):
        super().__init__(config)
        empty = torch.get_default_device().type == "meta"  # as from_pretrained builds
        held = None if empty else config.held.backbone
        self.diffusion_backbone = held or build(Described(config.backbone, "backbone_config"), config.trainable)
        if empty:
            self.diffusion_backbone.provenance = dict(config.backbone["provenance"])
        self.num_features = self.diffusion_backbone.feature_info.channels()
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
            output_hidden_states: Also give every map, as ``hidden_states``.
            return_dict: False gives a tuple.
            **call: The backbone's keywords of one call, such as ``prompt``.

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
        """The denoiser's; an image encoder that overflows in float16 has another."""
        return next(p.dtype for p in self.diffusion_backbone.denoiser.parameters())

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing is drawn again."""

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Called with the model itself once it is loaded, to repair what the loader does: it unfreezes every parameter,
        leaves buffers that are in no file uninitialised, and gives views into a file, at addresses where the CPU's
        kernels may round differently.
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
        self.diffusion_backbone.family.fill_buffers(self.diffusion_backbone.denoiser, self.device)


AutoConfig.register(DiffusionBackboneConfig.model_type, DiffusionBackboneConfig)
AutoBackbone.register(DiffusionBackboneConfig, DiffusionBackboneModel)
