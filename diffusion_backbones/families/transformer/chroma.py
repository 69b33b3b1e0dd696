"""Chroma: diffusers' ``ChromaTransformer2DModel`` behind a KL autoencoder, conditioned on T5."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward
from diffusion_backbones.families.tiny import T5
from diffusion_backbones.families.transformer.base import Transformer, width
from diffusion_backbones.families.transformer.flux import packed, parallel_block, parallel_steps, positions
from diffusion_backbones.families.transformer.joint_attention import (
    BEHIND_TEXT,
    double_block,
    joint_block,
    joint_map,
    rotation,
)
from diffusion_backbones.ops.execution_order import BYPASS, PAIR, ExecutionOrder, Step, stand_in
from diffusion_backbones.spec.activations import Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TOKENS = 512
"""Length that diffusers' pipeline pads prompts to."""


def _network(network: Any) -> list[Step]:
    """Blocks are passed by and not removed: how many there are says where in one table a block finds its modulation."""
    return [
        *(Step(f"transformer_blocks.{i}", PAIR) for i in range(len(network.transformer_blocks))),
        *(Step(f"single_transformer_blocks.{i}", BYPASS) for i in range(len(network.single_transformer_blocks))),
        Step("norm_out", BYPASS),
        Step("proj_out", stand_in(network.proj_out.out_features, dim=-1)),
    ]


class Chroma(Transformer):
    """The family of ``ChromaTransformer2DModel``. Patches are packed into channels before the network.

    One small network computes the modulation of all blocks. Padding is masked, but for the first token of it.
    """

    networks = ("ChromaTransformer2DModel",)
    shifted = True
    text_encoders = ("text_encoder",)
    order = ExecutionOrder(
        steps={
            "ChromaTransformer2DModel": _network,
            "ChromaTransformerBlock": joint_block,
            "ChromaSingleTransformerBlock": parallel_steps,
            "FeedForward": feed_forward,
        },
        attention=("FluxAttention",),
        two_streams=("ChromaTransformerBlock",),
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": T5["d_model"],
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 24,
        }
        configs["text_encoder"] |= T5

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
        for i in range(doubles + singles):
            block = (i, channels, heads, self.size_divisibility, "")
            if i < doubles:
                yield from double_block(f"transformer_blocks.{i}", *block)
            else:
                *before, out = parallel_block(f"single_transformer_blocks.{i - doubles}", *block)
                yield from [*before, replace(out, port=BEHIND_TEXT)]

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.config["joint_attention_dim"]), "prompt_attention_mask": (TOKENS,)}

    def fill_buffers(self, denoiser: nn.Module, device: torch.device) -> None:
        """The numbers of the rows of modulation, embedded as timesteps are."""
        import torch
        from diffusers.models.embeddings import get_timestep_embedding

        embedding: Any = denoiser.time_text_embed
        if embedding.mod_proj.is_meta:
            rows, channels = embedding.mod_proj.shape
            numbers = 1000 * torch.arange(rows, device="cpu")  # large ones, whose sines differ between devices
            table = get_timestep_embedding(numbers, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
            embedding.mod_proj = table.to(device)

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        """See :meth:`Architecture.call`.

        Raises:
            ValueError: Single blocks shall be checkpointed, and diffusers' network then forgets their mask.
        """
        import torch
        import torch.nn.functional as F

        from diffusion_backbones.ops.truncation import has  # torch

        checkpointed = denoiser.gradient_checkpointing and torch.is_grad_enabled()
        if checkpointed and has(denoiser, "single_transformer_blocks.0"):
            raise ValueError(
                "with gradient checkpointing diffusers' Chroma does not mask the padding of the text in its single "
                "blocks, which gives other features; turn it off, or read double blocks alone"
            )
        tokens = packed(z)
        text, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"].bool()
        output: Tensor = denoiser(
            tokens,
            encoder_hidden_states=text,
            timestep=timestep.to(z) / 1000,
            img_ids=positions(z, z.shape[-2] // 2, z.shape[-1] // 2),
            txt_ids=z.new_zeros(text.shape[1], 3),
            attention_mask=F.pad(mask, (0, tokens.shape[1]), value=True),
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
        import torch.nn.functional as F

        q, mask, tokens = recorded[0], conditioning["prompt_attention_mask"].bool(), grid[0] * grid[1]
        rotate = rotation(denoiser.pos_embed(torch.cat([q.new_zeros(mask.shape[1], 3), positions(q, *grid)])))
        bias = F.pad(mask.to(q), (0, tokens), value=1).log()  # 0, and minus infinity for padding
        return joint_map(denoiser.get_submodule(site.path), site, recorded, tokens, True, rotate, average, bias=bias)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """Padding is masked in T5; the network then attends to the first token of it, as it was trained."""
        import torch.nn.functional as F

        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        embeds, mask = language_model.encode(*load("text_encoder"), prompts, TOKENS)
        return {"prompt_embeds": embeds, "prompt_attention_mask": F.pad(mask[:, :-1], (1, 0), value=1)}
