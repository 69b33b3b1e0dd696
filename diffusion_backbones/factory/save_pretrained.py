"""The compact folder: what a backbone kept, in three files.

``config.json`` holds name, checkpoint, recipe, architecture configs and where the weights came from;
``model.safetensors`` the kept weights and the embedded prompt, in the dtypes they had; ``README.md`` the card. The
dtype of the backbone that is loaded is ``create_model``'s, as everywhere else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import Configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.input_format import SYMMETRIC, InputFormat
from diffusion_backbones.spec.recipe import Level, Recipe
from diffusion_backbones.surgery import constant_folding
from diffusion_backbones.surgery.trainable import merged_state

if TYPE_CHECKING:
    from diffusion_backbones.backbone.timm_mixin import TimmInterface

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY, FORMAT = "diffusion_backbones", 1


def is_saved(folder: Folder) -> bool:
    """Whether ``save_pretrained`` wrote a folder or repository."""
    return CONFIG in folder.names() and folder.json(CONFIG).get("library_name") == LIBRARY


class Described:
    """A backbone without its weights, in the words of :func:`describe`.

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
            self.configs: Configs = data["configs"]
            self.provenance: dict[str, str] = data["provenance"]
            self.out_strides: list[int] | None = data["out_strides"]
            self.input_format = InputFormat.from_dict(data["input_format"]) if "input_format" in data else SYMMETRIC
            self.folded: Mapping[str, Any] = dict(data.get("folded", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"{where} is not what save_pretrained writes: {what.rstrip('.')}. Save the backbone again."
            ) from error


class Saved(Described):
    """A folder that :func:`save` wrote, its weights unread.

    Raises:
        ValueError: As :class:`Described`.
    """

    def __init__(self, folder: Folder):
        super().__init__(folder.json(CONFIG), f"{folder}: {CONFIG}")
        self._files = safetensors_io.TensorFiles([folder.file(WEIGHTS)])

    def _part(self, prefix: str) -> safetensors_io.TensorFiles:
        return self._files.renamed(
            {name.removeprefix(prefix): name for name in self._files.shapes if name.startswith(prefix)}
        )

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
        safetensors_io.load(
            module, self._part(f"{part}."), whole, dtype, device, f"{self.declaration.name} {part}", store
        )

    def embeddings(self) -> dict[str, Tensor]:
        """The prompt as it was embedded, (1, ...) each."""
        part = self._part("conditioning.")
        return dict(part.read(part.shapes, None, torch.device("cpu")))


def save(backbone: TimmInterface, folder: Path) -> Path:
    """Write the compact folder. Every file appears whole or not at all, ``config.json`` last, so that a folder that has
    it is whole.

    Raises:
        ValueError: The backbone has no weights, being on ``meta``, or only rounded ones.
        OSError: The folder cannot be written.
    """
    from diffusion_backbones.reports.backbone_card import card

    if any(p.is_meta for p in backbone.parameters()):
        raise ValueError(
            f"{backbone.declaration.name} is on the meta device and has no weights to save; build it on another"
        )
    if backbone.weight_dtype:
        raise ValueError(
            f"{backbone.declaration.name} was made with weight_dtype={backbone.weight_dtype!r} and has rounded "
            "weights; a folder holds whole ones. Save it "
            f"without, and give weight_dtype={backbone.weight_dtype!r} to create_model when it is loaded: weights are "
            "rounded one by one as they are read"
        )
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in merged_state(backbone).items() if name != "canvas"}  # its seed says it
    safetensors_io.write(folder / WEIGHTS, state, {"format": "pt"})
    _write_text(folder / CARD, card(kept(backbone), backbone.configs))
    for_timm = {"architecture": backbone.declaration.architecture, "pretrained_cfg": backbone.pretrained_cfg}
    _write_text(folder / CONFIG, json.dumps({**describe(backbone), **for_timm}, indent=2) + "\n")
    return folder


def kept(backbone: TimmInterface) -> Declaration:
    """The declaration, with the levels that the backbone still has."""
    declaration = backbone.declaration
    levels = tuple(Level(tuple(site.id for site in level.sites)) for level in backbone.levels)
    return Declaration(declaration.name, declaration.checkpoint, declaration.recipe.override(levels=levels))


def describe(backbone: TimmInterface) -> dict[str, Any]:
    """What ``config.json`` holds, but for what timm reads there."""
    import diffusers

    import diffusion_backbones

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
        "configs": {name: config and dict(config) for name, config in backbone.configs.items()},
        "provenance": backbone.provenance,
        "versions": {
            "diffusion_backbones": diffusion_backbones.__version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
        },
    }


def push(backbone: TimmInterface, repo_id: str, *, private: bool | None, commit_message: str, token: str | None) -> str:
    """Upload the compact folder; returns the repository's URL.

    Raises:
        ConnectionError: The hub cannot be reached, or does not let this token write there.
    """
    from huggingface_hub import HfApi

    from diffusion_backbones.loading import hub

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(backbone, Path(folder))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message)
        except hub.ERRORS as error:
            raise ConnectionError(f"nothing was uploaded: {hub.explain(repo_id, 'main', error)}") from error
    return str(url)


def _write_text(path: Path, text: str) -> None:
    with safetensors_io.whole(path) as part:
        part.write_text(text, encoding="utf-8")
