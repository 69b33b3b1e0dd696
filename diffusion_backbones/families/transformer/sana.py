"""Sana: diffusers' ``SanaTransformer2DModel`` behind a deep-compression autoencoder, conditioned on a Gemma language
model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, width
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS = 300
"""Length that diffusers' pipeline cuts prompts to, the start token included."""


class Sana(Transformer):
    """The family of ``SanaTransformer2DModel``. Its self-attention is linear: no softmax, and weights that are none the
    less shares.
    """

    networks = ("SanaTransformer2DModel",)

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config, stride = configs["transformer"], self.size_divisibility(configs)
        return Catalogue(
            (
                site
                for i in range(config["num_layers"])
                for site in _block(f"transformer_blocks.{i}", i, config, stride)
            ),
            network,
        )

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["transformer"]
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (TOKENS, config["caption_channels"]),
            "prompt_attention_mask": (TOKENS,),
        }
        return shapes

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder",)

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        if config.get("guidance_embeds"):
            raise ValueError("a Sana that is told a guidance scale (Sana-Sprint) is not supported")
        transformer: nn.Module = SanaTransformer2DModel.from_config(config)
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        output: Tensor = denoiser(
            z,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=timestep * denoiser.config.timestep_scale,
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
        from diffusion_backbones.ops.attention_maps import linear_probabilities, probabilities, split_heads

        attention: Any = denoiser.get_submodule(site.path)
        norms = (attention.norm_q, attention.norm_k)  # over all heads at once, so before they are split
        q, k = (
            split_heads(attention, x if norm is None else norm(x), None)
            for x, norm in zip(recorded, norms, strict=True)
        )
        if site.path.endswith("attn1"):
            return linear_probabilities(q, k, average)
        bias = (1 - conditioning["prompt_attention_mask"].to(q)) * -10000.0
        return probabilities(q, k, slice(None), average, bias)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the instruction that diffusers' pipeline puts before a prompt; the empty prompt stands without it, as
        for guidance.
        """
        import torch
        from diffusers import SanaPipeline

        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        language_model.check_length(tokenizer, prompts, TOKENS)
        pipeline = SanaPipeline(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
        instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        rows = []
        for prompt in prompts:
            said = {
                "complex_human_instruction": instruction if prompt else None,
                "max_sequence_length": TOKENS,
                "device": torch.device("cpu"),
            }
            rows.append(pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, **said)[:2])
        return {
            "prompt_embeds": torch.cat([embeds for embeds, _ in rows]).float(),
            "prompt_attention_mask": torch.cat([mask for _, mask in rows]).float(),
        }


def _block(path: str, block: int, config: Config, stride: int) -> Iterator[Site]:
    name, channels, heads = f"vit-block{block}", width(config), config["num_attention_heads"]
    cross_heads = config["num_cross_attention_heads"]
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.attn1.to_{qkv}", "out", channels, stride, "tokens")
    yield Site(f"{name}-self-map", f"{path}.attn1", "map", heads, stride, "attention")
    yield Site(f"{name}-self-out", f"{path}.attn1", "out", channels, stride, "tokens")
    yield Site(
        f"{name}-cross-q",
        f"{path}.attn2.to_q",
        "out",
        cross_heads * config["cross_attention_head_dim"],
        stride,
        "tokens",
    )
    yield Site(f"{name}-cross-map", f"{path}.attn2", "map", cross_heads, stride, "attention")
    yield Site(f"{name}-cross-out", f"{path}.attn2", "out", channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.ff", "in", channels, stride, "map", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.ff.conv_point", "in", int(config["mlp_ratio"] * channels), stride, "map")
    yield Site(f"{name}-out", path, "out", channels, stride, "tokens")
