"""In which order the parts of a ``UNet2DConditionModel`` run, and what may stand in for a part that is cut off."""

from __future__ import annotations

import re
from typing import Any

from diffusion_backbones.ops.truncation import REMOVE, Bypass, FirstToken, StandIn, Step, Steps


def _unet(unet: Any) -> list[Step]:
    width = unet.config.get("time_embedding_dim") or 4 * unet.config.block_out_channels[0]
    embedding = StandIn(width, dim=1)
    steps = [Step("conv_in", Bypass()), Step("time_embedding", embedding)]
    if getattr(unet, "add_embedding", None) is not None:
        steps.append(
            Step("add_embedding", FirstToken(width) if unet.config.addition_embed_type == "text" else embedding)
        )
    steps += [Step(f"down_blocks.{i}", REMOVE) for i in range(len(unet.down_blocks))]
    if unet.mid_block is not None:
        steps.append(Step("mid_block", None))
    steps += [Step(f"up_blocks.{i}", REMOVE) for i in range(len(unet.up_blocks))]
    if unet.conv_norm_out is not None:
        steps.append(Step("conv_norm_out", Bypass()))
    return [*steps, Step("conv_out", Bypass())]


def _repeats(block: Any, cut_resnet: object) -> list[Step]:
    transformers = (
        re.search("(?<!Simple)CrossAttn", type(block).__name__) is not None
    )  # return a tuple, layers of attention a tensor
    steps = []
    for i in range(len(block.resnets)):
        steps.append(Step(f"resnets.{i}", cut_resnet))
        if i < len(getattr(block, "attentions", ())):
            steps.append(Step(f"attentions.{i}", Bypass(as_tuple=transformers)))
    return steps


def _down(block: Any) -> list[Step]:
    return _repeats(block, REMOVE) + ([Step("downsamplers", None)] if block.downsamplers is not None else [])


def _up(block: Any) -> list[Step]:
    return _repeats(block, REMOVE) + ([Step("upsamplers", None)] if block.upsamplers is not None else [])


def _mid(block: Any) -> list[Step]:
    return _repeats(block, Bypass())  # attention i runs only if resnet i + 1 is there


def _resnet(resnet: Any) -> list[Step]:
    wide = StandIn(resnet.out_channels, dim=1)
    time = StandIn(resnet.time_emb_proj.out_features, dim=1)
    steps = [
        Step("norm1", Bypass()),
        Step("conv1", wide),
        Step("time_emb_proj", time),
        Step("norm2", Bypass()),
        Step("conv2", Bypass()),
    ]
    return steps + ([Step("conv_shortcut", wide)] if resnet.conv_shortcut is not None else [])


def _transformer(vit: Any) -> list[Step]:
    inner = StandIn(vit.inner_dim, dim=-1 if vit.use_linear_projection else 1)
    blocks = [Step(f"transformer_blocks.{i}", REMOVE) for i in range(len(vit.transformer_blocks))]
    return [Step("norm", Bypass()), Step("proj_in", inner), *blocks, Step("proj_out", Bypass())]


def _block(block: Any) -> list[Step]:
    steps = [Step("norm1", Bypass()), Step("attn1", Bypass())]
    if block.attn2 is not None:
        steps += [Step("norm2", Bypass()), Step("attn2", None)]
    return [*steps, Step("norm3", Bypass()), Step("ff", Bypass())]


def _attention(layer: Any) -> list[Step]:
    """Queries and keys before values, those of the text before the image's; the layer of a transformer has no text of
    its own.
    """
    inner = StandIn(layer.inner_dim, dim=-1)
    added = getattr(layer, "add_k_proj", None) is not None
    text = [Step("norm_cross", None), Step("add_k_proj", inner)] if added else []
    values = [Step("add_v_proj", inner)] if added else []
    return [
        Step("group_norm", None),
        Step("to_q", inner),
        *text,
        Step("to_k", inner),
        *values,
        Step("to_v", inner),
        Step("to_out.0", Bypass()),
    ]


def _feed_forward(ff: Any) -> list[Step]:
    return [Step("net.0", Bypass()), Step("net.2", StandIn(ff.net[2].out_features, dim=-1))]


STEPS: Steps = {
    "UNet2DConditionModel": _unet,
    "UNet2DModel": _unet,
    "AttnDownBlock2D": _down,
    "AttnUpBlock2D": _up,
    "CrossAttnDownBlock2D": _down,
    "DownBlock2D": _down,
    "SimpleCrossAttnDownBlock2D": _down,
    "ResnetDownsampleBlock2D": _down,
    "UNetMidBlock2DCrossAttn": _mid,
    "UNetMidBlock2DSimpleCrossAttn": _mid,
    "UNetMidBlock2D": _mid,
    "CrossAttnUpBlock2D": _up,
    "UpBlock2D": _up,
    "SimpleCrossAttnUpBlock2D": _up,
    "ResnetUpsampleBlock2D": _up,
    "ResnetBlock2D": _resnet,
    "Transformer2DModel": _transformer,
    "BasicTransformerBlock": _block,
    "FeedForward": _feed_forward,
    "Attention": _attention,
}
