"""PixArt: diffusers' ``PixArtTransformer2DModel`` behind a KL autoencoder, conditioned on T5 (alpha and Sigma)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, accepted, single_stream
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Length that diffusers' pipelines pad prompts to; the tokenizer's own limit is another."""


class PixArt(Transformer):
    """The family of ``PixArtTransformer2DModel``."""

    networks = ("PixArtTransformer2DModel",)
    reads_pipeline = True

    def recognises(self, config: Config) -> bool:
        """Also by the more general class that older files name."""
        return super().recognises(config) or (config.get("_class_name"), config.get("norm_type")) == (
            "Transformer2DModel",
            "ada_norm_single",
        )

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config, stride = configs["transformer"], self.size_divisibility(configs)
        blocks = range(config["num_layers"])
        return Catalogue(
            (site for i in blocks for site in single_stream(f"transformer_blocks.{i}", i, config, stride, cross=True)),
            network,
        )

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        tokens = TOKENS.get(configs.get("model_index", {}).get("_class_name", ""), max(TOKENS.values()))
        return {
            "prompt_embeds": (tokens, configs["transformer"]["caption_channels"]),
            "prompt_attention_mask": (tokens,),
        }

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder",)

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import PixArtTransformer2DModel

        transformer: nn.Module = PixArtTransformer2DModel(**accepted(PixArtTransformer2DModel, config))
        return transformer

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
        from diffusion_backbones.ops.attention_maps import attention_map

        q, k = recorded
        padded = site.path.endswith("attn2")  # padding is masked in the text alone
        bias = (1 - conditioning["prompt_attention_mask"].to(q)) * -10000.0 if padded else None
        return attention_map(denoiser.get_submodule(site.path), q, k, average, bias)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model

        tokens = self.conditioning_shapes(configs)["prompt_embeds"][0]
        language_model.check_padding(padding)
        embeds, mask = language_model.encode(
            *load("text_encoder"), [prompt.lower().strip() for prompt in prompts], tokens
        )  # as its pipelines do
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
