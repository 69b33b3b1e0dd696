"""Lumina-Image 2: diffusers' ``Lumina2Transformer2DModel`` behind a KL autoencoder, conditioned on a Gemma language
model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import check_positions
from diffusion_backbones.families.transformer.nextdit import (
    TEXT_FIRST,
    Layout,
    NextDiT,
    behind_text,
    rotated,
    text_mask,
)
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn


class Lumina(NextDiT):
    """The family of ``Lumina2Transformer2DModel``."""

    networks = ("Lumina2Transformer2DModel",)
    tokens = 256
    image = TEXT_FIRST

    def layout(self, config: Config) -> Layout:
        channels, multiple = config["hidden_size"], config["multiple_of"]
        inner = (
            -(-int(4 * channels * (config.get("ffn_dim_multiplier") or 1)) // multiple) * multiple
        )  # as the layer rounds it
        heads, kv_heads = config["num_attention_heads"], config["num_kv_heads"]
        return Layout(
            config["num_refiner_layers"], config["num_layers"], "attn", "linear_2", channels, heads, kv_heads, inner
        )

    def build_denoiser(self, config: Config) -> nn.Module:
        import torch
        from diffusers import Lumina2Transformer2DModel

        transformer: Any = Lumina2Transformer2DModel.from_config(config)
        old = transformer.rope_embedder
        with torch.device("cpu"):  # its tables are plain tensors, which no file holds and no .to() moves off meta
            transformer.rope_embedder = type(old)(old.theta, old.axes_dim, old.axes_lens, old.patch_size)
        transformer.rope_embedder.register_forward_pre_hook(_with_a_mask_to_read)
        whole: nn.Module = transformer
        return whole

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        config = denoiser.config
        check_positions(z, min(config.axes_lens[1:]) * config.patch_size, size)
        output: Tensor = denoiser(
            z,
            timestep=1 - timestep.float() / 1000,  # 0 is noise and 1 the image
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=text_mask(conditioning),
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
        """A ``cross-map`` is zero where there is no text."""
        import torch
        import torch.nn.functional as F

        from diffusion_backbones.ops.attention_maps import probabilities

        mask, tokens, patch = text_mask(conditioning), grid[0] * grid[1], denoiser.config.patch_size
        (q, k), width = recorded, mask.shape[1]
        blank = q.new_zeros(len(mask), 1, patch * grid[0], patch * grid[1])
        _, of_text, of_image, *_ = denoiser.rope_embedder(blank, mask)
        attention = denoiser.get_submodule(site.path)
        keys, of_keys, bias = slice(None), of_image, None
        if not site.path.startswith("noise_refiner"):
            # text, at full length, and then the image: behind a short text stand image tokens, which the bias takes out
            q, k = (
                behind_text(q, mask, tokens),
                torch.cat((F.pad(k, (0, 0, 0, width - k.shape[1])), behind_text(k, mask, tokens)), dim=1),
            )
            of_keys = torch.cat((of_text, of_image), dim=1)
            there = torch.arange(width, device=q.device) < mask.sum(1, keepdim=True)
            bias = F.pad(there.to(q), (0, tokens), value=1).log()
            keys = slice(width) if site.id.endswith("cross-map") else slice(width, None)
        q, k = rotated(q, attention.norm_q, of_image), rotated(k, attention.norm_k, of_keys)
        return probabilities(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), keys, average, bias)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the instruction that diffusers' pipeline puts before a prompt; the empty prompt stands without it, as
        for guidance.
        """
        from diffusers import Lumina2Pipeline

        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        instruction = Lumina2Pipeline(
            transformer=None, scheduler=None, vae=None, text_encoder=None, tokenizer=None
        ).system_prompt
        said = [f"{instruction} <Prompt Start> {prompt}" if prompt else "" for prompt in prompts]
        embeds, mask = language_model.penultimate(tokenizer, model, prompts, said, self.tokens)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _with_a_mask_to_read(module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """On ``meta``, where nobody can say how long a prompt is, it has the full length."""
    import torch

    return (args[0], torch.ones(args[1].shape, dtype=torch.bool, device="cpu")) if args[1].is_meta else None
