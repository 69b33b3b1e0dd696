"""Tiny checkpoints as single files in the original layouts, from their diffusers folders.

How CompVis' and Stability's repositories name things, written down here independently of any converter.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write(checkpoint: str, folder: Path, path: Path) -> Path:
    """Write ``sd15``, ``sd21`` or ``sdxl`` as one file."""
    part = {p.parent.name: load_file(p) for p in folder.glob("*/*.safetensors")}
    state = unet(part["unet"]) | vae(part["vae"])
    if checkpoint == "sd15":
        state |= clip(part["text_encoder"], "cond_stage_model.transformer.")
    elif checkpoint == "sd21":
        state |= open_clip(part["text_encoder"], "cond_stage_model.model.", beyond=True)
    else:
        state |= clip(part["text_encoder"], "conditioner.embedders.0.transformer.")
        state |= open_clip(part["text_encoder_2"], "conditioner.embedders.1.model.")
    state |= {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000)}  # schedules, which such files hold too
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def unet(state: State) -> State:
    """Three input blocks a level (two residual blocks and the downsampler), three output blocks a level."""
    attended = {name.split(".")[1] for name in state if name.startswith("up_blocks.") and ".attentions." in name}

    def name(new: str) -> str:
        if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", new):
            side, level, kind, repeat, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
            if side == "down":
                at = f"input_blocks.{1 + 3 * level + repeat}"
                sampler = f"input_blocks.{3 * level + 3}.0.op.{rest.removeprefix('conv.')}"
            else:
                at = f"output_blocks.{3 * level + repeat}"
                sampler = f"output_blocks.{3 * level + 2}.{2 if found[2] in attended else 1}.{rest}"
            new = {"resnets": f"{at}.0.{rest}", "attentions": f"{at}.1.{rest}"}.get(kind, sampler)
        for now, then in UNET.items():
            if new.startswith(now + "."):
                new = then + new.removeprefix(now)
                break
        if not re.search(r"transformer_blocks|input_blocks\.0\.0|^out\.", new):
            for now, then in RESNET.items():
                new = re.sub(rf"\.{now}\.(?=weight|bias)", f".{then}.", new)
        return "model.diffusion_model." + new

    return {name(new): tensor for new, tensor in state.items()}


def vae(state: State) -> State:
    """Attention is made of 1 x 1 convolutions, and the decoder's levels are counted from the coarse end."""
    out: State = {}
    for new, tensor in state.items():
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", new)
        name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
        name = re.sub(r"decoder\.up_blocks\.(\d+)\.resnets", lambda m: f"decoder.up.{3 - int(m[1])}.block", name)
        name = re.sub(
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"decoder.up.{3 - int(m[1])}.upsample", name
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attentions.0." in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for now, then in VAE_ATTENTION.items():
                name = name.replace(f".{now}.", f".{then}.")
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        out["first_stage_model." + name] = tensor
    return out


def clip(state: State, prefix: str) -> State:
    out = {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    return out | {f"{prefix}text_model.embeddings.position_ids": torch.arange(77)[None]}


def open_clip(state: State, prefix: str, beyond: bool = False) -> State:
    """Queries, keys and values are one matrix, the projection is transposed, and SD 2.x's file has one block more than
    it uses.
    """
    out: State = {"logit_scale": torch.tensor(4.6)}
    state = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif ".q_proj." in name:
            fused = torch.cat([state[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")])
            out[_open_clip(name).replace("self_attn.q_proj.", "attn.in_proj_")] = fused
        elif not re.search(r"\.[kv]_proj\.", name):
            out[_open_clip(name)] = tensor
    if beyond:
        last = max(int(name.split(".")[2]) for name in out if name.startswith("transformer."))
        out |= {
            name.replace(f"resblocks.{last}.", f"resblocks.{last + 1}."): t + 1
            for name, t in out.items()
            if f"resblocks.{last}." in name
        }
        width = len(state["final_layer_norm.weight"])
        out["text_projection"] = torch.zeros(width, width)
    return {prefix + name: tensor for name, tensor in out.items()}


def _open_clip(name: str) -> str:
    for now, then in OPEN_CLIP.items():
        name = name.replace(now, then)
    return name
