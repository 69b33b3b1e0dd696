"""DeepFloyd IF, first stage: diffusers' ``UNet2DConditionModel`` on pixels, with T5's keys beside the image's in every
attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.tiny import T5
from diffusion_backbones.families.unet.latent import CROSS, UNet
from diffusion_backbones.families.unet.sites import sites
from diffusion_backbones.spec.activations import Site
from diffusion_backbones.spec.concepts import Said
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


TOKENS = 77
"""Length that diffusers' pipeline pads prompts to, and the network was trained with."""


class DeepFloyd(UNet):
    """The family of ``UNet2DConditionModel`` with added text keys, which also pools the text into the embedding of the
    timestep.

    The latents are the image itself. Padding of the prompt is masked inside T5 and attended in the network, as in
    diffusers' pipeline.
    """

    encoder = ""
    supplied = {
        "addition_embed_type": ("text",),
        "class_embed_type": (None,),  # the upscalers of later stages have one, and need the image that they enlarge
        "num_class_embeds": (None,),
        "encoder_hid_dim_type": (None, "text_proj"),
        "time_cond_proj_dim": (None,),
        "attention_type": (None, "default"),
    }
    wider = {6: "upscaling"}

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Those that pool the text into the embedding of the timestep."""
        return config.get("_class_name") in cls.networks and config.get("addition_embed_type") == "text"

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["unet"] |= {
            "block_out_channels": [8, 16, 24, 32],
            "norm_num_groups": 8,
            "attention_head_dim": 8,
            "cross_attention_dim": CROSS,
            "encoder_hid_dim": T5["d_model"],
            "addition_embed_type_num_heads": 4,
        }
        configs["text_encoder"] |= T5

    def sites(self) -> Iterator[Site]:
        each = self.config["attention_head_dim"]  # channels of a head
        heads = [width // each for width in self.config["block_out_channels"]]
        return sites({**self.config, "attention_head_dim": heads}, 1)

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.config["encoder_hid_dim"])}

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        from diffusion_backbones.ops.truncation import Bypass, StandIn  # torch

        cut = super().truncate(denoiser, paths)
        if all(isinstance(module, StandIn) for path, module in cut.named_modules() if path.endswith("add_k_proj")):
            cut.encoder_hid_proj = Bypass()  # runs first, for attention alone
        return cut

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

        from diffusion_backbones.ops.attention_maps import probabilities, split_heads  # torch

        layer = denoiser.get_submodule(site.path)
        q, text, image = (split_heads(layer, x, None) for x in recorded)
        words = text.shape[2]
        keys = slice(0, words) if site.id.endswith("cross-map") else slice(words, None)
        return probabilities(q, torch.cat((text, image), dim=2), keys, average)

    def said(self, tokenizer: Any, prompt: str) -> Said:
        """In lower case, as its pipeline does."""
        return Said(prompt.lower())

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        said = [prompt.lower().strip() for prompt in prompts]  # as its pipeline does
        embeds, _ = language_model.encode(*load("text_encoder"), said, TOKENS)
        return {"prompt_embeds": embeds}
