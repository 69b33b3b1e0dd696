"""Sana: diffusers' ``SanaTransformer2DModel`` behind a deep-compression autoencoder, conditioned on Gemma."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import WORDS
from diffusion_backbones.families.transformer.base import Transformer, projected, width
from diffusion_backbones.ops.execution_order import BYPASS, NONE, ExecutionOrder, Step
from diffusion_backbones.spec.activations import IN, MAP, OUT, Site
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 300
"""Length that diffusers' pipeline cuts prompts to, the start token included."""


class Sana(Transformer):
    """The family of ``SanaTransformer2DModel``.

    Its self-attention is linear: it has no softmax, and its weights still sum to one.
    """

    networks = ("SanaTransformer2DModel",)
    text_encoders = ("text_encoder",)
    words = ""
    supplied = {"guidance_embeds": (None, False)}  # True is Sana-Sprint
    order = ExecutionOrder(
        steps={
            "SanaTransformer2DModel": projected("transformer_blocks"),
            "SanaTransformerBlock": lambda block: [
                Step("attn1", NONE),
                Step("attn2", NONE),
                Step("norm2", BYPASS),
                Step("ff", BYPASS),
            ],
        }
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        widths = [8, 8, 16, 16, 32, 32]
        configs["vae"] |= {
            "encoder_block_out_channels": widths,
            "decoder_block_out_channels": widths,
            "attention_head_dim": 8,
        }
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 24,
        }
        configs["text_encoder"] |= {
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "vocab_size": WORDS["vocab_size"],
        }

    def sites(self) -> Iterator[Site]:
        for i in range(self.config["num_layers"]):
            yield from _block(f"transformer_blocks.{i}", i, self.config, self.size_divisibility)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.config["caption_channels"]), "prompt_attention_mask": (TOKENS,)}

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
        from diffusion_backbones.ops.attention_maps import linear_probabilities, probabilities, split_heads  # torch

        layer = denoiser.get_submodule(site.path)
        norms = (layer.norm_q, layer.norm_k)  # over all heads at once, so before they are split
        q, k = (
            split_heads(layer, x if norm is None else norm(x), None) for x, norm in zip(recorded, norms, strict=True)
        )
        if site.path.endswith("attn1"):
            return linear_probabilities(q, k, average)
        bias = (1 - conditioning["prompt_attention_mask"].to(q)) * -10000.0
        return probabilities(q, k, slice(None), average, bias)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the instruction that diffusers' pipeline puts before a prompt; the empty one, for guidance, has none."""
        import torch
        from diffusers import SanaPipeline

        from diffusion_backbones.families.text import language_model  # torch

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
    cross_heads, inner = config["num_cross_attention_heads"], int(config["mlp_ratio"] * channels)
    cross = cross_heads * config["cross_attention_head_dim"]
    for qkv in "qkv":
        yield Site(f"{name}-self-{qkv}", f"{path}.attn1.to_{qkv}", OUT, channels, stride, "tokens")
    yield Site(f"{name}-self-map", f"{path}.attn1", MAP, heads, stride, "attention")
    yield Site(f"{name}-self-out", f"{path}.attn1", OUT, channels, stride, "tokens")
    yield Site(f"{name}-cross-q", f"{path}.attn2.to_q", OUT, cross, stride, "tokens")
    yield Site(f"{name}-cross-map", f"{path}.attn2", MAP, cross_heads, stride, "attention")
    yield Site(f"{name}-cross-out", f"{path}.attn2", OUT, channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.ff", IN, channels, stride, "map", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.ff.conv_point", IN, inner, stride, "map")
    yield Site(f"{name}-out", path, OUT, channels, stride, "tokens")
