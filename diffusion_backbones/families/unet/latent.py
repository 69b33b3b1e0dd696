"""Latent U-Nets: diffusers' ``UNet2DConditionModel`` behind a KL autoencoder (SD 1.x, SD 2.x, SDXL, relatives)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion_backbones.families.base import Architecture, LoadText
from diffusion_backbones.families.tiny import WORDS
from diffusion_backbones.families.unet.execution_order import ORDER
from diffusion_backbones.families.unet.sites import sites
from diffusion_backbones.spec.activations import Site, parse
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn

CROSS, POOLED, TIME = 32, 16, 8
"""Widths of the text, the pooled text and the embedded sizes in tiny networks."""
BY_LEVEL = (
    "down_block_types",
    "up_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
)
"""Keys that have one value for each level, if they have several."""
GUIDANCE = 8.5
"""The guidance scale of networks that embed it, unless a call gives another; the default of diffusers' pipeline."""


class UNet(Architecture):
    """The family of ``UNet2DConditionModel``.

    Attributes:
        tokens: Of the text: those of a prompt, or one for each class.
    """

    tokens: int = 77
    denoiser = "unet"
    encoder = "vae"
    networks: ClassVar[tuple[str, ...]] = ("UNet2DConditionModel",)
    order = ORDER
    finest_aggregated = 16
    stages = {"down_blocks": 1, "mid_block": 100, "up_blocks": 101, "conv_norm_out": 200, "conv_out": 200}
    supplied = {
        "addition_embed_type": (None, "text_time"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "encoder_hid_dim": (None,),
        "encoder_hid_dim_type": (None,),
        "attention_type": (None, "default"),
    }
    wider = {
        5: "depth maps",
        7: "upscaling",
        8: "InstructPix2Pix, Marigold and others with a second image",
        9: "inpainting",
    }

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Not those that add the text in another way, as DeepFloyd IF does."""
        return super().matches(config) and config.get("addition_embed_type") != "text"

    def check(self) -> None:
        super().check()
        config = self.config
        n = len(config["block_out_channels"])
        for key, value in config.items():
            by_level = key in BY_LEVEL and isinstance(value, (list, tuple))
            if by_level and len(value) != n:
                raise ValueError(f"has {len(value)} {key}, and block_out_channels says {n} levels")
        if isinstance(config.get("cross_attention_dim"), (list, tuple)):
            raise ValueError("has several cross_attention_dim, and the text has one; such networks are not read")
        if _has_added_text(config):
            width, five = config["projection_class_embeddings_input_dim"], 5 * config["addition_time_embed_dim"]
            if width - five == config["cross_attention_dim"]:
                raise ValueError(
                    f"has projection_class_embeddings_input_dim {width}, room for five numbers beside the text: it is "
                    "SDXL's refiner, which takes an aesthetic score and one text encoder, and is not read; give the "
                    "base network"
                )

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        unet = configs["unet"]
        n = len(unet["block_out_channels"])
        unet |= {
            "block_out_channels": [16, 32, 64, 64][:n],
            "norm_num_groups": 8,
            "cross_attention_dim": CROSS,
            "sample_size": 8,
        }
        unet["attention_head_dim"] = 8 if isinstance(unet["attention_head_dim"], int) else [1, 2, 4, 4][:n]
        text = {
            "hidden_size": CROSS,
            "projection_dim": CROSS,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            **WORDS,
        }
        configs["text_encoder"] |= text
        if "text_encoder_2" in configs:
            half = {"hidden_size": CROSS // 2, "projection_dim": CROSS // 2}
            configs["text_encoder"] |= half
            configs["text_encoder_2"] |= text | half | {"projection_dim": POOLED}
            unet |= {"addition_time_embed_dim": TIME, "projection_class_embeddings_input_dim": POOLED + 6 * TIME}

    def sites(self) -> Iterator[Site]:
        return sites(self.config, self.latent_stride)

    @property
    def concept_sites(self) -> list[Site]:
        """Those of DAAM: on the way down and up, without the layers at an eighth of the latents' side."""
        parts = [site for site in super().concept_sites if parse(site.id).stage != "mid"]
        return [site for site in parts if site.stride != 8 * self.latent_stride]

    @property
    def concept_stride(self) -> int:
        return self.latent_stride

    @property
    def size_divisibility(self) -> int:
        return self.latent_stride * int(2 ** (len(self.config["block_out_channels"]) - 1))

    def with_classes(self, n: int) -> Architecture:
        if not n or self.text_encoders != ("text_encoder",) or self.config.get("addition_embed_type"):
            return super().with_classes(n)
        network = type(self)(self.configs, self.name)
        network.tokens = n
        return network

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        config = self.config
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (self.tokens, config["cross_attention_dim"])}
        if _has_added_text(config):
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            shapes["pooled_prompt_embeds"] = (pooled,)
        return shapes | ({"guidance": ()} if self.embeds_guidance else {})

    @property
    def embeds_guidance(self) -> bool:
        """Whether a guidance scale is an input of the network, as after consistency distillation."""
        return self.config.get("time_cond_proj_dim") is not None

    def blank_conditioning(self) -> dict[str, Tensor]:
        return super().blank_conditioning() | self._guidance(1)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return ("text_encoder", "text_encoder_2") if _has_added_text(self.config) else ("text_encoder",)

    def call(
        self,
        denoiser: nn.Module,
        z: Tensor,
        timestep: Tensor,
        conditioning: Mapping[str, Tensor],
        size: tuple[int, int],
    ) -> Tensor:
        added = None
        if "pooled_prompt_embeds" in conditioning:
            ids = z.new_tensor([*size, 0, 0, *size]).expand(z.shape[0], 6)  # original size, crop corner, target size
            added = {"text_embeds": conditioning["pooled_prompt_embeds"], "time_ids": ids}
        scale = conditioning.get("guidance")
        output: Tensor = denoiser(
            z,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep_cond=None if scale is None else self._embedded(scale).to(z.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def _embedded(self, scale: Tensor) -> Tensor:
        """(B,) guidance scales -> (B, channels), as diffusers' pipeline for latent consistency embeds them."""
        from diffusers.models.embeddings import get_timestep_embedding

        embedded: Tensor = get_timestep_embedding(1000 * (scale.float() - 1), self.config["time_cond_proj_dim"])
        return embedded

    def _guidance(self, rows: int) -> dict[str, Tensor]:
        import torch

        return {"guidance": torch.full((rows,), GUIDANCE)} if self.embeds_guidance else {}

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text.clip import encode  # torch

        return encode(load, prompts, padding, self.text_encoders) | self._guidance(len(prompts))


def _has_added_text(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"
