"""In whose names a file has a denoiser: diffusers', or those of the network's authors, which diffusers can convert for
some families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

from diffusion_backbones.families import FAMILIES, Architecture
from diffusion_backbones.loading.source import modern_attention
from diffusion_backbones.ops.safetensors_io import TensorFiles

MARK = "model.diffusion_model."
"""What stands before a denoiser's names in whole checkpoints, and in what ComfyUI writes."""
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
OTHER_PARTS = ("first_stage_model.", "vae.", "model_ema.", *TEXT)
"""What stands before the names of other parts there."""

_QKV = r"layers\.\d+\.attention\.qkv\."
ORIGINAL: dict[str, tuple[str, ...]] = {
    "chroma": (r"distilled_guidance_layer\.", r"double_blocks\."),
    "flux2": (r"double_stream_modulation_(img|txt)\.lin\.",),
    "flux": (r"double_blocks\.\d+\.(img|txt)_(attn|mod|mlp)\.",),
    "sd3": (r"joint_blocks\.\d+\.",),
    "auraflow": (r"double_layers\.\d+\.",),
    "sana": (r"blocks\.\d+\.mlp\.(inverted|depth|point)_conv\.",),
    "hunyuan": (r"blocks\.\d+\.attn1\.Wqkv\.",),
    "pixart": (r"blocks\.\d+\.attn\.qkv\.", r"blocks\.\d+\.(cross_attn\.q_linear\.|scale_shift_table)"),
    "dit": (r"blocks\.\d+\.attn\.qkv\.", r"x_embedder\."),
    "z_image": (_QKV, r"layers\.\d+\.adaLN_modulation\.0\."),
    "lumina": (_QKV,),
    "unet": (r"(input_blocks|output_blocks|middle_block)\.\d+\.",),
}
"""Family -> what the names in its authors' files begin with, by which they are told from those of families below."""

STRANGERS = {
    r"double_blocks\.\d+\.(img|txt)_attn_qkv\.|txt_in\.individual_token_refiner": "HunyuanVideo",
    r"(down|up)_blocks\.\d+\.\d+\.channelwise|clip_txt_(pooled_)?mapper": "Stable Cascade",
    r"blocks\.\d+\.(self_attn\.norm_q|cross_attn\.norm_k)|head\.modulation": "Wan",
    r"patchify_proj\.|av_ca_": "LTX-Video",
    r"blocks\.block\d+\.|extra_pos_embedder|net\.x_embedder\.proj\.1\.": "Cosmos",
    r"double_stream_blocks\.\d+\.block": "HiDream",
    r"blocks\.\d+\.attn\.qkv_x\.": "Mochi",
    r"time_stack\.|\.temporal_transformer_blocks\.|time_mixer": "Stable Video Diffusion",
    r"motion_modules\.": "AnimateDiff",
}
"""A name in networks of other kinds -> what they are called."""


def denoiser_names(names: Iterable[str]) -> dict[str, str]:
    """The denoiser's names, without what stands before them -> the names in the file; empty where there is none."""
    names = list(names)
    behind = {name.removeprefix(MARK): name for name in names if name.startswith(MARK)}
    return behind or ({name: name for name in names if not name.startswith(OTHER_PARTS)} if _is_bare(names) else {})


def _is_bare(names: list[str]) -> bool:
    """Whether a denoiser lies at the root of a file: known original names, or a network of any other kind alone."""
    return author(names) is not None or not any(name.startswith(OTHER_PARTS) for name in names)


def author(names: Collection[str]) -> str | None:
    """The family in whose authors' names a denoiser is; None for diffusers' names, and for unknown ones."""
    return next((family for family, marks in ORIGINAL.items() if all(_any(mark, names) for mark in marks)), None)


def stranger(names: Collection[str]) -> str | None:
    """The name of a network of a kind that no family has; None for others."""
    return next((called for mark, called in STRANGERS.items() if any(re.search(mark, name) for name in names)), None)


def named_as_diffusers(names: Collection[str], network: Architecture) -> bool:
    """Whether a denoiser has diffusers' names, by those of its queries, which authors keep in one matrix with keys."""
    owners = {modern_attention(name).rpartition(".")[0] for name in names}
    return any(site.path in owners for site in network.sites() if site.path.endswith("to_q"))


def converter(family: type[Architecture]) -> Callable[..., dict[str, Any]] | None:
    """diffusers' converter from the authors' names of a family; None where diffusers has none."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if family is FAMILIES["unet"] or family.networks[0] != "UNet2DConditionModel":  # DeepFloyd's layout is another one
        found = SINGLE_FILE_LOADABLE_CLASSES.get(family.networks[0])
        return found["checkpoint_mapping_fn"] if found else None
    return None


def is_single_file(files: TensorFiles) -> bool:
    """Whether a file has a denoiser behind :data:`MARK`."""
    return any(name.startswith(MARK) for name in files.shapes)


def _any(pattern: str, names: Collection[str]) -> bool:
    compiled = re.compile(pattern)
    return any(compiled.match(name) for name in names)
