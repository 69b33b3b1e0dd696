"""FLUX.2: diffusers' ``Flux2Transformer2DModel`` behind a KL autoencoder with patches, conditioned on a language model.

The text is what several inner layers of that language model give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import DECODER
from diffusion_backbones.families.transformer.base import Transformer, width
from diffusion_backbones.families.transformer.joint_attention import (
    BEHIND_TEXT,
    IN_BEHIND_TEXT,
    Inner,
    double_block,
    joint_block,
    joint_map,
    rotation,
)
from diffusion_backbones.ops.execution_order import BYPASS, NONE, ExecutionOrder, Step, in_order, numbered, stand_in
from diffusion_backbones.spec.activations import MAP, OUT, Port, Site

if TYPE_CHECKING:
    from torch import Tensor

GUIDANCE = 4.0
"""The guidance scale of guidance-distilled weights unless a call gives another; the default of diffusers' pipeline."""
TOKENS = 512
"""Length that diffusers' pipelines pad prompts to, the words around them included. The padding is text to the network.
"""
PIPELINES = {"mistral3": "Flux2Pipeline", "qwen3": "Flux2KleinPipeline"}
"""Kind of language model -> diffusers' pipeline, which knows the words around a prompt and the layers that are read."""


def _network(network: Any) -> list[Step]:
    """The modulation that all single blocks share is computed first, and goes when the last of them goes."""
    out = stand_in(network.proj_out.out_features, dim=-1)
    return [
        *numbered(network, "transformer_blocks"),
        Step("single_stream_modulation", BYPASS),
        *numbered(network, "single_transformer_blocks"),
        Step("norm_out", BYPASS),
        Step("proj_out", out),
    ]


def _parallel_attention(layer: Any) -> list[Step]:
    out = stand_in(layer.to_out.out_features, dim=-1)
    return [Step("to_qkv_mlp_proj", NONE), Step("mlp_act_fn", BYPASS), Step("to_out", out)]


def _feed_forward(layer: Any) -> list[Step]:
    out = stand_in(layer.linear_out.out_features, dim=-1)
    return [Step("linear_in", NONE), Step("act_fn", BYPASS), Step("linear_out", out)]


class Flux2(Transformer):
    """The family of ``Flux2Transformer2DModel``.

    All blocks of a kind share one modulation, and single blocks have one layer for q, k, v and the MLP.
    """

    networks = ("Flux2Transformer2DModel",)
    text_encoders = ("text_encoder",)
    words = ""
    order = ExecutionOrder(
        steps={
            "Flux2Transformer2DModel": _network,
            "Flux2TransformerBlock": joint_block,
            "Flux2SingleTransformerBlock": in_order("attn"),
            "Flux2ParallelSelfAttention": _parallel_attention,
            "Flux2FeedForward": _feed_forward,
        },
        attention=("Flux2Attention",),
        two_streams=("Flux2TransformerBlock",),
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["vae"] |= {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8}
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 4, 4, 4],
            "joint_attention_dim": 3 * DECODER["hidden_size"],
        }
        text, deep = configs["text_encoder"], DECODER | {"num_hidden_layers": 31}
        if "text_config" in text:
            vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
            text["text_config"] |= deep
            text["vision_config"] |= vision
        else:
            text |= deep

    @property
    def patch(self) -> int:
        return 1

    def sites(self) -> Iterator[Site]:
        """Double blocks are numbered first, single blocks go on from there."""
        channels, heads = width(self.config), self.config["num_attention_heads"]
        doubles, singles = self.config["num_layers"], self.config["num_single_layers"]
        inner = int(self.config.get("mlp_ratio", 3.0) * channels)
        following = ["double_stream_modulation_img.linear"] * (doubles - 1)
        following += ["single_stream_modulation.linear"] * singles
        for i, norm in enumerate([*following, ""]):
            block = (i, channels, heads, self.size_divisibility, norm)
            if i < doubles:
                yield from double_block(f"transformer_blocks.{i}", *block, Inner("ff.act_fn", OUT, inner))
            else:
                yield from _single(f"single_transformer_blocks.{i - doubles}", *block, inner)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (TOKENS, self.config["joint_attention_dim"])}
        return shapes | ({"guidance": ()} if self.config.get("guidance_embeds", True) else {})

    def blank_conditioning(self) -> dict[str, Tensor]:
        return super().blank_conditioning() | self._guidance(1)

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        words, places = _positions(z, text.shape[1], z.shape[-2], z.shape[-1])
        output: Tensor = denoiser(
            z.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=timestep.to(z) / 1000,
            img_ids=places,
            txt_ids=words,
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

        words = conditioning["prompt_embeds"].shape[1]
        rotate = rotation(denoiser.pos_embed(torch.cat(_positions(recorded[0], words, *grid))))
        layer = denoiser.get_submodule(site.path)
        if len(recorded) == 1:  # queries, keys, values and more in one
            recorded = recorded[0][..., : 2 * layer.inner_dim].chunk(2, -1)
        return joint_map(layer, site, recorded, grid[0] * grid[1], True, rotate, average)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the words that diffusers' pipeline puts around a prompt."""
        import diffusers
        import torch

        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        kind = getattr(diffusers, PIPELINES[model.config.model_type])
        pipeline = kind(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
        rows = []
        for prompt in prompts:
            length = len(tokenizer(_said(pipeline, prompt), add_special_tokens=False, verbose=False).input_ids)
            if length > TOKENS:
                raise ValueError(
                    f"the prompt {prompt[:60]!r}... has {length} tokens with the words around it, and the network "
                    f"takes {TOKENS}; shorten it"
                )
            rows.append(pipeline.encode_prompt(prompt, device=torch.device("cpu"), max_sequence_length=TOKENS)[0])
        return {"prompt_embeds": torch.cat(rows).float()} | self._guidance(len(prompts))

    def _guidance(self, rows: int) -> dict[str, Tensor]:
        import torch

        return {"guidance": torch.full((rows,), GUIDANCE)} if self.config.get("guidance_embeds", True) else {}


def _said(pipeline: Any, prompt: str) -> str:
    """A prompt as the language model is given it."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    messages: list[Any] = [{"role": "user", "content": prompt}]
    options: dict[str, bool] = {"add_generation_prompt": True, "enable_thinking": False}
    if hasattr(pipeline, "system_message"):
        [messages], options = format_input([prompt], pipeline.system_message), {}
    text: str = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def _single(
    path: str, block: int, channels: int, heads: int, stride: int, modulation: str, inner: int
) -> Iterator[Site]:
    """Activations of a block in which attention and feed-forward run side by side, between two layers that serve both.

    So ``norm-out`` is what enters both.
    """
    name, before = f"vit-block{block}", "to_qkv_mlp_proj"
    for i, qkv in enumerate("qkv"):
        port = Port(tokens="last", part=i)
        yield Site(f"{name}-{qkv}", f"{path}.attn.{before}", port, channels, stride, "tokens")
    yield Site(f"{name}-cross-map", f"{path}.attn", MAP, heads, stride, "attention", (before,))
    yield Site(f"{name}-self-map", f"{path}.attn", MAP, heads, stride, "attention", (before,))
    attended = Port("in", tokens="last", part=0)
    yield Site(f"{name}-attn-out", f"{path}.attn.to_out", attended, channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.attn.{before}", IN_BEHIND_TEXT, channels, stride, "tokens", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.attn.mlp_act_fn", BEHIND_TEXT, inner, stride, "tokens")
    yield Site(f"{name}-out", path, BEHIND_TEXT, channels, stride, "tokens", modulation=modulation)


def _positions(like: Tensor, tokens: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Positions of text and image, as integers on the device of ``like``.

    Returns:
        (tokens, 4) of (0, 0, 0, number), and (height · width, 4) of (0, row, column, 0).
    """
    import torch
    import torch.nn.functional as F

    numbers, rows, columns = (torch.arange(n, device=like.device) for n in (tokens, height, width))
    places = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], -1).flatten(0, 1)
    return F.pad(numbers[:, None], (3, 0)), F.pad(places, (1, 1))
