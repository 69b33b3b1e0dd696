"""What a ``.safetensors`` file or a folder is that is no checkpoint, by the names of its tensors or files, and what to
do with it. Files of other formats are told apart in :mod:`diffusion_backbones.ops.file_formats`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from diffusion_backbones.families import FAMILIES
from diffusion_backbones.loading import layouts
from diffusion_backbones.ops.file_formats import PICKLE_REFUSED, PICKLES

if TYPE_CHECKING:
    from diffusion_backbones.loading.source import Folder

Shapes = Mapping[str, tuple[int, ...]]

_FUSE = (
    "which changes the weights of a checkpoint; put it in once with diffusers (load_lora_weights, fuse_lora, "
    "unload_lora_weights, save_pretrained), and give the folder that it writes"
)
_IN_FOLDER = (
    "and a checkpoint needs a denoiser; to use it with one, put it and its config.json in a folder as {place}, and "
    "give the folder as checkpoint_path= beside a whole checkpoint ('local-dir:' or 'hf-hub:'), or with pretrained=True"
)
_BESIDE = (
    "which steers a network from beside and has no features of its own here; give the checkpoint that it belongs to"
)
_WHOLE = "give a file with the weights as they were before"


class Kind(NamedTuple):
    """A kind of file.

    Args:
        what: What it is.
        todo: What to do, as the rest of the sentence.
        some: A name that it has, as a regular expression that may match anywhere.
        only: What all its names begin with, as a regular expression.
    """

    what: str
    todo: str
    some: str = ""
    only: str = ""

    def fits(self, names: Collection[str]) -> bool:
        """Whether names are those of such a file."""
        some, only = re.compile(self.some), re.compile(self.only)
        return any(some.search(name) for name in names) and all(only.match(name) for name in names)


_SAVED = "diffusion_backbones' own weights, as save_pretrained writes them"
KINDS = (
    Kind(
        _SAVED,
        "give the folder that they are in, which also holds config.json",
        r"^denoiser\.",
        r"(denoiser|encoder|conditioning)\.",
    ),
    Kind("a LoRA in kohya's names", _FUSE, r"^lora_(unet|te\d?|transformer|prior)_|^lycoris_"),
    Kind(
        "a LoRA or another adapter",
        _FUSE,
        r"lora[._]?(A|B|down|up|E|magnitude|embedding)|\.lora\.|[._](hada|lokr|glora|oft)_|\.oft\.",
    ),
    Kind("a LoRA or another adapter", _FUSE, r"\.(diff|diff_b|dora_scale|ia3_l)$"),
    Kind(
        "weights that bitsandbytes quantized",
        _WHOLE,
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$|\.quant_state\.",
    ),
    Kind("weights that GPTQ or AWQ quantized", _WHOLE, r"\.(qweight|qzeros|g_idx)$"),
    Kind("weights that Nunchaku (SVDQuant) quantized", _WHOLE, r"\.(wscales|wtscale|wcscales|smooth_factor)$"),
    Kind("scaled float8 weights", _WHOLE, r"(^|\.)scaled_fp8$|\.(scale_weight|scale_input|weight_scale|input_scale)$"),
    Kind(
        "averaged (EMA) weights alone, whose names have lost their dots",
        "give the file with the weights themselves, or save the average in the diffusers layout",
        r"^model_ema\.",
        r"(?!model\.diffusion_model\.)",
    ),
    Kind("a ControlNet", _BESIDE, r"^(input_hint_block|zero_convs|middle_block_out)\."),
)
"""Kinds of files that are no checkpoint, by what no checkpoint has, in the order in which they are tried."""

PARTS = (
    Kind(
        "a ControlNet",
        _BESIDE,
        r"^(control_model|control_net|controlnet)\.|^controlnet_|^control_(all|layers|blocks)",
    ),
    Kind("an IP-Adapter", _BESIDE, r"^ip_adapter\.|^image_proj\."),
    Kind("a T2I-Adapter", _BESIDE, r"^adapter\.(body|conv_in|total)|^body\.\d+\.(in_conv|block1|resnets)"),
    Kind("a motion module of AnimateDiff", _BESIDE, "", r".*motion_modules\.|animatediff_config"),
    Kind(
        "a safety checker",
        "which looks at finished pictures; give the checkpoint that it belongs to",
        r"^(concept_embeds|special_care_embeds)",
    ),
    Kind(
        "a text encoder (T5)",
        _IN_FOLDER.format(place="text_encoder/model.safetensors"),
        r"(encoder|decoder)\.block\.\d+\.layer\.\d+",
    ),
    Kind(
        "a text encoder (CLIP)",
        _IN_FOLDER.format(place="text_encoder/model.safetensors"),
        r"encoder\.layers\.\d+\.self_attn\.|transformer\.resblocks\.\d+\.",
    ),
    Kind(
        "a language model",
        _IN_FOLDER.format(place="text_encoder/model.safetensors"),
        r"layers\.\d+\.(self_attn|mlp)\.(q_proj|gate_proj|up_proj)|^lm_head\.|encoder\.layer\.\d+\.attention\.self\.",
    ),
    Kind(
        "an image encoder (VAE) alone",
        _IN_FOLDER.format(place="vae/diffusion_pytorch_model.safetensors") + "; it must have diffusers' names there",
        r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.",
        r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv|post_quant_conv|bn|loss|conv1|conv2|quantize|taesd_)",
    ),
    Kind(
        "the state of an optimizer",
        "give the folder that the training script wrote beside it, which holds unet/ or transformer/",
        r"exp_avg|^(optimizer|param_groups|lr_scheduler)(\.|$)",
    ),
)
"""The same by what whole checkpoints may hold too, beside a denoiser."""

_WRAPPERS = (
    r"(module|_orig_mod|state_dict|model|model_state_dict|diffusion_model|net|network|unet|transformer|denoiser|"
    r"ema|ema_model|params)"
)
_DIFFUSERS = (
    r"(down_blocks|up_blocks|mid_block|conv_in|time_embedding|transformer_blocks|single_transformer_blocks|"
    r"joint_transformer_blocks|x_embedder|pos_embed|context_embedder|time_text_embed)\."
)


def what_a_file_is(path: Path, shapes: Shapes) -> str | None:
    """What a file is and what to do with it, as the rest of a sentence that begins with its path; None where it may be
    a checkpoint or a denoiser.

    Args:
        path: Its path, whose name says whether it is a shard.
        shapes: Name -> shape of its tensors, as they are stored.
    """
    if not shapes:
        return "is a safetensors file without any tensors; download or write it again"
    shard = re.search(r"-0*(\d+)-of-0*(\d+)$", path.stem)
    if shard and int(shard[2]) > 1:
        return (
            f"is shard {shard[1]} of {shard[2]}; give the folder that it is in, {path.parent}, with all shards and "
            "their index"
        )
    whole = any(name.startswith(layouts.MARK) for name in shapes) or layouts.author(shapes) is not None
    kinds = (*KINDS, *(() if whole else PARTS))
    if kind := next((kind for kind in kinds if kind.fits(shapes)), None):
        return (
            f"is {kind.what}, {kind.todo}" if kind.todo.startswith(("which", "and")) else f"is {kind.what}; {kind.todo}"
        )
    if _is_refiner(shapes):
        return (
            "is SDXL's refiner, which takes an aesthetic score and has one text encoder, and is not read; give the "
            "base network"
        )
    if _is_textual_inversion(shapes):
        return (
            "is a textual inversion, which adds words to a text encoder; load it with diffusers "
            "(load_textual_inversion), encode the prompt there, and give a call prompt_embeds="
        )
    if (wrapper := _wrapper(shapes)) and not whole:
        return (
            f"is a state dict inside another: all its names begin with {wrapper!r}. Write it without that, once: "
            f"`save_file({{k.removeprefix({wrapper!r}): t for k, t in load_file(path).items()}}, 'out.safetensors')` "
            "of safetensors.torch"
        )
    return None


def _is_refiner(names: Collection[str]) -> bool:
    """Whether a whole checkpoint has what SDXL adds to the timestep, and one text encoder, of OpenCLIP."""
    parts = (f"{layouts.MARK}label_emb.", "conditioner.embedders.0.model.", "conditioner.embedders.1.")
    label, first, second = (any(name.startswith(part) for name in names) for part in parts)
    return label and first and not second


def _is_textual_inversion(shapes: Shapes) -> bool:
    known = {"emb_params", "clip_l", "clip_g", "t5", "text_encoders_0", "text_encoders_1"}
    few = len(shapes) <= 4 and all("." not in name and len(shape) in (1, 2) for name, shape in shapes.items())
    learned = all(name in known or (name.startswith("<") and name.endswith(">")) for name in shapes)
    return (few and learned) or any(name.startswith("string_to_param") for name in shapes)


def _wrapper(shapes: Shapes) -> str:
    """What all names begin with that a denoiser's names lack; empty where there is no such thing."""
    found = re.match(rf"({_WRAPPERS}\.)+", next(iter(shapes)))
    prefix = found[0] if found else ""
    if not prefix or not all(name.startswith(prefix) for name in shapes):
        return ""
    bare = [name.removeprefix(prefix) for name in shapes]
    return prefix if layouts.author(bare) or any(re.match(_DIFFUSERS, name) for name in bare) else ""


def what_a_folder_is(folder: Folder) -> str:
    """What a folder is that holds no part of a checkpoint, and what to do, as the rest of a sentence that begins with
    its path.
    """
    names = set(folder.names())
    if "config.json" in names:
        config = folder.json("config.json")
        called = config.get("_class_name") or ", ".join(config.get("architectures") or ()) or "an unknown network"
        return (
            f"is the folder of {called} alone, {_IN_FOLDER.format(place='a sub-folder such as vae/ or text_encoder/')}"
            if re.search("Autoencoder|Text|CLIP|T5", called)
            else f"is the folder of {called}, which is not read here; give the checkpoint that it belongs to"
        )
    if not names:
        return "is empty"
    if names & {"pytorch_lora_weights.safetensors", "adapter_config.json"}:
        return f"is the folder of a LoRA, {_FUSE}"
    if below := _checkpoint_below(folder.path):
        return f"holds a checkpoint in a folder below it; give {below}"
    here = sorted(name for name in names if "/" not in name)
    if files := [name for name in here if name.endswith((".safetensors", ".sft"))]:
        return f"is no folder in the diffusers layout, but holds {', '.join(files[:3])}; give that file"
    if pickles := [name for name in here if name.endswith(PICKLES)]:
        return f"holds {pickles[0]}, which {PICKLE_REFUSED}"
    return f"is no folder in the diffusers layout, with unet/config.json and so on; it holds {folder.held()}"


def _checkpoint_below(path: Path) -> Path | None:
    """The first folder in the diffusers layout below another, also where huggingface_hub's cache has it."""
    denoisers = {family.denoiser for family in FAMILIES.values()}
    for depth in ("*", "snapshots/*"):
        for denoiser in sorted(denoisers):
            for config in sorted(path.glob(f"{depth}/{denoiser}/config.json")):
                return config.parent.parent
    return None
