"""One line for each backbone: its name, and sha256 over the bytes of its features.

    python tests/fingerprints.py > before.txt

Compares two commits on one machine: the features are the same, bit for bit, if ``diff before.txt after.txt`` says
nothing. Between processors, or versions of PyTorch, bits differ without anything being wrong.

Networks are those of ``tiny.py``, of the real topology with random weights, and ``tinysd``, which is trained. A
checkpoint that no registered backbone reads is read in the middle of its activations.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import conftest
import tiny
import torch
from command_line import stdout
from PIL import Image
from torchvision.transforms.functional import to_tensor

import diffusion_backbones as db


def main() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        for name, digest in fingerprints(Path(folder)):
            print(name, digest, flush=True)


def fingerprints(folder: Path) -> Iterator[tuple[str, str]]:
    photo = to_tensor(Image.open(conftest.PHOTO).convert("RGB"))[None] * 2 - 1
    small, large = photo[..., :75, :110], photo[..., :256, :256]
    names = db.list_models(include_tags=True)
    for name in names:
        checkpoint = db.get_declaration(name).checkpoint
        if checkpoint.hub_id:
            yield name, fingerprint(read(checkpoint.name, tiny.recipe(name), folder), small)
        else:
            backbone = db.create_model(name, pretrained=True)
            yield name, fingerprint(backbone, small)
            yield f"{name}@256", fingerprint(backbone, large)
    known = {db.get_declaration(name).checkpoint.name for name in names}
    for name in db.list_checkpoints():
        if name not in known:
            listed = json.loads(stdout("activations", name, "--json"))
            maps = [site["id"] for site in listed if site["layout"] in ("map", "tokens")]
            middle = maps[len(maps) // 2]
            yield f"{name}:{middle}", fingerprint(read(name, [middle], folder), small)


def read(checkpoint: str, recipe: db.Recipe | list[str], folder: Path) -> db.DiffusionBackbone:
    """A tiny checkpoint, read by a recipe or at some activations."""
    path = folder / checkpoint
    if not path.exists():
        tiny.folder(checkpoint, path)
    return db.create_model(checkpoint, recipe=recipe, checkpoint_path=path)


def fingerprint(backbone: db.DiffusionBackbone, x: torch.Tensor) -> str:
    """sha256 of the maps of an image, float32, fine to coarse."""
    digest = hashlib.sha256()
    for level in backbone(x):
        digest.update(level.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
