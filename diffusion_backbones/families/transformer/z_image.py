"""Z-Image: diffusers' ``ZImageTransformer2DModel`` behind a KL autoencoder, conditioned on a Qwen3 language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import DECODER
from diffusion_backbones.families.transformer.base import check_positions, round_up
from diffusion_backbones.families.transformer.nextdit import Layout, NextDiT, refined, rotated, text_mask
from diffusion_backbones.ops.execution_order import ExecutionOrder, Step, in_order
from diffusion_backbones.spec.activations import Port, Site
from diffusion_backbones.spec.concepts import Said
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor


PATCH = 2
FILLED = 32
"""What the lengths of image and text are filled up to a multiple of, with learned tokens that are attended to."""


def _network(network: Any) -> list[Step]:
    [size] = network.all_patch_size
    out = size**2 * network.out_channels
    return refined(network, "cap_embedder", network.dim, f"all_final_layer.{size}-1", out)


class ZImage(NextDiT):
    """The family of ``ZImageTransformer2DModel``. Image tokens come first, and no other token is among them."""

    networks = ("ZImageTransformer2DModel",)
    tokens = 512
    image = "first"
    supplied = {"siglip_feat_dim": (None,)}
    order = ExecutionOrder(
        steps={
            "ZImageTransformer2DModel": _network,
            "ZImageTransformerBlock": in_order(
                "attention", "attention_norm2", "ffn_norm1", "feed_forward", "ffn_norm2"
            ),
        }
    )

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Not for networks that also look at an image through SigLIP, which want more than latents and a text."""
        return super().matches(config) and not config.get("siglip_feat_dim")

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "dim": 24,
            "n_heads": 2,
            "n_kv_heads": 2,
            "axes_dims": [4, 4, 4],
            "cap_feat_dim": DECODER["hidden_size"],
        }
        configs["text_encoder"] |= DECODER

    @property
    def layout(self) -> Layout:
        config, channels = self.config, self.config["dim"]
        return Layout(
            refiners=config["n_refiner_layers"],
            layers=config["n_layers"],
            attention="attention",
            inner="w2",
            channels=channels,
            heads=config["n_heads"],
            kv_heads=config["n_heads"],
            inner_channels=int(channels / 3 * 8),
        )

    def image_token_slice(self, length: int, tokens: int, stride: int) -> Port | None:
        filled = round_up(tokens, FILLED)
        there = stride == self.size_divisibility and length in (filled, filled + self.tokens)
        return Port(tokens="first") if there else None

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
        """A ``cross-map`` also has the learned tokens that fill up a text, behind its own, and then zeros."""
        import torch
        import torch.nn.functional as F
        from torch.nn.utils.rnn import pad_sequence

        from diffusion_backbones.ops.attention_maps import probabilities  # torch

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
        layer = denoiser.get_submodule(site.path)
        norms = (layer.norm_q, layer.norm_k)
        q, k = (rotated(x, norm, rotary) for x, norm in zip(recorded, norms, strict=True))
        tokens, width = grid[0] * grid[1], conditioning["prompt_embeds"].shape[1]
        cross = site.id.endswith("cross-map")
        weights = probabilities(q[:, :, :tokens], k, slice(begin, None) if cross else slice(tokens), average, bias)
        return F.pad(weights, (0, width - weights.shape[-1])) if cross else weights

    def said(self, tokenizer: Any, prompt: str) -> Said:
        """As the turn of a user in a chat, which the tokenizer's template makes of a prompt."""
        turn = [{"role": "user", "content": prompt}]
        return Said(
            tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        )

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        said = [self.said(tokenizer, prompt).text for prompt in prompts]
        embeds, mask = language_model.penultimate(tokenizer, model, prompts, said, self.tokens)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _prompts(conditioning: Mapping[str, Tensor]) -> list[Tensor]:
    """The embeddings of every prompt without its padding, or on ``meta``, where nobody can tell padding, with it."""
    embeds, mask = conditioning["prompt_embeds"], text_mask(conditioning)
    return list(embeds) if mask.is_meta else [row[kept] for row, kept in zip(embeds, mask, strict=True)]
