"""In which order the parts of a ``UNet2DConditionModel`` run, and what may stand in for a part that is cut off."""

from __future__ import annotations

import re
from typing import Any

from diffusion_backbones.families.blocks import attention, feed_forward, transformer_block
from diffusion_backbones.ops.execution_order import (
    BYPASS,
    BYPASS_AS_TUPLE,
    NONE,
    REMOVE,
    Drop,
    ExecutionOrder,
    Step,
    first_token,
    numbered,
    stand_in,
)


def _unet(unet: Any) -> list[Step]:
    width = unet.config.get("time_embedding_dim") or 4 * unet.config.block_out_channels[0]
    embedding = stand_in(width, dim=1)
    steps = [Step("conv_in", BYPASS), Step("time_embedding", embedding)]
    if getattr(unet, "add_embedding", None) is not None:
        steps.append(
            Step("add_embedding", first_token(width) if unet.config.addition_embed_type == "text" else embedding)
        )
    steps += numbered(unet, "down_blocks")
    if unet.mid_block is not None:
        steps.append(Step("mid_block", NONE))
    steps += numbered(unet, "up_blocks")
    if unet.conv_norm_out is not None:
        steps.append(Step("conv_norm_out", BYPASS))
    return [*steps, Step("conv_out", BYPASS)]


def _repeats(block: Any, cut_resnet: Drop) -> list[Step]:
    transformers = (
        re.search("(?<!Simple)CrossAttn", type(block).__name__) is not None
    )  # return a tuple, layers of attention a tensor
    steps = []
    for i in range(len(block.resnets)):
        steps.append(Step(f"resnets.{i}", cut_resnet))
        if i < len(getattr(block, "attentions", ())):
            steps.append(Step(f"attentions.{i}", BYPASS_AS_TUPLE if transformers else BYPASS))
    return steps


def _down(block: Any) -> list[Step]:
    return _repeats(block, REMOVE) + ([Step("downsamplers", NONE)] if block.downsamplers is not None else [])


def _up(block: Any) -> list[Step]:
    return _repeats(block, REMOVE) + ([Step("upsamplers", NONE)] if block.upsamplers is not None else [])


def _mid(block: Any) -> list[Step]:
    return _repeats(block, BYPASS)  # attention i runs only if resnet i + 1 is there


def _resnet(resnet: Any) -> list[Step]:
    wide = stand_in(resnet.out_channels, dim=1)
    time = stand_in(resnet.time_emb_proj.out_features, dim=1)
    steps = [
        Step("norm1", BYPASS),
        Step("conv1", wide),
        Step("time_emb_proj", time),
        Step("norm2", BYPASS),
        Step("conv2", BYPASS),
    ]
    return steps + ([Step("conv_shortcut", wide)] if resnet.conv_shortcut is not None else [])


def _transformer(vit: Any) -> list[Step]:
    inner = stand_in(vit.inner_dim, dim=-1 if vit.use_linear_projection else 1)
    blocks = [Step(f"transformer_blocks.{i}", REMOVE) for i in range(len(vit.transformer_blocks))]
    return [Step("norm", BYPASS), Step("proj_in", inner), *blocks, Step("proj_out", BYPASS)]


ORDER = ExecutionOrder(
    {
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
        "BasicTransformerBlock": transformer_block,
        "FeedForward": feed_forward,
        "Attention": attention,
    }
)
