"""Z-Image: diffusers' ``ZImageTransformer2DModel`` behind a KL autoencoder, conditioned on a Qwen3 language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import check_positions
from diffusion_backbones.families.transformer.nextdit import IMAGE_FIRST, Layout, NextDiT, rotated, text_mask
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

PATCH = 2
FILLED = 32
"""What the lengths of image and text are filled up to a multiple of, with learned tokens that are attended to."""


class ZImage(NextDiT):
    """The family of ``ZImageTransformer2DModel``. Image tokens come first, and no other token is among them."""

    networks = ("ZImageTransformer2DModel",)
    tokens = 512
    image = IMAGE_FIRST

    def recognises(self, config: Config) -> bool:
        """Networks that also look at an image through SigLIP want more than latents and a text, and are not of this
        family.
        """
        return super().recognises(config) and not config.get("siglip_feat_dim")

    def layout(self, config: Config) -> Layout:
        channels, heads = config["dim"], config["n_heads"]
        return Layout(
            config["n_refiner_layers"],
            config["n_layers"],
            "attention",
            "w2",
            channels,
            heads,
            heads,
            int(channels / 3 * 8),
        )

    def image_rows(self, configs: Configs, length: int, tokens: int, stride: int) -> str | None:
        filled = -(-tokens // FILLED) * FILLED
        return (
            IMAGE_FIRST
            if stride == self.size_divisibility(configs) and length in (filled, filled + self.tokens)
            else None
        )

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import ZImageTransformer2DModel

        transformer: nn.Module = ZImageTransformer2DModel.from_config(config)
        return transformer

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        import torch

        check_positions(z, min(denoiser.axes_lens[1:]) * PATCH, size)
        time = 1 - timestep.float() / 1000  # 0 is noise and 1 the image
        return torch.stack(
            denoiser(list(z[:, :, None]), time, _prompts(conditioning), patch_size=PATCH, return_dict=False)[0]
        )

    def attention(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        """A ``cross-map`` also has the learned tokens that a text is filled up with, behind its own; behind those it is
        zero.
        """
        import torch
        import torch.nn.functional as F
        from torch.nn.utils.rnn import pad_sequence

        from diffusion_backbones.ops.attention_maps import probabilities

        prompts, q = _prompts(conditioning), recorded[0]
        blank = q.new_zeros(1, 1, PATCH * grid[0], PATCH * grid[1])
        _, filled, _, rows, text, _, _ = denoiser.patchify_and_embed([blank] * len(prompts), prompts, PATCH, 1)
        begin = len(rows[0])
        if not site.path.startswith("noise_refiner"):  # of a text there are more places than tokens
            rows = [
                torch.cat((row, places[: len(words)])) for row, places, words in zip(rows, text, filled, strict=True)
            ]
        rotary = pad_sequence([denoiser.rope_embedder(row) for row in rows], batch_first=True)
        bias = pad_sequence([q.new_zeros(len(row)) for row in rows], batch_first=True, padding_value=float("-inf"))
        attention = denoiser.get_submodule(site.path)
        q, k = (
            rotated(x, norm, rotary) for x, norm in zip(recorded, (attention.norm_q, attention.norm_k), strict=True)
        )
        tokens, width = grid[0] * grid[1], conditioning["prompt_embeds"].shape[1]
        cross = site.id.endswith("cross-map")
        weights = probabilities(q[:, :, :tokens], k, slice(begin, None) if cross else slice(tokens), average, bias)
        return F.pad(weights, (0, width - weights.shape[-1])) if cross else weights

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """As the turn of a user in a chat, which the tokenizer's template makes of a prompt."""
        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        said = [
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
            for turn in turns
        ]
        embeds, mask = language_model.penultimate(tokenizer, model, prompts, said, self.tokens)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _prompts(conditioning: Mapping[str, Tensor]) -> list[Tensor]:
    """The embeddings of every prompt without its padding; on ``meta``, where nobody can say what is padding, with it."""
    embeds, mask = conditioning["prompt_embeds"], text_mask(conditioning)
    return list(embeds) if mask.is_meta else [row[kept] for row, kept in zip(embeds, mask, strict=True)]
