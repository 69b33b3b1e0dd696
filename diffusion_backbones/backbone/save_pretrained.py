"""Saving a backbone as the compact folder that :mod:`diffusion_backbones.loading.saved_folder` reads, and the hub."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, StateDictSplit, split_state_dict_into_shards_factory
from torch import Tensor

from diffusion_backbones._version import __version__
from diffusion_backbones.backbone.state import BackboneState
from diffusion_backbones.loading import hub
from diffusion_backbones.loading.saved_folder import CARD, CONFIG, FORMAT, INDEX, LIBRARY, SHARDS, foreign, weight_files
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import atomic, safetensors_io
from diffusion_backbones.reports import backbone_card
from diffusion_backbones.spec.declaration import Declaration, pretrained_cfg
from diffusion_backbones.spec.discard import by_activation
from diffusion_backbones.spec.input_format import SYMMETRIC
from diffusion_backbones.spec.recipe import Level
from diffusion_backbones.surgery import constant_folding
from diffusion_backbones.surgery.trainable import merged_state

log = logging.getLogger(__name__)

UNDECLARED, LOCAL, ORIGIN = "my_", "local", "_name_or_path"
"""The names of checkpoints that nobody declared begin with the first. The second stands for a path on this machine.
diffusers writes under the third key where it read a config."""


def save(backbone: BackboneState, place: str | Path, max_shard_size: int | str) -> Path:
    """Write the compact folder. Every file appears whole or not at all, ``config.json`` last, so that a folder that has
    it is whole. Nothing changes in the folder before all files are written beside their places. A card of something
    else stays.

    Raises:
        ValueError: The backbone has no weights, being on ``meta``, or only rounded ones; or ``max_shard_size`` is not a
            size, or the place is empty.
        FileExistsError: The folder holds the config or the weights of something else.
        OSError: The folder cannot be written.
    """
    if not os.fspath(place):
        raise ValueError("the folder to save in is empty; name one, or '.' for this one")
    folder = Path(place)
    check_whole(backbone)
    card_of_others = check_free(folder)
    state = {name: tensor for name, tensor in merged_state(backbone).items() if name != "canvas"}  # its seed says it
    split = split_state(state, max_shard_size)
    declaration = kept(backbone)
    for_timm = {
        "architecture": declaration.architecture,
        "pretrained_cfg": pretrained_cfg(declaration, backbone.input_format),
    }
    texts = {
        CONFIG: _json({**describe(backbone), **for_timm}),
        CARD: backbone_card.card(declaration, backbone.configs),
    }
    if card_of_others:
        del texts[CARD]
    if split.is_sharded:
        about = {"metadata": {**split.metadata, "library_name": LIBRARY}, "weight_map": split.tensor_to_filename}
        texts[INDEX] = _json(about)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, texts, split.filename_to_tensors, state)
    return folder


def check_whole(backbone: BackboneState) -> None:
    """Raise ``ValueError`` for a backbone without weights, or with rounded ones."""
    if any(p.is_meta for p in backbone.parameters()):
        raise ValueError(
            f"{backbone.declaration.name} is on the meta device and has no weights to save; build it on another"
        )
    if getattr(backbone, "weight_dtype", None):  # no network of timm has one
        raise ValueError(
            f"{backbone.declaration.name} was made with weight_dtype={backbone.weight_dtype!r} and has rounded "
            "weights; a folder holds whole ones. Save it "
            f"without, and give weight_dtype={backbone.weight_dtype!r} to create_model when it is loaded: weights are "
            "rounded one by one as they are read"
        )


def check_free(folder: Path) -> bool:
    """Check that nothing of others would be replaced. Returns whether there is a card of others, which stays.

    Raises:
        FileExistsError: There is a config, or weights, or a file in the place of the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, and a folder is needed to save in; give another place")
    others = foreign(Folder(folder)) if folder.exists() else set()
    if blocking := sorted(others - {CARD}):
        raise FileExistsError(
            f"{folder} holds {' and '.join(blocking)} of something else, which would be lost; save in another folder"
        )
    if others:
        log.warning("%s is not one of save_pretrained's and stays; no card is written", folder / CARD)
    return bool(others)


def split_state(state: Mapping[str, Tensor], max_shard_size: int | str) -> StateDictSplit:
    """Which tensors go to which file. Those that share memory are counted, and written, each by itself.

    Raises:
        ValueError: ``max_shard_size`` is no size.
    """
    try:
        if not isinstance(max_shard_size, str) and max_shard_size < 1:
            raise ValueError
        return split_state_dict_into_shards_factory(
            dict(state),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=SHARDS,
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ValueError(
            f"max_shard_size must be a number of bytes, or a string such as '5GB' or '500MB', got {max_shard_size!r}"
        ) from error


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2) + "\n"


def _write(
    folder: Path, texts: Mapping[str, str], weights: Mapping[str, list[str]], state: Mapping[str, Tensor]
) -> None:
    """Write every file beside its place, then exchange old for new: first the config goes, by which a folder is known
    as whole, and the weights of an earlier save; then files take their places in reverse order, the config as the last.
    """
    with ExitStack() as stack:
        names = [CONFIG, *({CARD} & texts.keys()), *weights, *texts.keys() - {CONFIG, CARD}]
        parts = {name: stack.enter_context(atomic.replacing(folder / name)) for name in names}
        for name, text in texts.items():
            parts[name].write_text(text, encoding="utf-8")
        for name, tensors in weights.items():
            of_file = {tensor: state[tensor] for tensor in tensors}
            safetensors_io.write_part(parts[name], folder / name, of_file, {"format": "pt"})
        old = weight_files(Folder(folder)) - parts.keys()
        (folder / CONFIG).unlink(missing_ok=True)
        for name in sorted(old):  # shards first, and then their index: what an interruption leaves is still listed
            (folder / name).unlink(missing_ok=True)


def kept(backbone: BackboneState) -> Declaration:
    """The declaration, with the levels that the backbone still has, and without the name and the path of a local folder
    that nobody declared: what is saved may be published.
    """
    declaration = backbone.declaration
    levels = tuple(Level(tuple(site.id for site in level.sites)) for level in backbone.levels)
    ids = {name for level in levels for name in level.activations}
    dropped = declaration.recipe.discard
    if each := by_activation(dropped):
        dropped = tuple((name, channels) for name, channels in each.items() if name in ids)
    name, checkpoint = declaration.name, declaration.checkpoint
    recipe = declaration.recipe.override(levels=levels, discard=dropped)
    if checkpoint.name.startswith(UNDECLARED) and not checkpoint.hub_id:
        checkpoint = replace(checkpoint, name=f"{UNDECLARED}{checkpoint.family}", title="a checkpoint of one's own")
        name = f"{checkpoint.name}_{recipe.name}"
    return Declaration(name, checkpoint, recipe)


def _without_paths(backbone: BackboneState) -> dict[str, Any]:
    """Provenance and configs as they are saved: a path on this machine says nothing to others, and too much."""
    configs = {
        name: config and {key: value for key, value in config.items() if key != ORIGIN or _is_repository(value)}
        for name, config in backbone.configs.items()
    }
    here = {key: LOCAL for key in backbone.provenance if key == "path" or key.endswith("_path")}
    return {"configs": configs, "provenance": backbone.provenance | here}


def _is_repository(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value))


def describe(backbone: BackboneState) -> dict[str, Any]:
    """What ``config.json`` holds, but for what timm reads there."""
    import diffusers  # heavy

    declaration, folded = kept(backbone), constant_folding.describe(backbone.denoiser)
    return {
        "library_name": LIBRARY,
        "format": FORMAT,
        "name": declaration.name,
        "checkpoint": asdict(declaration.checkpoint),
        "recipe": declaration.recipe.to_dict(),
        "out_strides": backbone.out_strides,
        **({"input_format": backbone.input_format._asdict()} if backbone.input_format != SYMMETRIC else {}),
        **({"folded": folded} if folded else {}),
        **_without_paths(backbone),
        "versions": {
            "diffusion_backbones": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


def push(
    backbone: Any,
    repo_id: str,
    *,
    private: bool | None,
    commit_message: str,
    token: str | bool | None,
    revision: str | None,
    create_pr: bool,
    max_shard_size: int | str,
) -> str:
    """Upload the compact folder in one commit, which also removes the weights of an earlier save that it does not
    replace. Returns the URL of the repository, or of the pull request.

    Raises:
        ConnectionError: The hub cannot be reached, or does not let this token write there.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        new = {path.name for path in backbone.save_pretrained(folder, max_shard_size=max_shard_size).iterdir()}
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            if revision and not revision.startswith("refs/"):
                api.create_branch(url.repo_id, branch=revision, exist_ok=True)
            with hub.access(token):
                old = weight_files(hub.HubRepo(url.repo_id, revision or "main"))
            commit = api.upload_folder(
                repo_id=url.repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=sorted(old - new) or None,
            )
        except hub.ERRORS as error:
            raise ConnectionError(f"nothing was uploaded: {hub.explain(repo_id, revision or 'main', error)}") from error
    return commit.pr_url or str(url)


def load(
    place: str | Path, *, revision: str | None, token: str | bool | None, local_files_only: bool, **keywords: Any
) -> Any:
    """The backbone of a saved folder or a repository; see ``DiffusionBackbone.from_pretrained``."""
    import diffusion_backbones as db  # what builds is above this room, and public

    if Path(place).expanduser().is_dir():
        if revision is not None:
            raise TypeError(f"revision={revision!r} is for repositories on the hub, and {place} is a folder")
        return db.create_model(f"local-dir:{place}", **keywords)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", str(place)) or isinstance(place, Path):
        raise FileNotFoundError(
            f"{str(place)!r} is neither a folder nor 'owner/repo' on the hub. Registered backbones are built by name: "
            "create_model(name, pretrained=True)."
        )
    with hub.access(token, local_files_only):
        return db.create_model(f"hf-hub:{place}" + (f"@{revision}" if revision else ""), **keywords)
