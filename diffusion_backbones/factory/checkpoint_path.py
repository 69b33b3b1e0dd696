"""``create_model(checkpoint_path=)``: a path becomes a source, completed by the checkpoint that it is given beside."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_backbones.families import FAMILIES, Architecture, upstream
from diffusion_backbones.loading import layouts
from diffusion_backbones.loading.completed import Completed, components
from diffusion_backbones.loading.single_file import SingleFile
from diffusion_backbones.loading.source import Folder, Source
from diffusion_backbones.loading.what_it_is import what_a_folder_is
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Configs, package_configs

log = logging.getLogger(__name__)

_HUB = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)(?:/(?:blob|resolve)/[^/]+/([^?]+))?"
)


def local_path(given: Any) -> Path:
    """A path as it was given, checked to be one of this machine.

    Raises:
        FileNotFoundError: Nothing is there.
        TypeError: It is no path, such as a list of shards.
        ValueError: It is an address.
    """
    if isinstance(given, (list, tuple)):
        raise TypeError(
            f"checkpoint_path is one path, got {len(given)}; shards are read from the folder that holds them and their "
            "index"
        )
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"checkpoint_path must be the path of a folder or a .safetensors file, got {given!r}")
    text = os.fspath(given)
    if re.match(r"[a-z][a-z0-9+.-]+:/", text):
        raise ValueError(f"checkpoint_path={text!r} is an address, and a local path is needed. {from_address(text)}")
    if text.startswith(("hf-hub:", "local-dir:")):
        raise ValueError(
            f"checkpoint_path={text!r} is a name; give it as the first argument, with recipe=, or give a local path"
        )
    path = Path(text).expanduser()
    if not path.exists():
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.suffix
        hint = (
            f". For the repository of that name on the hub use 'hf-hub:{text}' as the name, with recipe="
            if is_id
            else ""
        )
        raise FileNotFoundError(f"{path} does not exist{hint}")
    return path


def from_address(text: str) -> str:
    """How to use what lies at an address, as a sentence."""
    found = _HUB.match(text)
    if not found:
        return "Download it, and give the path of the .safetensors file."
    repo, file = found[1], found[2]
    if file:
        return f"`hf download {repo} {file}` downloads it and prints its path."
    return f"The name 'hf-hub:{repo}' reads the repository, with recipe=."


def open_path(
    path: Path, checkpoint: Checkpoint, base: Source | None, published: Callable[[], Source] | None
) -> Source:
    """The source of a path, with what it lacks from a base.

    Args:
        path: A folder or a file.
        checkpoint: What was asked for.
        base: Where its weights are already; None for a registered name.
        published: Opens the published checkpoint; None where that is not allowed.

    Raises:
        ConnectionError: The published checkpoint is needed and cannot be opened.
        FileNotFoundError: It holds nothing of a checkpoint.
        ValueError: It is something else, or of another architecture.
    """
    opened = _open_folder if path.is_dir() else _open_file
    part, lacks = opened(path, checkpoint, base)
    if lacks and not base and published:
        base = published()
        part, lacks = opened(path, checkpoint, base)
    family = FAMILIES[checkpoint.family]
    source = Completed(part, family, base, lacks, checkpoint.hub_id) if lacks else part
    if isinstance(part, SingleFile):  # before it is said what another file would lack
        network = _network(checkpoint, source.configs(family), source)
        part.check_sizes(network, checkpoint.name, widths=bool(base or not lacks))
    return source


def _open_file(path: Path, checkpoint: Checkpoint, base: Source | None) -> tuple[SingleFile, list[str]]:
    family = FAMILIES[checkpoint.family]
    network = _network(checkpoint, base.configs(family) if base else package_configs(checkpoint), base or path)
    file = SingleFile(path, network.configs)
    if base and any(name.startswith(layouts.TEXT) for name in file.names()):
        texts = {name: base.text_config(name) for name in network.text_encoders}
        file = SingleFile(path, {**network.configs, **texts})
    file.check(network, checkpoint.name)
    return file, [name for name in components(network) if not file.has(name)]


def _open_folder(path: Path, checkpoint: Checkpoint, base: Source | None) -> tuple[Folder, list[str]]:
    family, folder = FAMILIES[checkpoint.family], Folder(path)
    _check_folder(folder, family, checkpoint.name)
    own = folder.over({}, family)
    needed = [family.denoiser, *([family.encoder] if family.encoder else [])]
    configs = {**(base.configs(family) if base else {}), **own}
    if family.denoiser in configs:
        whole = all(name in configs for name in (*needed, "scheduler"))
        needed = components(_network(checkpoint, configs, folder) if whole else family(configs, checkpoint.name))
    return folder, [name for name in needed if not folder.has(name)] + ["scheduler"] * ("scheduler" not in own)


def _check_folder(folder: Folder, family: type[Architecture], wanted: str) -> None:
    """Raise if a folder holds nothing of a checkpoint, or the denoiser of another kind."""
    parts = (family.denoiser, family.encoder or family.denoiser, "text_encoder", "text_encoder_2", "text_encoder_3")
    others = {other.denoiser for other in FAMILIES.values()} - {family.denoiser}
    if folder.has(family.denoiser):
        if averaged := [name for name in (f"{family.denoiser}_ema",) if folder.has(name)]:
            log.warning("%s holds averaged weights too (%s); the others are read", folder, averaged[0])
        return
    if found := [other for other in sorted(others) if folder.has(other)]:
        raise FileNotFoundError(
            f"{folder} holds {found[0]}/ and no {family.denoiser}/, where the denoiser of {wanted} is; use a name of "
            "its own architecture, or 'local-dir:' with recipe="
        )
    if not any(folder.has(part) for part in parts):
        raise FileNotFoundError(f"{folder} {what_a_folder_is(folder)}")


def _network(checkpoint: Checkpoint, configs: Configs, where: Source | Path) -> Architecture:
    family = FAMILIES[checkpoint.family]
    return family(upstream.read(family, configs, str(where)), checkpoint.name)
