"""The compact folder that ``save_pretrained`` writes, read back: what a backbone kept.

``config.json`` holds name, checkpoint, recipe, architecture configs and where the weights came from;
``model.safetensors`` the kept weights and the embedded prompt, in the dtypes they had; ``README.md`` the card. Weights
that are too large for one file are split into shards, ``model-00001-of-00003.safetensors`` and so on, listed by
``model.safetensors.index.json``; only shards with tensors that are needed are read. The dtype of the backbone that is
loaded is ``create_model``'s, as everywhere else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_backbones.families import FAMILIES, upstream
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Config, Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.recipe import ON_DISK, Recipe

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
INDEX, SHARDS = f"{WEIGHTS}.index.json", "model{suffix}.safetensors"
LIBRARY, FORMAT = "diffusion_backbones", 1
LATER = {"recipe": {"discard", "normalise", "without"}, "checkpoint": {"tiny_encoder"}}
"""What the first folders of this format lack, since no backbone then had it. Each part has all of its own or none."""
_PARTS = re.compile(r"(denoiser|encoder|conditioning|fitted|reducers|members\.\d+)\.")
_MEMBER = re.compile(r"member\d+/")
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def is_saved(folder: Folder) -> bool:
    """Whether ``save_pretrained`` wrote a folder or repository.

    Raises:
        ValueError: It has weights alone, as when saving is interrupted.
    """
    names = folder.names()
    if CONFIG in names:
        return folder.json(CONFIG).get("library_name") == LIBRARY
    nested = [name for name in names if "/" in name]
    if all(map(_MEMBER.match, nested)) and (nested or {WEIGHTS, INDEX} & set(names)):  # of a fusion, or one backbone
        raise ValueError(
            f"{folder} has weights and no {CONFIG}, which save_pretrained writes last: saving was interrupted, or "
            "another library wrote them. Save the backbone again."
        )
    return False


def weight_files(folder: Folder) -> set[str]:
    """The files of weights in a folder or repository that an earlier ``save_pretrained`` wrote there; none of them if
    that is not certain.
    """
    names, found = set(folder.names()), set[str]()
    if WEIGHTS in names and _says(folder, CONFIG, lambda data: data.get("library_name") == LIBRARY):
        found.add(WEIGHTS)
    if _is_our_index(folder):
        shards = filter(_SHARD.fullmatch, map(str, folder.json(INDEX)["weight_map"].values()))
        found |= {INDEX, *names.intersection(shards)}
    return found


def foreign(folder: Folder) -> set[str]:
    """The files in a folder that have names of ``save_pretrained``'s and were written by something else."""
    found, names = set(), {CONFIG, WEIGHTS, CARD}.intersection(folder.names())
    if CARD in names:
        text = folder.file(CARD).read_text(encoding="utf-8", errors="replace")
        found |= set() if f"library_name: {LIBRARY}\n" in text else {CARD}
    if _says(folder, CONFIG, lambda data: data.get("library_name") == LIBRARY):
        return found
    if WEIGHTS in names and not _holds_parts(folder.file(WEIGHTS)):
        found.add(WEIGHTS)
    return found | (names & {CONFIG})


def _holds_parts(path: Path) -> bool:
    """Whether a file of weights is ours; there is none of our configs beside it where saving was interrupted."""
    try:
        return all(map(_PARTS.match, safetensors_io.TensorFiles([path]).shapes))
    except ValueError:
        return False


def _is_our_index(folder: Folder) -> bool:
    return _says(folder, INDEX, lambda data: data["metadata"]["library_name"] == LIBRARY and bool(data["weight_map"]))


def _says(folder: Folder, name: str, what: Callable[[Config], bool]) -> bool:
    """Whether a JSON file is there and says something; one that cannot be read does not."""
    try:
        return name in folder.names() and what(folder.json(name))
    except (ValueError, KeyError, TypeError):
        return False


class SavedConfig:
    """A backbone without its weights, as ``config.json`` describes it.

    Args:
        data: What ``config.json`` holds.
        where: Names it in errors.

    Raises:
        ValueError: It was written in a format that this version does not know, or it is not whole.
    """

    def __init__(self, data: Mapping[str, Any], where: str):
        if data.get("format") != FORMAT:
            raise ValueError(
                f"{where} has format {data.get('format')!r} and this version reads {FORMAT}; update diffusion_backbones"
            )
        try:
            recipe, checkpoint = Recipe.from_dict(data["recipe"]), Checkpoint.from_dict(data["checkpoint"])
            self.declaration = Declaration(data["name"], checkpoint, recipe)
            _check_whole("recipe", recipe.to_dict(), {ON_DISK.get(key, key) for key in data["recipe"]}, where)
            _check_whole("checkpoint", asdict(checkpoint), set(data["checkpoint"]), where)
            self.configs: Configs = upstream.read(FAMILIES[checkpoint.family], data["configs"], "its configs")
            self.provenance: dict[str, str] = data["provenance"]
            self.out_strides: list[int] | None = data["out_strides"]
            self.input_format = _input_format(data)
            self.folded: Mapping[str, Any] = dict(data.get("folded", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{where} is not what save_pretrained writes: {what.rstrip('.')}. Save the backbone again."
            ) from error


def _check_whole(part: str, whole: Mapping[str, Any], keys: set[str], where: str) -> None:
    """Check that a part of a config says every setting: a default in its place would be another backbone.

    Raises:
        KeyError: It lacks some.
    """
    missing = whole.keys() - keys
    if missing == LATER[part]:
        log.warning(
            "%s: its %s has no %s, as early versions saved it, and is read as they meant it; save the backbone again",
            where,
            part,
            ", ".join(sorted(missing)),
        )
    elif missing:
        raise KeyError(f"{part}: {', '.join(sorted(missing))}")


def _input_format(data: Mapping[str, Any]) -> InputFormat:
    """The input format, which is left out where it is the usual one; what timm reads beside it says whether it is.

    Raises:
        KeyError: It is left out, and is another.
    """
    if "input_format" in data:
        return InputFormat.from_dict(data["input_format"])
    for_timm = data.get("pretrained_cfg", {})
    if any(key in for_timm and tuple(for_timm[key]) != getattr(SYMMETRIC, key) for key in ("mean", "std")):
        raise KeyError("input_format")
    return SYMMETRIC


class FusionFoundError(ValueError):
    """A folder holds a fusion, and one backbone was looked for. Whoever builds fusions takes it from here."""

    def __init__(self, folder: Folder):
        super().__init__(f"{folder} holds a fusion of several backbones; give it as the name: 'local-dir:FOLDER'")
        self.folder = folder


class SavedBackbone(SavedConfig):
    """A folder that ``save_pretrained`` wrote, its weights unread.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: As :class:`SavedConfig`; or the weights are not a whole file.
    """

    def __init__(self, folder: Folder):
        data = folder.json(CONFIG)
        if "fusion" in data:
            raise FusionFoundError(folder)
        super().__init__(data, f"{folder}: {CONFIG}")
        self._folder = folder
        names = folder.names()
        sharded = INDEX in names and (WEIGHTS not in names or _is_our_index(folder))
        self._shards = folder.weight_map(INDEX) if sharded else None
        self._whole = safetensors_io.TensorFiles([] if sharded else [folder.file(WEIGHTS)])

    def load(
        self,
        part: str,
        module: nn.Module,
        whole: safetensors_io.Shapes,
        dtype: torch.dtype,
        device: torch.device,
        store: safetensors_io.Store = safetensors_io.as_read,
    ) -> None:
        """Fill the ``denoiser`` or the ``encoder``; see :func:`diffusion_backbones.ops.safetensors_io.load`."""
        files = self._part(f"{part}.", module.state_dict())
        safetensors_io.load(module, files, whole, dtype, device, f"{self.declaration.name} {part}", store)

    def embeddings(self) -> dict[str, Tensor]:
        """The prompt as it was embedded, (1, ...) each."""
        prefix = "conditioning."
        names = (name.removeprefix(prefix) for name in self._shards or () if name.startswith(prefix))
        files = self._part(prefix, names)
        return dict(files.read(files.shapes, None, torch.device("cpu")))

    def fits(self, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was fitted of some levels, under the names of ``wanted``.

        Raises:
            ValueError: It is not there in that shape, or it is and the recipe says nothing of it.
        """
        prefix, recipe = "fitted.", self.declaration.recipe
        names = self._whole.shapes if self._shards is None else self._shards
        if recipe.debias or recipe.components:
            files = self._part(prefix, wanted)
            wrong = [name for name, tensor in wanted.items() if files.shapes.get(name) != tuple(tensor.shape)]
        else:
            wrong = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if wrong:
            raise ValueError(
                f"{self._folder}: the weights are not those of this {CONFIG}: {prefix}{wrong[0]} is missing, unknown "
                "or of another shape. Save the backbone again."
            )
        return dict(files.read(wanted, None, torch.device("cpu"))) if wanted else {}

    def _part(self, prefix: str, needed: Iterable[str]) -> safetensors_io.TensorFiles:
        """The tensors of one part, without its prefix: of shards, those that hold something that is needed."""
        files = self._whole if self._shards is None else self._open({f"{prefix}{name}" for name in needed})
        return files.renamed({name.removeprefix(prefix): name for name in files.shapes if name.startswith(prefix)})

    def _open(self, needed: set[str]) -> safetensors_io.TensorFiles:
        assert self._shards is not None
        shards = sorted({shard for name, shard in self._shards.items() if name in needed})
        return safetensors_io.TensorFiles(self._folder.present(INDEX, shards))
