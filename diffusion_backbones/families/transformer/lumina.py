"""Lumina-Image 2: diffusers' ``Lumina2Transformer2DModel`` behind a KL autoencoder, conditioned on Gemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import DECODER
from diffusion_backbones.families.transformer.base import check_positions, round_up
from diffusion_backbones.families.transformer.nextdit import (
    Layout,
    NextDiT,
    behind_text,
    refined,
    rotated,
    text_mask,
)
from diffusion_backbones.ops.execution_order import ExecutionOrder, Step, in_order
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.concepts import Said

if TYPE_CHECKING:
    from torch import Tensor, nn


def _network(network: Any) -> list[Step]:
    config = network.config
    out = config.patch_size**2 * network.out_channels
    return refined(network, "time_caption_embed.caption_embedder", config.hidden_size, "norm_out", out)


class Lumina(NextDiT):
    """The family of ``Lumina2Transformer2DModel``."""

    networks = ("Lumina2Transformer2DModel",)
    tokens = 256
    image = "last"
    order = ExecutionOrder(
        steps={
            "Lumina2Transformer2DModel": _network,
            "Lumina2TransformerBlock": in_order("attn", "norm2", "ffn_norm1", "feed_forward", "ffn_norm2"),
        }
    )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["transformer"] |= {
            "hidden_size": 24,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "axes_dim_rope": [2, 2, 2],
            "multiple_of": 16,
            "cap_feat_dim": DECODER["hidden_size"],
        }
        configs["text_encoder"] |= DECODER

    @property
    def layout(self) -> Layout:
        config, channels = self.config, self.config["hidden_size"]
        inner = round_up(int(4 * channels * (config.get("ffn_dim_multiplier") or 1)), config["multiple_of"])
        return Layout(
            refiners=config["num_refiner_layers"],
            layers=config["num_layers"],
            attention="attn",
            inner="linear_2",
            channels=channels,
            heads=config["num_attention_heads"],
            kv_heads=config["num_kv_heads"],
            inner_channels=inner,  # as the layer rounds it
        )

    def build_denoiser(self) -> nn.Module:
        import torch

        transformer: Any = super().build_denoiser()
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

        from diffusion_backbones.ops.attention_maps import probabilities  # torch

        mask, tokens, patch = text_mask(conditioning), grid[0] * grid[1], denoiser.config.patch_size
        (q, k), width = recorded, mask.shape[1]
        blank = q.new_zeros(len(mask), 1, patch * grid[0], patch * grid[1])
        _, of_text, of_image, *_ = denoiser.rope_embedder(blank, mask)
        layer = denoiser.get_submodule(site.path)
        keys, of_keys, bias = slice(None), of_image, None
        if not site.path.startswith("noise_refiner"):
            # text, at full length, and then the image: behind a short text stand image tokens, which the bias takes out
            words = F.pad(k, (0, 0, 0, width - k.shape[1]))
            q, k = behind_text(q, mask, tokens), torch.cat((words, behind_text(k, mask, tokens)), dim=1)
            of_keys = torch.cat((of_text, of_image), dim=1)
            there = torch.arange(width, device=q.device) < mask.sum(1, keepdim=True)
            bias = F.pad(there.to(q), (0, tokens), value=1).log()
            keys = slice(width) if site.id.endswith("cross-map") else slice(width, None)
        q, k = rotated(q, layer.norm_q, of_image), rotated(k, layer.norm_k, of_keys)
        return probabilities(q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1), keys, average, bias)

    def said(self, tokenizer: Any, prompt: str) -> Said:
        """With the instruction that diffusers' pipeline puts before a prompt; the empty one, for guidance, has none."""
        from diffusers import Lumina2Pipeline

        parts = dict.fromkeys(("transformer", "scheduler", "vae", "text_encoder", "tokenizer"))
        instruction = Lumina2Pipeline(**parts).system_prompt
        return Said(f"{instruction} <Prompt Start> {prompt}" if prompt else "")

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        said = [self.said(tokenizer, prompt).text for prompt in prompts]
        embeds, mask = language_model.penultimate(tokenizer, model, prompts, said, self.tokens)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def _with_a_mask_to_read(module: Any, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
    """On ``meta``, where nobody can say how long a prompt is, it has the full length."""
    import torch

    return (args[0], torch.ones(args[1].shape, dtype=torch.bool, device="cpu")) if args[1].is_meta else None
