"""DeepFloyd IF, first stage: diffusers' ``UNet2DConditionModel`` on pixels, with T5's keys beside the image's in every
attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import Family, LoadText
from diffusion_backbones.families.unet.latent import UNet, sites
from diffusion_backbones.spec.activations import Catalogue, Site
from diffusion_backbones.spec.configs import Config, Configs

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

    def recognises(self, config: Config) -> bool:
        """Only a first stage: the upscalers also need the image that they enlarge."""
        added = (config.get("addition_embed_type"), config.get("class_embed_type")) == ("text", None)
        return Family.recognises(self, config) and added

    def catalogue(self, configs: Configs, network: str) -> Catalogue:
        config = configs["unet"]
        heads = [
            width // config["attention_head_dim"] for width in config["block_out_channels"]
        ]  # the config states channels of a head
        return Catalogue(sites({**config, "attention_head_dim": heads}, 1), network)

    def conditioning_shapes(self, configs: Configs) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, configs["unet"]["encoder_hid_dim"])}

    def truncate(self, denoiser: nn.Module, paths: list[str]) -> nn.Module:
        from diffusion_backbones.ops.truncation import Bypass, StandIn

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

        from diffusion_backbones.ops.attention_maps import Precision, probabilities, split_heads

        layer = denoiser.get_submodule(site.path)
        q, text, image = (split_heads(layer, x, None) for x in recorded)
        words = text.shape[2]
        keys = slice(0, words) if site.id.endswith("cross-map") else slice(words, None)
        return probabilities(
            q,
            torch.cat((text, image), dim=2),
            keys,
            average,
            None,
            Precision(layer.upcast_attention, layer.upcast_softmax),
        )

    def encode_prompts(self, configs: Configs, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        from diffusion_backbones.families.text import language_model

        language_model.check_padding(padding)
        embeds, _ = language_model.encode(
            *load("text_encoder"), [prompt.lower().strip() for prompt in prompts], TOKENS
        )  # as its pipeline does
        return {"prompt_embeds": embeds}
