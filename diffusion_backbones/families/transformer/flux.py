"""FLUX.1: diffusers' ``FluxTransformer2DModel`` behind a KL autoencoder, conditioned on CLIP and T5."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward
from diffusion_backbones.families.tiny import CLIP, T5
from diffusion_backbones.families.transformer.base import projected, width
from diffusion_backbones.families.transformer.concept_outputs import ConceptOutputs
from diffusion_backbones.families.transformer.joint_attention import (
    BEHIND_TEXT,
    IN_BEHIND_TEXT,
    double_block,
    joint_block,
    joint_map,
    rotation,
    single_block,
)
from diffusion_backbones.ops.execution_order import BYPASS, NONE, ExecutionOrder, Step, stand_in
from diffusion_backbones.spec.activations import Site

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = 3.5
"""The guidance scale of guidance-distilled weights unless a call gives another; the default of diffusers' pipeline."""
TOKENS = {True: 512, False: 256}
"""Length of the T5 prompt, with guidance (dev) and without (schnell, which was distilled at 256)."""


def parallel_steps(block: Any) -> list[Step]:
    """The feed-forward layer runs beside attention, so what reads attention alone does without it."""
    return [
        Step("attn", NONE),
        Step("proj_mlp", stand_in(block.mlp_hidden_dim, dim=-1)),
        Step("act_mlp", BYPASS),
        Step("proj_out", stand_in(block.proj_out.out_features, dim=-1)),
    ]


class Flux(ConceptOutputs):
    """The family of ``FluxTransformer2DModel``. Patches are packed into channels before the network."""

    networks = ("FluxTransformer2DModel",)
    shifted = True
    text_encoders = ("text_encoder", "text_encoder_2")
    words = "text_encoder_2"
    wider = {32: "FLUX.1 Depth and Canny", 96: "FLUX.1 Fill"}
    order = ExecutionOrder(
        steps={
            "FluxTransformer2DModel": projected("transformer_blocks", "single_transformer_blocks"),
            "FluxTransformerBlock": joint_block,
            "FluxSingleTransformerBlock": parallel_steps,
            "FeedForward": feed_forward,
        },
        attention=("FluxAttention",),
        modulated=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        two_streams=("FluxTransformerBlock",),
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": T5["d_model"],
            "pooled_projection_dim": CLIP["projection_dim"],
        }
        configs["text_encoder"] |= CLIP
        configs["text_encoder_2"] |= T5

    @property
    def patch(self) -> int:
        return 2

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // self.patch**2

    def sites(self) -> Iterator[Site]:
        """Double blocks are numbered first, single blocks go on from there."""
        channels, heads = width(self.config), self.config["num_attention_heads"]
        doubles, singles = self.config["num_layers"], self.config["num_single_layers"]
        norms = [f"transformer_blocks.{i}.norm1.linear" for i in range(doubles)]
        norms += [f"single_transformer_blocks.{i}.norm.linear" for i in range(singles)]
        for i, norm in enumerate([*norms[1:], ""]):
            block = (i, channels, heads, self.size_divisibility, norm)
            if i < doubles:
                yield from double_block(f"transformer_blocks.{i}", *block)
            else:
                yield from parallel_block(f"single_transformer_blocks.{i - doubles}", *block)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = TOKENS[bool(self.config.get("guidance_embeds"))]
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (tokens, self.config["joint_attention_dim"]),
            "pooled_prompt_embeds": (self.config["pooled_projection_dim"],),
        }
        return shapes | ({"guidance": ()} if self.config.get("guidance_embeds") else {})

    def blank_conditioning(self) -> dict[str, Tensor]:
        return super().blank_conditioning() | self._guidance(1)

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        output: Tensor = denoiser(
            packed(z),
            encoder_hidden_states=text,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            timestep=timestep.to(z) / 1000,
            img_ids=positions(z, z.shape[-2] // 2, z.shape[-1] // 2),
            txt_ids=z.new_zeros(text.shape[1], 3),
            guidance=conditioning.get("guidance"),
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
        import torch

        q, words = recorded[0], conditioning["prompt_embeds"].shape[1]
        rotate = rotation(denoiser.pos_embed(torch.cat([q.new_zeros(words, 3), positions(q, *grid)])))
        return joint_map(denoiser.get_submodule(site.path), site, recorded, grid[0] * grid[1], True, rotate, average)

    @property
    def concept_layers(self) -> Sequence[str]:
        """The last four double blocks, 15 to 18, as ConceptAttention reads them."""
        return [f"vit-block{i}-attn-out" for i in range(self.text_blocks)][-4:]

    def rotate_image(self, denoiser: Any, like: Tensor, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return rotation(denoiser.pos_embed(positions(like, *grid)))

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import clip, language_model  # torch

        language_model.check_padding(padding)
        pooled = clip.pooled(*load("text_encoder"), prompts)
        embeds, _ = language_model.encode(*load("text_encoder_2"), prompts, self.text_tokens, masked=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled} | self._guidance(len(prompts))

    def _guidance(self, rows: int) -> dict[str, Tensor]:
        import torch

        return {"guidance": torch.full((rows,), GUIDANCE)} if self.config.get("guidance_embeds") else {}


def parallel_block(path: str, block: int, channels: int, heads: int, stride: int, modulation: str) -> Iterator[Site]:
    """Activations of a block in which the feed-forward layer runs beside attention, on the same normalized stream.

    GDF has no ids in that layer.
    """
    *before, out = single_block(path, block, channels, heads, stride, modulation)
    beside: Any = {"stride": stride, "layout": "tokens", "extension": True}
    yield from before
    yield Site(f"vit-block{block}-norm-out", f"{path}.proj_mlp", IN_BEHIND_TEXT, channels, **beside)
    yield Site(f"vit-block{block}-ffn-inner", f"{path}.act_mlp", BEHIND_TEXT, 4 * channels, **beside)
    yield out


def packed(z: Tensor) -> Tensor:
    """(B, C, h, w) latents -> (B, h · w / 4, 4 · C) tokens, one for 2 x 2 positions."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def positions(like: Tensor, height: int, width: int) -> Tensor:
    """(height · width, 3) of (0, row, column), as the network's rotary positions take them."""
    import torch

    rows, columns = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (height, width))
    places = (torch.zeros(height, width).to(like), rows[:, None].expand(height, width), columns.expand(height, width))
    return torch.stack(places, -1).flatten(0, 1)
