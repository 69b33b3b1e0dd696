"""Qwen-Image: diffusers' ``QwenImageTransformer2DModel`` behind an autoencoder for video, conditioned on Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_backbones.families.base import LoadText
from diffusion_backbones.families.blocks import feed_forward
from diffusion_backbones.families.tiny import DECODER
from diffusion_backbones.families.transformer.base import Transformer, projected, width
from diffusion_backbones.families.transformer.joint_attention import Inner, double_block, joint_map
from diffusion_backbones.ops.execution_order import BYPASS, NONE, PAIR, ExecutionOrder, Step, stand_in
from diffusion_backbones.spec.activations import OUT, Site
from diffusion_backbones.spec.concepts import Said
from diffusion_backbones.spec.configs import Config

if TYPE_CHECKING:
    from torch import Tensor, nn


TOKENS = 512
"""Length that diffusers' pipeline cuts prompts to, with the words behind them and without those before.

Here they are padded to it, and masked.
"""


def _block(block: Any) -> list[Step]:
    """The image's modulation may be all that is read, by the norm of the block before."""
    modulation = [Step("img_mod", NONE), Step("txt_mod", stand_in(6 * block.dim, dim=-1))]
    behind = [Step(name, BYPASS) for name in ("img_norm2", "img_mlp", "txt_norm2", "txt_mlp")]
    return [*modulation, Step("attn", PAIR), *behind]


class Qwen(Transformer):
    """The family of ``QwenImageTransformer2DModel``.

    Patches are packed into channels before the network; every block keeps two streams.
    """

    networks = ("QwenImageTransformer2DModel",)
    text_encoders = ("text_encoder",)
    supplied = {  # those for editing and for layers have others
        "guidance_embeds": (None, False),
        "zero_cond_t": (None, False),
        "use_additional_t_cond": (None, False),
        "use_layer3d_rope": (None, False),
    }
    order = ExecutionOrder(
        steps={
            "QwenImageTransformer2DModel": projected("transformer_blocks"),
            "QwenImageTransformerBlock": _block,
            "FeedForward": feed_forward,
        },
        two_streams=("QwenImageTransformerBlock",),
        text_half=("txt_norm2", "txt_mlp", "attn.to_add_out"),
    )

    @classmethod
    def matches(cls, config: Config) -> bool:
        """Not for networks that paint an image in layers, which want more than latents and a text."""
        layered = config.get("use_layer3d_rope") or config.get("use_additional_t_cond")
        return super().matches(config) and not layered

    @classmethod
    def tiny(cls, configs: dict[str, dict[str, Any]]) -> None:
        configs["vae"] |= {"base_dim": 8, "z_dim": 16}
        configs["transformer"] |= {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 6, 6],
            "joint_attention_dim": DECODER["hidden_size"],
        }
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
        text = configs["text_encoder"]
        text["text_config"] |= DECODER | {"num_attention_heads": 3, "rope_parameters": rope, "rope_scaling": rope}
        text |= {"vision_start_token_id": 1}  # which transformers 4 reads, as it reads rope_scaling
        text["vision_config"] |= {
            "depth": 1,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_heads": 2,
            "out_hidden_size": DECODER["hidden_size"],
        }

    @property
    def latent_channels(self) -> int:
        return int(self.config["in_channels"]) // self.patch**2

    def sites(self) -> Iterator[Site]:
        config, stride = self.config, self.size_divisibility
        channels, heads, blocks = width(config), config["num_attention_heads"], range(config["num_layers"])
        # in some networks a modulation has a second half, for images that are conditioned on
        plain = not config.get("zero_cond_t")
        norms = [*(f"transformer_blocks.{i}.img_mod.1" if plain else "" for i in blocks[1:]), ""]
        inner = Inner("img_mlp.net.0", OUT, 4 * channels)
        for i in blocks:
            path = f"transformer_blocks.{i}"
            for site in double_block(path, i, channels, heads, stride, norms[i], inner):
                yield replace(site, path=f"{path}.img_mlp") if site.id.endswith("norm-out") else site

    @property
    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (TOKENS, self.config["joint_attention_dim"]), "prompt_attention_mask": (TOKENS,)}

    def build_denoiser(self) -> nn.Module:
        import torch

        transformer: Any = super().build_denoiser()
        old = transformer.pos_embed
        with torch.device("cpu"):  # its tables are plain tensors, which no file holds and no .to() moves off meta
            transformer.pos_embed = type(old)(theta=old.theta, axes_dim=old.axes_dim, scale_rope=old.scale_rope)
        whole: nn.Module = transformer
        return whole

    def call(
        self, denoiser: Any, z: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor], size: tuple[int, int]
    ) -> Tensor:
        import torch
        import torch.nn.functional as F

        patch, text = denoiser.config.patch_size, conditioning["prompt_embeds"]
        grid = (z.shape[-2] // patch, z.shape[-1] // patch)
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # the network keeps what it computes here, and training uses it later
                _rotary(denoiser, grid, text.shape[1], z)
        output: Tensor = denoiser(
            F.pixel_unshuffle(z, patch).flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=conditioning["prompt_attention_mask"].bool(),
            timestep=timestep.to(z) / 1000,
            img_shapes=[[(1, *grid)]] * len(z),
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
        import torch.nn.functional as F
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        mask, tokens = conditioning["prompt_attention_mask"].bool(), grid[0] * grid[1]
        rotary = _rotary(denoiser, grid, mask.shape[1], mask)

        def rotate(x: Tensor) -> Tensor:
            rotated: Tensor = apply_rotary_emb_qwen(x.transpose(1, 2), rotary, use_real=False).transpose(1, 2)
            return rotated

        bias = F.pad(mask.to(recorded[0]), (0, tokens), value=1).log()  # 0, and minus infinity for padding
        return joint_map(denoiser.get_submodule(site.path), site, recorded, tokens, True, rotate, average, bias=bias)

    def said(self, tokenizer: Any, prompt: str) -> Said:
        from diffusers import QwenImagePipeline

        pipeline = QwenImagePipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", "transformer", "scheduler")))
        return Said(pipeline.prompt_template_encode.format(prompt), pipeline.prompt_template_encode_start_idx)

    def encode_prompts(self, load: LoadText, prompts: list[str], padding: str) -> dict[str, Tensor]:
        """With the words that diffusers' pipeline puts around a prompt, less those before it."""
        import torch
        import torch.nn.functional as F
        from diffusers import QwenImagePipeline

        from diffusion_backbones.families.text import language_model  # torch

        language_model.check_padding(padding)
        tokenizer, model = load("text_encoder")
        pipeline = QwenImagePipeline(
            tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None
        )
        template, begin = pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx
        embeds, masks = [], []
        for prompt in prompts:
            length = len(tokenizer(template.format(prompt), verbose=False).input_ids) - begin
            if length > TOKENS:
                raise ValueError(
                    f"the prompt {prompt[:60]!r}... has {length} tokens with the words behind it, and the network "
                    f"takes {TOKENS}; shorten it"
                )
            states = pipeline.encode_prompt(prompt, device=torch.device("cpu"), max_sequence_length=TOKENS)[0].float()
            missing = TOKENS - states.shape[1]
            embeds.append(F.pad(states, (0, 0, 0, missing)))
            masks.append(F.pad(states.new_ones(states.shape[:2]), (0, missing)))
        return {"prompt_embeds": torch.cat(embeds), "prompt_attention_mask": torch.cat(masks)}


def _rotary(denoiser: Any, grid: tuple[int, int], tokens: int, like: Tensor) -> Tensor:
    """The turns of the text, then those of the image: (tokens + height · width, d / 2), complex.

    They are on the device of ``like``.
    """
    import torch

    image, text = denoiser.pos_embed([[(1, *grid)]], max_txt_seq_len=tokens, device=like.device)
    return torch.cat([text, image])
