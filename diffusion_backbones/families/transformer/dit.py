"""Class-conditional diffusion transformers: diffusers' ``DiTTransformer2DModel`` behind a KL autoencoder (DiT-XL/2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, accepted, single_stream
from diffusion_backbones.spec.activations import Catalogue
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn


class DiT(Transformer):
    """The family of ``DiTTransformer2DModel``. Without a class it is given the null class, the last one."""

    networks = ("DiTTransformer2DModel",)

    def recognises(self, config: Config) -> bool:
        """Also by the more general class that older files name."""
        return super().recognises(config) or (config.get("_class_name"), config.get("norm_type")) == (
            "Transformer2DModel",
            "ada_norm_zero",
        )

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config, stride = configs["transformer"], self.size_divisibility(configs)
        blocks = range(config["num_layers"])
        norms = [f"transformer_blocks.{i}.norm1.linear" for i in blocks[1:]] + [""]
        return Catalogue(
            (s for i in blocks for s in single_stream(f"transformer_blocks.{i}", i, config, stride, False, norms[i])),
            network,
        )

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {"class_labels": ()}

    def blank_conditioning(self, configs: Configs) -> dict[str, Tensor]:
        import torch

        return {"class_labels": torch.full((1,), _null_class(configs))}

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ()

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import DiTTransformer2DModel

        transformer: nn.Module = DiTTransformer2DModel(**accepted(DiTTransformer2DModel, config))
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        """See :meth:`Family.call`.

        Raises:
            ValueError: A class that the network does not have.
        """
        import torch

        labels, classes = conditioning["class_labels"], denoiser.config.num_embeds_ada_norm
        if (
            not torch.compiler.is_compiling()
            and not labels.is_meta
            and not bool(((labels >= 0) & (labels <= classes)).all())
        ):
            raise ValueError(
                f"class_labels must be from 0 to {classes - 1}, or {classes} for no class; got {labels.tolist()}"
            )
        output: Tensor = denoiser(z, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        import torch

        for prompt in prompts:
            if prompt:
                raise ValueError(
                    f"prompt={prompt!r}: this network is conditioned on ImageNet classes and not on text; give "
                    "class_labels= instead"
                )
        return {"class_labels": torch.full((len(prompts),), _null_class(configs))}


def _null_class(configs: Configs) -> int:
    return int(configs["transformer"].get("num_embeds_ada_norm", 1000))
