"""Concepts by the outputs of attention: ConceptAttention (https://arxiv.org/abs/2502.04320) beside a stock network.

Concepts are tokens that attend to the image and to each other, by the weights that a block has for text; neither text
nor image attends to them. So nothing in the network changes: they are computed afterwards, from the keys and values of
the image that the blocks themselves used. A concept is where the image's outputs of attention are like its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.transformer.base import Transformer
from diffusion_backbones.spec.activations import IN, OUT, OUTPUTS, Site

if TYPE_CHECKING:
    from torch import Tensor

CONCEPTS = "concept_embeds"
"""Name, among what conditions a call, of the embedded tokens of concepts, (B, tokens, channels)."""


class ConceptOutputs(Transformer):
    """Transformers with blocks that project text and image apart, and modulate both by one embedding."""

    @property
    def text_blocks(self) -> int:
        """How many blocks have a text behind them: the first so many."""
        return int(self.config["num_layers"])

    @property
    def concept_layers(self) -> Sequence[str]:
        """The ids of attention outputs that concepts are compared with by default; none where no source says it."""
        return ()

    def concept_outputs(self, layers: Sequence[str], rows: tuple[tuple[int, ...], ...]) -> Site:
        """The site of the similarities of concepts, (B, concepts, h, w).

        Args:
            layers: Ids of attention outputs, ``vit-block15-attn-out``.
            rows: The tokens of each concept.

        Raises:
            KeyError, ValueError: A layer is no such id.
        """
        paths = [self.catalogue[layer].path for layer in layers]
        known = {f"transformer_blocks.{i}.attn.to_out.0": i for i in range(self.text_blocks)}
        if other := next((layer for layer, path in zip(layers, paths, strict=True) if path not in known), None):
            raise ValueError(
                f"layers={other!r} is no output of attention that concepts have too; name some of vit-block0-attn-out "
                f"to vit-block{self.text_blocks - 1}-attn-out"
            )
        parts = [Site("time", "time_text_embed", OUT, 0, self.size_divisibility, "vector")]
        for i in range(max(known[path] for path in paths) + 1):
            out = f"transformer_blocks.{i}.attn.to_out.0"
            parts += [self.catalogue[f"vit-block{i}-{part}"] for part in "kv"]
            parts += (
                [Site(f"vit-block{i}-attn-in", out, IN, 0, self.size_divisibility, "tokens")] if out in paths else []
            )
        return Site("concepts", "", OUTPUTS, len(rows), self.size_divisibility, "map", parts=tuple(parts), rows=rows)

    def activation(
        self,
        denoiser: Any,
        site: Site,
        recorded: tuple[Tensor, ...],
        conditioning: Mapping[str, Tensor],
        grid: tuple[int, int],
        average: bool,
    ) -> Tensor:
        if site.port != OUTPUTS:
            return super().activation(denoiser, site, recorded, conditioning, grid, average)
        import torch

        from diffusion_backbones.ops.attention_maps import product  # torch

        acts = {part.path: x for part, x in zip(site.parts, recorded, strict=True)}
        time, concepts = acts.pop("time_text_embed"), denoiser.context_embedder(conditioning[CONCEPTS])
        rotate = self.rotate_image(denoiser, time, grid)
        found: list[Tensor] = []
        *_, last = paths = list(dict.fromkeys(path.partition(".attn.")[0] for path in acts))
        for path in paths:
            block, image = denoiser.get_submodule(path), acts.get(f"{path}.attn.to_out.0")
            x, *modulation = block.norm1_context(concepts, emb=time)
            out = _attend(block.attn, x, acts[f"{path}.attn.to_k"], acts[f"{path}.attn.to_v"], rotate)
            if image is not None:
                found.append(product(out, image))
            if path != last:
                concepts = _behind(block, concepts, out, *modulation)
        similar = torch.stack(found).mean(0)
        maps = torch.stack([similar[:, list(tokens)].mean(1) for tokens in site.rows], 1)
        return maps.view(*maps.shape[:2], *grid).to(time.dtype)

    def rotate_image(self, denoiser: Any, like: Tensor, grid: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """What gives keys of the image their positions; those of text, and so of concepts, change nothing."""
        return lambda keys: keys


def _attend(layer: Any, x: Tensor, k: Tensor, v: Tensor, rotate: Callable[[Tensor], Tensor]) -> Tensor:
    """What attention to the image and to each other gives concepts, (B, tokens, channels), before it is projected.

    Args:
        layer: The stock layer.
        x: Concepts, normalized and modulated.
        k, v: Keys and values of the image as they are projected, (B, image tokens, channels).
        rotate: Gives keys their positions.
    """
    import torch
    import torch.nn.functional as F

    from diffusion_backbones.ops.attention_maps import split_heads  # torch

    q = split_heads(layer, layer.add_q_proj(x), layer.norm_added_q)
    own = split_heads(layer, layer.add_k_proj(x), layer.norm_added_k)
    keys = torch.cat((own, rotate(split_heads(layer, k, layer.norm_k))), 2)
    values = torch.cat([split_heads(layer, y, None) for y in (layer.add_v_proj(x), v)], 2)
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


def _behind(
    block: Any, concepts: Tensor, out: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, forward_gate: Tensor
) -> Tensor:
    """Concepts behind a block, whose half for text they pass; ``out`` is what attention gives them there."""
    import torch

    concepts = concepts + gate[:, None] * block.attn.to_add_out(out)
    x = block.norm2_context(concepts) * (1 + scale[:, None]) + shift[:, None]
    concepts = concepts + forward_gate[:, None] * block.ff_context(x)
    return concepts.clip(-65504, 65504) if concepts.dtype == torch.float16 else concepts  # as the block does
