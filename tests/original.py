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


SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_FUSED = {
    ("attn.to_q", "attn.to_k", "attn.to_v"): "x_block.attn.qkv",
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"): "context_block.attn.qkv",
    ("attn2.to_q", "attn2.to_k", "attn2.to_v"): "x_block.attn2.qkv",
}
Z_IMAGE = {"all_x_embedder.2-1.": "x_embedder.", "all_final_layer.2-1.": "final_layer."}


def sd3(state: State) -> State:
    """Queries, keys and values are one matrix, and what closes a stream has shift before scale."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    out: State = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        swapped = path in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")
        tensor = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor
        if found := re.match(r"transformer_blocks\.(\d+)\.(.+)", path):
            block = f"transformer_blocks.{found[1]}."
            fused = next((parts for parts in SD3_FUSED if found[2] in parts), None)
            if fused and found[2] != fused[0]:
                continue
            if fused:
                tensor = torch.cat([state[f"{block}{part}.{leaf}"] for part in fused])
            out[f"joint_blocks.{found[1]}.{SD3_FUSED[fused] if fused else SD3_BLOCK[found[2]]}.{leaf}"] = tensor
        else:
            out[SD3.get(name) or f"{SD3.get(path, path)}.{leaf}"] = tensor
    return out


def z_image(state: State) -> State:
    """Queries, keys and values are one matrix; the embedders of one size of patch have no number."""
    out: State = {}
    for name, tensor in state.items():
        if re.search(r"attention\.to_[kv]\.", name):
            continue
        if ".attention.to_q." in name:
            tensor = torch.cat([state[name.replace("to_q", f"to_{which}")] for which in "qkv"])
        for now, then in Z_IMAGE.items():
            name = name.replace(now, then)
        name = name.replace("attention.to_q.", "attention.qkv.").replace("attention.to_out.0.", "attention.out.")
        out[
            name.replace("attention.norm_q.", "attention.q_norm.").replace("attention.norm_k.", "attention.k_norm.")
        ] = tensor
    return out
