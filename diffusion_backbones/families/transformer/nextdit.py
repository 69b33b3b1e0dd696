"""What Lumina-Image 2 and Z-Image share: image and text are refined apart, then run as one sequence.

The length of that sequence differs from row to row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from diffusion_backbones.families.transformer.base import Transformer
from diffusion_backbones.ops.execution_order import Step, numbered, stand_in
from diffusion_backbones.spec.activations import MAP, Port, Site

if TYPE_CHECKING:
    from torch import Tensor

Place = Literal["first", "last"]
"""Where the image is in a sequence: before the text, or behind it."""


class Layout(NamedTuple):
    """How many blocks a network has, what their parts are called, and how wide those are.

    Args:
        refiners: Blocks of ``noise_refiner``.
        layers: Blocks of ``layers``.
        attention: The attention layer of a block.
        inner: The last projection of its feed-forward layer, whose input is the widest activation.
        channels: Width of the stream.
        heads: Heads of queries.
        kv_heads: Heads of keys and values, each of which serves ``heads / kv_heads`` of the queries.
        inner_channels: Width inside the feed-forward layer.
    """

    refiners: int
    layers: int
    attention: str
    inner: str
    channels: int
    heads: int
    kv_heads: int
    inner_channels: int


class NextDiT(Transformer):
    """Networks with a ``noise_refiner`` for the image, a ``context_refiner`` for the text, and ``layers`` for both.

    The blocks that image tokens pass are numbered through: those of the noise refiner first, ``layers`` after them.

    Attributes:
        tokens: Length that prompts are padded to. The padding is cut off before text and image become one sequence.
        image: Where the image is in the sequence of ``layers``.
    """

    tokens: ClassVar[int]
    image: ClassVar[Place]
    text_encoders = ("text_encoder",)
    compilable = False  # lengths of texts are read on the host
    shifted = True

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """What the network is made of."""

    def sites(self) -> Iterator[Site]:
        layout, stride = self.layout, self.size_divisibility
        for i in range(layout.refiners):
            yield from _block(f"noise_refiner.{i}", i, layout, stride, "first", ("self-map",))
        for i in range(layout.layers):
            yield from _block(f"layers.{i}", layout.refiners + i, layout, stride, self.image, ("cross-map", "self-map"))

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.tokens, self.config["cap_feat_dim"]), "prompt_attention_mask": (self.tokens,)}

    def blank_conditioning(self) -> dict[str, Tensor]:
        """Zeros, and none of them padding: on ``meta`` a prompt costs the most that it can."""
        import torch

        return super().blank_conditioning() | {"prompt_attention_mask": torch.ones(1, self.tokens)}

    def image_tokens(self, port: Port, x: Tensor, conditioning: Mapping[str, Tensor], tokens: int) -> Tensor:
        """Behind the text of each row, where padding may follow the image."""
        if port.tokens == "last":
            return behind_text(x, text_mask(conditioning), tokens)
        return super().image_tokens(port, x, conditioning, tokens)


def refined(network: Any, text: str, width: int, final: str, out: int) -> list[Step]:
    """The steps of a network. Text is refined beside the image, so what reads the image's refiner does without it.

    Args:
        network: It.
        text: The layer that embeds the text.
        width: Channels that this layer gives.
        final: The layer behind the blocks.
        out: Channels that this one gives.
    """
    return [
        *numbered(network, "noise_refiner"),
        Step(text, stand_in(width, dim=-1)),
        *numbered(network, "context_refiner", "layers"),
        Step(final, stand_in(out, dim=-1)),
    ]


def _block(path: str, number: int, layout: Layout, stride: int, image: Place, maps: tuple[str, ...]) -> Iterator[Site]:
    """Activations of the image tokens of a block, which are at ``image`` in its sequence, in forward order."""
    name, attention, channels = f"vit-block{number}", f"{path}.{layout.attention}", layout.channels
    inner, inputs, outputs = f"{path}.feed_forward.{layout.inner}", Port("in", tokens=image), Port(tokens=image)
    for qkv, heads in zip("qkv", (layout.heads, layout.kv_heads, layout.kv_heads), strict=True):
        wide = channels // layout.heads * heads
        yield Site(f"{name}-{qkv}", f"{attention}.to_{qkv}", outputs, wide, stride, "tokens")
    for kind in maps:
        yield Site(f"{name}-{kind}", attention, MAP, layout.heads, stride, "attention")
    yield Site(f"{name}-attn-out", attention, outputs, channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.feed_forward", inputs, channels, stride, "tokens")
    yield Site(f"{name}-ffn-inner", inner, inputs, layout.inner_channels, stride, "tokens")
    yield Site(f"{name}-out", path, outputs, channels, stride, "tokens")


def text_mask(conditioning: Mapping[str, Tensor]) -> Tensor:
    """(B, T) booleans: true for text, false for padding.

    Raises:
        ValueError: The mask is not as long as the embeddings.
    """
    embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
    if mask.shape != embeds.shape[:2]:
        length = mask.shape[1]
        raise ValueError(
            f"prompt_embeds has {embeds.shape[1]} tokens and prompt_attention_mask {length}; pad the embeddings to "
            "it, and give the mask too"
        )
    return mask.bool()


def behind_text(x: Tensor, mask: Tensor, tokens: int) -> Tensor:
    """The image of each row of a sequence: (B, sequence, C) -> (B, tokens, C).

    Args:
        x: The text of ``mask``, then ``tokens`` of image, then padding.
        mask: (B, T), true for text.
        tokens: Of the image.
    """
    import torch

    index = mask.sum(1, keepdim=True) + torch.arange(tokens, device=x.device)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def rotated(x: Tensor, norm: Any, rotary: Tensor) -> Tensor:
    """Queries or keys, normalized and turned: (B, sequence, C) -> (B, heads, sequence, d).

    Args:
        x: What ``to_q`` or ``to_k`` gave.
        norm: Their norm, or None.
        rotary: (B, sequence, d / 2), complex.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    x = x.view(*x.shape[:2], -1, 2 * rotary.shape[-1])
    turned: Tensor = apply_rotary_emb(x if norm is None else norm(x), rotary, use_real=False)
    return turned.transpose(1, 2)
