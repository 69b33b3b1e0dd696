"""In which order the parts of diffusion transformers run, and what may stand in for a part that is cut off."""

from __future__ import annotations

from typing import Any

from diffusion_backbones.families.unet.execution_order import STEPS as UNET_STEPS
from diffusion_backbones.ops.truncation import REMOVE, Bypass, OneToken, Pair, StandIn, Step, Steps


def _blocks(network: Any, *lists: str) -> list[Step]:
    return [Step(f"{name}.{i}", REMOVE) for name in lists for i in range(len(getattr(network, name)))]


def _dit(network: Any) -> list[Step]:
    modulation, out = network.proj_out_1.out_features, network.proj_out_2.out_features
    rest = [
        Step("norm_out", Bypass()),
        Step("proj_out_1", StandIn(modulation, dim=-1)),
        Step("proj_out_2", OneToken(out, dim=-1)),
    ]
    return [*_blocks(network, "transformer_blocks"), *rest]


def _projected(*lists: str) -> Any:
    """Blocks, an output norm (with or without a modulation), and a projection whose width the unpatchify that follows
    relies on.
    """

    def steps(network: Any) -> list[Step]:
        out = network.proj_out.out_features
        return [*_blocks(network, *lists), Step("norm_out", Bypass()), Step("proj_out", StandIn(out, dim=-1))]

    return steps


def _joint(block: Any) -> list[Step]:
    """The image's half decides how far a joint block is needed; the text's half of the same stage goes with it."""
    second = [Step("attn2", Bypass())] if getattr(block, "attn2", None) is not None else []
    text = (
        [Step("norm2_context", Bypass()), Step("ff_context", Bypass())]
        if getattr(block, "ff_context", None) is not None
        else []
    )
    return [Step("attn", None), *second, Step("norm2", Bypass()), Step("ff", Bypass()), *text]


def _single(block: Any) -> list[Step]:
    """The feed-forward layer runs beside attention, so what reads attention alone does without it."""
    width = block.proj_out.out_features
    return [
        Step("attn", None),
        Step("proj_mlp", StandIn(block.mlp_hidden_dim, dim=-1)),
        Step("act_mlp", Bypass()),
        Step("proj_out", StandIn(width, dim=-1)),
    ]


def _flux2(network: Any) -> list[Step]:
    """The modulation that all single blocks share is computed first, and goes when the last of them goes."""
    doubles, singles = (_blocks(network, name) for name in ("transformer_blocks", "single_transformer_blocks"))
    rest = [Step("norm_out", Bypass()), Step("proj_out", StandIn(network.proj_out.out_features, dim=-1))]
    return [*doubles, Step("single_stream_modulation", Bypass()), *singles, *rest]


def _flux2_single(attention: Any) -> list[Step]:
    return [
        Step("to_qkv_mlp_proj", None),
        Step("mlp_act_fn", Bypass()),
        Step("to_out", StandIn(attention.to_out.out_features, dim=-1)),
    ]


def _flux2_feed_forward(layer: Any) -> list[Step]:
    return [
        Step("linear_in", None),
        Step("act_fn", Bypass()),
        Step("linear_out", StandIn(layer.linear_out.out_features, dim=-1)),
    ]


def _qwen(block: Any) -> list[Step]:
    """The image's modulation may be all that is read, by the norm of the block before."""
    modulation = [Step("img_mod", None), Step("txt_mod", StandIn(6 * block.dim, dim=-1))]
    behind = [Step(name, Bypass()) for name in ("img_norm2", "img_mlp", "txt_norm2", "txt_mlp")]
    return [*modulation, Step("attn", Pair()), *behind]


def _sana(block: Any) -> list[Step]:
    return [Step("attn1", None), Step("attn2", None), Step("norm2", Bypass()), Step("ff", Bypass())]


def _hunyuan(block: Any) -> list[Step]:
    return [
        Step("attn1", None),
        Step("norm2", Bypass()),
        Step("attn2", Bypass()),
        Step("norm3", Bypass()),
        Step("ff", Bypass()),
    ]


def _refined(network: Any, text: str, width: int, final: str, out: int) -> list[Step]:
    """Text is refined beside the image, so what reads the image's refiner does without it."""
    return [
        *_blocks(network, "noise_refiner"),
        Step(text, StandIn(width, dim=-1)),
        *_blocks(network, "context_refiner"),
        *_blocks(network, "layers"),
        Step(final, StandIn(out, dim=-1)),
    ]


def _lumina(network: Any) -> list[Step]:
    config = network.config
    return _refined(
        network,
        "time_caption_embed.caption_embedder",
        config.hidden_size,
        "norm_out",
        config.patch_size**2 * network.out_channels,
    )


def _z_image(network: Any) -> list[Step]:
    [size] = network.all_patch_size
    return _refined(network, "cap_embedder", network.dim, f"all_final_layer.{size}-1", size**2 * network.out_channels)


def _after_attention(*names: str) -> Any:
    """Attention, and the layers behind it in order, each of which may be passed by."""
    attention, *rest = names
    return lambda block: [Step(attention, None), *(Step(name, Bypass()) for name in rest)]


STEPS: Steps = {
    "BasicTransformerBlock": UNET_STEPS["BasicTransformerBlock"],
    "FeedForward": lambda layer: (
        UNET_STEPS["FeedForward"](layer) if hasattr(layer, "net") else []
    ),  # Z-Image's has the same name
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _projected("transformer_blocks"),
    "FluxTransformer2DModel": _projected("transformer_blocks", "single_transformer_blocks"),
    "SD3Transformer2DModel": _projected("transformer_blocks"),
    "AuraFlowTransformer2DModel": _projected("joint_transformer_blocks", "single_transformer_blocks"),
    "AuraFlowJointTransformerBlock": _joint,
    "AuraFlowSingleTransformerBlock": _joint,
    "SanaTransformer2DModel": _projected("transformer_blocks"),
    "SanaTransformerBlock": _sana,
    "HunyuanDiT2DModel": _projected("blocks"),
    "HunyuanDiTBlock": _hunyuan,
    "FluxTransformerBlock": _joint,
    "FluxSingleTransformerBlock": _single,
    "JointTransformerBlock": _joint,
    "Flux2Transformer2DModel": _flux2,
    "Flux2TransformerBlock": _joint,
    "Flux2SingleTransformerBlock": lambda block: [Step("attn", None)],
    "Flux2ParallelSelfAttention": _flux2_single,
    "Flux2FeedForward": _flux2_feed_forward,
    "QwenImageTransformer2DModel": _projected("transformer_blocks"),
    "QwenImageTransformerBlock": _qwen,
    "Lumina2Transformer2DModel": _lumina,
    "Lumina2TransformerBlock": _after_attention("attn", "norm2", "ffn_norm1", "feed_forward", "ffn_norm2"),
    "ZImageTransformer2DModel": _z_image,
    "ZImageTransformerBlock": _after_attention(
        "attention", "attention_norm2", "ffn_norm1", "feed_forward", "ffn_norm2"
    ),
}
