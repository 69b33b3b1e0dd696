"""The compact folder: what a backbone kept, in three files.

``config.json`` holds name, checkpoint, recipe, architecture configs and where the weights came from; ``model.safetensors``
the kept weights, the embedded prompt and the noise; ``README.md`` the card.
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

from diffusion_backbones import tensors
from diffusion_backbones.families import Configs
from diffusion_backbones.recipe import Checkpoint, Level, Recipe
from diffusion_backbones.registry import Declaration
from diffusion_backbones.sources import Folder

if TYPE_CHECKING:
    from diffusion_backbones.backbone import DiffusionBackbone

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
LIBRARY, FORMAT = "diffusion_backbones", 1


def is_saved(folder: Folder) -> bool:
    """Whether ``save_pretrained`` wrote a folder or repository."""
    return CONFIG in folder.names() and folder.json(CONFIG).get("library_name") == LIBRARY


class Saved:
    """A folder that :func:`save` wrote, its weights unread.

    Raises:
        ValueError: It was written in a format that this version does not know, or its config is not whole.
    """

    def __init__(self, folder: Folder):
        data = folder.json(CONFIG)
        if data.get("format") != FORMAT:
            raise ValueError(f"{folder}: {CONFIG} has format {data.get('format')!r} and this version reads {FORMAT}; update diffusion_backbones")
        try:
            recipe, checkpoint = Recipe.from_dict(data["recipe"]), Checkpoint.from_dict(data["checkpoint"])
            self.declaration = Declaration(data["name"], checkpoint, recipe)
            self.configs: Configs = data["configs"]
            self.provenance: dict[str, str] = data["provenance"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder}: {CONFIG} is not whole: {error}") from error
        self._files = tensors.TensorFiles([folder.file(WEIGHTS)])

    def _part(self, prefix: str) -> tensors.TensorFiles:
        return self._files.renamed({name.removeprefix(prefix): name for name in self._files.shapes if name.startswith(prefix)})

    def load(self, part: str, module: nn.Module, whole: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        """Fill the ``denoiser`` or the ``encoder``; see :func:`diffusion_backbones.tensors.load`."""
        tensors.load(module, self._part(f"{part}."), whole, dtype, device, f"{self.declaration.name} {part}")

    def embeddings(self) -> dict[str, Tensor]:
        """The prompt as it was embedded, (1, ...) each."""
        part = self._part("conditioning.")
        return dict(part.read(part.shapes, lambda _: None, torch.device("cpu")))


def save(backbone: DiffusionBackbone, folder: Path) -> Path:
    """Write the compact folder. Files appear whole or not at all.

    Raises:
        ValueError: The backbone has no weights, being on ``meta``.
    """
    from diffusion_backbones.cards import card

    if any(p.is_meta for p in backbone.parameters()):
        raise ValueError("a backbone on the meta device has no weights to save")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in backbone.state_dict().items() if name != "canvas"}       # its seed says it
    tensors.write(folder / WEIGHTS, state, {"format": "pt"})
    _write_text(folder / CONFIG, json.dumps(describe(backbone), indent=2) + "\n")
    _write_text(folder / CARD, card(kept(backbone)))
    return folder


def kept(backbone: DiffusionBackbone) -> Declaration:
    """The declaration, with the levels that the backbone still has."""
    declaration = backbone.declaration
    levels = tuple(Level(tuple(site.id for site in level.sites)) for level in backbone.levels)
    return Declaration(declaration.name, declaration.checkpoint, declaration.recipe.override(levels=levels))


def describe(backbone: DiffusionBackbone) -> dict[str, Any]:
    """What ``config.json`` holds."""
    import diffusers

    import diffusion_backbones

    declaration = kept(backbone)
    return {
        "library_name": LIBRARY,
        "format": FORMAT,
        "name": declaration.name,
        "checkpoint": asdict(declaration.checkpoint),
        "recipe": declaration.recipe.to_dict(),
        "configs": {name: dict(config) for name, config in backbone.configs.items()},
        "provenance": backbone.provenance,
        "versions": {"diffusion_backbones": diffusion_backbones.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__},
    }


def push(backbone: DiffusionBackbone, repo_id: str, *, private: bool | None, commit_message: str, token: str | None) -> str:
    """Upload the compact folder; returns the repository's URL."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(backbone, Path(folder))
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=commit_message)
    return str(url)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)
