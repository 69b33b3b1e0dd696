"""The folder of a fusion: a folder for every diffusion backbone as its own ``save_pretrained`` writes it, and beside
them the tensors of timm's members and the principal components, the card, and ``config.json``, which is written last.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones._version import __version__
from diffusion_backbones.backbone.contract import Backbone
from diffusion_backbones.backbone.fusion.state import FusionState
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.backbone.save_pretrained import check_free, check_whole, describe, split_state
from diffusion_backbones.loading.saved_folder import CARD, CONFIG, FORMAT, LIBRARY, WEIGHTS, weight_files
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import atomic, safetensors_io
from diffusion_backbones.reports import fusion_card
from diffusion_backbones.spec.input_format import SYMMETRIC


def save(fusion: FusionState, place: str | Path, max_shard_size: int | str) -> Path:
    """Write a fusion's folder; errors as for :func:`diffusion_backbones.backbone.save_pretrained.save`."""
    if not os.fspath(place):
        raise ValueError("the folder to save in is empty; name one, or '.' for this one")
    folder = Path(place)
    card_of_others = check_free(folder)
    _check_members(fusion, folder, max_shard_size)
    old = weight_files(Folder(folder)) if folder.exists() else set()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)  # from here on, and until it is written anew, the folder is not whole
    for i, member in enumerate(fusion.members):
        if isinstance(member, DiffusionBackbone):
            member.save_pretrained(folder / member_folder(i), max_shard_size=max_shard_size)
    if state := own_tensors(fusion):
        with atomic.replacing(folder / WEIGHTS) as part:
            safetensors_io.write_part(part, folder / WEIGHTS, state, {"format": "pt"})
    for name in sorted(old - ({WEIGHTS} if state else set())):
        (folder / name).unlink(missing_ok=True)
    if not card_of_others:
        atomic.write_text(folder / CARD, fusion_card.card(fusion.declaration, fusion.levels, saved=True))
    atomic.write_text(folder / CONFIG, json.dumps(config(fusion), indent=2) + "\n")
    return folder


def _check_members(fusion: FusionState, folder: Path, max_shard_size: int | str) -> None:
    """Check all that can be said before anything changes in the folder, as ``save_pretrained`` of each member would."""
    split_state({}, max_shard_size)
    for i, member in enumerate(fusion.members):
        check_whole(member)  # type: ignore[arg-type]
        if isinstance(member, DiffusionBackbone):
            check_free(folder / member_folder(i))


def member_folder(i: int) -> str:
    """Where a diffusion backbone lies in a fusion's folder."""
    return f"member{i}"


def own_tensors(fusion: FusionState) -> dict[str, Tensor]:
    """The tensors of a fusion that are in none of its diffusion backbones."""
    theirs = tuple(f"members.{i}." for i, member in enumerate(fusion.members) if isinstance(member, DiffusionBackbone))
    return {name: t for name, t in fusion.state_dict().items() if not (theirs and name.startswith(theirs))}


def config(fusion: FusionState) -> dict[str, Any]:
    """What ``config.json`` holds."""
    formats = {} if fusion.input_format == SYMMETRIC else {"input_format": fusion.input_format._asdict()}
    return {
        "library_name": LIBRARY,
        "format": FORMAT,
        "fusion": fusion.declaration.described(),
        "out_strides": fusion.out_strides,
        **formats,
        "architecture": fusion.declaration.name,
        "pretrained_cfg": fusion.pretrained_cfg,
        "versions": {"diffusion_backbones": __version__, "torch": torch.__version__},
    }


def describe_whole(backbone: Backbone) -> dict[str, Any]:
    """A backbone or a fusion without its weights; a fusion with its members' descriptions, None for those of timm."""
    if not isinstance(backbone, FusionState):
        return describe(backbone)  # type: ignore[arg-type]  # the other kind
    members = [describe(member) if isinstance(member, DiffusionBackbone) else None for member in backbone.members]
    return {
        **config(backbone),
        "levels": [level.stride for level in backbone.levels],
        "members": members,
        "trainable": [bool(member.trainable) for member in backbone.members],
    }
