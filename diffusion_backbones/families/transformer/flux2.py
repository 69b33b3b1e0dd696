"""FLUX.2: diffusers' ``Flux2Transformer2DModel`` behind a KL autoencoder with patches, conditioned on inner states of a
language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.transformer.base import Transformer, width
from diffusion_backbones.families.transformer.joint_attention import Inner, double_block, joint_map
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

if TYPE_CHECKING:
    from torch import Tensor, nn

GUIDANCE = 4.0
"""What guidance-distilled weights are told unless a call says otherwise; the default of diffusers' pipeline."""
TOKENS = 512
"""Length that diffusers' pipelines pad prompts to, the words around them included. The padding is text to the network.
"""
PIPELINES = {"mistral3": "Flux2Pipeline", "qwen3": "Flux2KleinPipeline"}
"""Kind of language model -> diffusers' pipeline, which knows the words around a prompt and the layers that are read."""


class Flux2(Transformer):
    """The family of ``Flux2Transformer2DModel``. All blocks of a kind share one modulation, and single blocks have one
    layer for q, k, v and the MLP.
    """

    networks = ("Flux2Transformer2DModel",)

    def patch(self, configs: Configs) -> int:
        return 1

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        return Catalogue(_sites(configs["transformer"], self.size_divisibility(configs)), network)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        config = configs["transformer"]
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (TOKENS, config["joint_attention_dim"])}
        return shapes | ({"guidance": ()} if config.get("guidance_embeds", True) else {})

    def blank_conditioning(self, configs: Configs) -> dict[str, Tensor]:
        return super().blank_conditioning(configs) | self._guidance(configs, 1)

    def text_encoder_names(self, configs: Configs) -> tuple[str, ...]:
        return ("text_encoder",)

    def build_denoiser(self, config: Config) -> nn.Module:
        from diffusers import Flux2Transformer2DModel

        transformer: nn.Module = Flux2Transformer2DModel.from_config(config)
        return transformer

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
        from diffusers.models.embeddings import apply_rotary_emb

        rotary = denoiser.pos_embed(torch.cat(_positions(recorded[0], conditioning["prompt_embeds"].shape[1], *grid)))

        def rotate(x: Tensor) -> Tensor:
            rotated: Tensor = apply_rotary_emb(x, rotary, sequence_dim=2)
            return rotated

        attention = denoiser.get_submodule(site.path)
        if len(recorded) == 1:  # queries, keys, values and more in one
            recorded = recorded[0][..., : 2 * attention.inner_dim].chunk(2, -1)
        return joint_map(attention, site, recorded, grid[0] * grid[1], True, rotate, average)

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the words that diffusers' pipeline puts around a prompt."""
        import diffusers
        import torch

        from diffusion_backbones.families.text import language_model

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
        return {"prompt_embeds": torch.cat(rows).float()} | self._guidance(configs, len(prompts))

    def _guidance(self, configs: Configs, rows: int) -> dict[str, Tensor]:
        import torch

        return (
            {"guidance": torch.full((rows,), GUIDANCE)} if configs["transformer"].get("guidance_embeds", True) else {}
        )


def _said(pipeline: Any, prompt: str) -> str:
    """A prompt as the language model is given it."""
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    messages: list[Any] = [{"role": "user", "content": prompt}]
    options: dict[str, bool] = {"add_generation_prompt": True, "enable_thinking": False}
    if hasattr(pipeline, "system_message"):
        [messages], options = format_input([prompt], pipeline.system_message), {}
    text: str = pipeline.tokenizer.apply_chat_template(messages, tokenize=False, **options)
    return text


def _sites(config: Config, stride: int) -> Iterator[Site]:
    """Double blocks are numbered first, single blocks go on from there."""
    channels, heads, doubles, singles = (
        width(config),
        config["num_attention_heads"],
        config["num_layers"],
        config["num_single_layers"],
    )
    inner = int(config.get("mlp_ratio", 3.0) * channels)
    following = (
        ["double_stream_modulation_img.linear"] * (doubles - 1) + ["single_stream_modulation.linear"] * singles + [""]
    )
    for i in range(doubles):
        yield from double_block(
            f"transformer_blocks.{i}", i, channels, heads, stride, following[i], Inner("ff.act_fn", "out", inner)
        )
    for j in range(singles):
        yield from _single(
            f"single_transformer_blocks.{j}", doubles + j, channels, heads, stride, following[doubles + j], inner
        )


def _single(
    path: str, block: int, channels: int, heads: int, stride: int, modulation: str, inner: int
) -> Iterator[Site]:
    """Attention and feed-forward run side by side between two layers that serve both, so ``norm-out`` is what enters
    both.
    """
    name, before = f"vit-block{block}", "to_qkv_mlp_proj"
    for i, qkv in enumerate("qkv"):
        yield Site(f"{name}-{qkv}", f"{path}.attn.{before}", f"out[:, T:, {i}]", channels, stride, "tokens")
    yield Site(f"{name}-cross-map", f"{path}.attn", "map", heads, stride, "attention", (before,))
    yield Site(f"{name}-self-map", f"{path}.attn", "map", heads, stride, "attention", (before,))
    yield Site(f"{name}-attn-out", f"{path}.attn.to_out", "in[:, T:, 0]", channels, stride, "tokens")
    yield Site(f"{name}-norm-out", f"{path}.attn.{before}", "in[:, T:]", channels, stride, "tokens", extension=True)
    yield Site(f"{name}-ffn-inner", f"{path}.attn.mlp_act_fn", "out[:, T:]", inner, stride, "tokens")
    yield Site(f"{name}-out", path, "out[:, T:]", channels, stride, "tokens", modulation=modulation)


def _positions(like: Tensor, tokens: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """(tokens, 4) of (0, 0, 0, number) for the text and (height · width, 4) of (0, row, column, 0) for the image,
    integers on the device of ``like``.
    """
    import torch
    import torch.nn.functional as F

    numbers, rows, columns = (torch.arange(n, device=like.device) for n in (tokens, height, width))
    places = torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)], -1).flatten(0, 1)
    return F.pad(numbers[:, None], (3, 0)), F.pad(places, (1, 1))
