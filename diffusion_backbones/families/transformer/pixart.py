"""PixArt: diffusers' ``PixArtTransformer2DModel`` behind a KL autoencoder, conditioned on T5 (alpha and Sigma)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward, transformer_block
from diffusion_backbones.families.tiny import T5
from diffusion_backbones.families.transformer.base import Transformer, projected, single_stream
from diffusion_backbones.ops.execution_order import ExecutionOrder
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.concepts import Said
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor


TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Length that diffusers' pipelines pad prompts to; the tokenizer's own limit is another."""


class PixArt(Transformer):
    """The family of ``PixArtTransformer2DModel``."""

    networks = ("PixArtTransformer2DModel",)
    needs_model_index = True
    text_encoders = ("text_encoder",)
    finest_aggregated = 8
    supplied = {"attention_type": (None, "default")}
    order = ExecutionOrder(
        steps={
            "PixArtTransformer2DModel": projected("transformer_blocks"),
            "BasicTransformerBlock": transformer_block,
            "FeedForward": feed_forward,
        }
    )

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Also by the more general class that older files name."""
        older = (config.get("_class_name"), config.get("norm_type")) == ("Transformer2DModel", "ada_norm_single")
        return super().matches(config) or older

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "cross_attention_dim": 48,
            "caption_channels": T5["d_model"],
        }
        configs["text_encoder"] |= T5

    def sites(self) -> Iterator[Site]:
        for i in range(self.config["num_layers"]):
            yield from single_stream(f"transformer_blocks.{i}", i, self.config, self.size_divisibility, cross=True)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = TOKENS.get(self.configs.get("model_index", {}).get("_class_name", ""), max(TOKENS.values()))
        return {"prompt_embeds": (tokens, self.config["caption_channels"]), "prompt_attention_mask": (tokens,)}

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if denoiser.use_additional_conditions:
            added = {
                "resolution": z.new_tensor([size]).expand(z.shape[0], 2),
                "aspect_ratio": z.new_full((z.shape[0], 1), size[0] / size[1]),
            }
        output: Tensor = denoiser(
            z,
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timestep,
            added_cond_kwargs=added,
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            return_dict=False,
        )[0]
        return output

    def attention(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        from diffusion_backbones.ops.attention_maps import attention_map  # torch

        q, k = recorded
        padded = site.path.endswith("attn2")  # padding is masked in the text alone
        bias = (1 - conditioning["prompt_attention_mask"].to(q)) * -10000.0 if padded else None
        return attention_map(denoiser.get_submodule(site.path), q, k, average, bias)

    def said(self, tokenizer: Any, prompt: str) -> Said:
        """In lower case, as its pipelines do."""
        return Said(prompt.lower())

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """In lower case, as its pipelines do."""
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        prompts = [prompt.lower().strip() for prompt in prompts]
        embeds, mask = language_model.encode(*load("text_encoder"), prompts, self.text_tokens)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
