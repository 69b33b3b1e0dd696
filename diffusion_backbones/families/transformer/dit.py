"""Class-conditional diffusion transformers: diffusers' ``DiTTransformer2DModel`` behind a KL autoencoder (DiT-XL/2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward, transformer_block
from diffusion_backbones.families.transformer.base import Transformer, single_stream
from diffusion_backbones.ops.execution_order import BYPASS, ExecutionOrder, Step, numbered, one_token, stand_in
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor


def _network(network: Any) -> list[Step]:
    modulation = stand_in(network.proj_out_1.out_features, dim=-1)
    out = one_token(network.proj_out_2.out_features, dim=-1)
    rest = [Step("norm_out", BYPASS), Step("proj_out_1", modulation), Step("proj_out_2", out)]
    return [*numbered(network, "transformer_blocks"), *rest]


class DiT(Transformer):
    """The family of ``DiTTransformer2DModel``. Without a class it is given the null class, the last one."""

    networks = ("DiTTransformer2DModel",)
    text_encoders = ()
    order = ExecutionOrder(
        steps={
            "DiTTransformer2DModel": _network,
            "BasicTransformerBlock": transformer_block,
            "FeedForward": feed_forward,
        }
    )

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Also by the more general class that older files name."""
        older = (config.get("_class_name"), config.get("norm_type")) == ("Transformer2DModel", "ada_norm_zero")
        return super().matches(config) or older

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {"num_attention_heads": 2, "attention_head_dim": 8}

    def sites(self) -> Iterator[Site]:
        blocks = range(self.config["num_layers"])
        norms = [*(f"transformer_blocks.{i}.norm1.linear" for i in blocks[1:]), ""]
        for i in blocks:
            path = f"transformer_blocks.{i}"
            yield from single_stream(path, i, self.config, self.size_divisibility, cross=False, modulation=norms[i])

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"class_labels": ()}

    def blank_conditioning(self) -> dict[str, Tensor]:
        return self._null_classes(1)

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        """See :meth:`Architecture.call`.

        Raises:
            ValueError: A class that the network does not have.
        """
        import torch

        labels, classes = conditioning["class_labels"], denoiser.config.num_embeds_ada_norm
        readable = not torch.compiler.is_compiling() and not labels.is_meta
        if readable and not bool(((labels >= 0) & (labels <= classes)).all()):
            raise ValueError(
                f"class_labels must be from 0 to {classes - 1}, or {classes} for no class; got {labels.tolist()}"
            )
        output: Tensor = denoiser(z, timestep=timestep, class_labels=labels, return_dict=False)[0]
        return output

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        for prompt in prompts:
            if prompt:
                raise ValueError(
                    f"prompt={prompt!r}: this network is conditioned on ImageNet classes and not on text; give "
                    "class_labels= instead"
                )
        return self._null_classes(len(prompts))

    def _null_classes(self, rows: int) -> dict[str, Tensor]:
        import torch

        return {"class_labels": torch.full((rows,), int(self.config.get("num_embeds_ada_norm", 1000)))}
