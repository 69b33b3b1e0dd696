"""Backbones that were pickled before the modules of the package moved, and the same ones made by the code of today.

    python tests/old_pickles.py         writes those that are not in golden/backbones

A pickle names classes by their modules, so only old code can make an old one: what is there is never written again.
The weights in them are zeros, which take no space; :func:`fill` gives both sides of a comparison the same. They say
that they came from the relative folder ``sd15`` or the like, where a checkpoint must be when they encode a prompt.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import pickle
import pickletools
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import conftest  # noqa: F401  (first: nothing touches the user's caches)
import diffusers
import golden
import original
import tiny
import torch
from command_line import stdout

import diffusion_backbones as db

FOLDER = golden.FILE.with_name("backbones")
FEATURES = FOLDER / "features.json"
SIZE = (48, 80)


class Case(NamedTuple):
    """A backbone: a tiny checkpoint, a backbone with its recipe or activation ids, and more for ``create_model``."""

    checkpoint: str
    recipe: str | tuple[str, ...]
    keywords: dict[str, Any] = {}


PATHS = ("up_blocks.1.resnets.2", "up-level2-repeat1-vit-out")
TRAINABLE = {"trainable": True, "encoder_levels": True, "out_strides": (4, 8, 16), "input_format": "imagenet"}
CASES = {
    "sd15_gdf": Case("sd15", "sd15_gdf"),
    "sd15_folded": Case("sd15", "sd15_gdf", {"fold": True}),
    "sd15_paths": Case("sd15", PATHS, TRAINABLE),
    "flux_dev_ditf": Case("flux_dev", "flux_dev_ditf", {"ensemble": 2}),
    "sd3_medium_seg4diff": Case("sd3_medium", "sd3_medium_seg4diff"),
    "dit_xl_256_ddae": Case("dit_xl_256", "dit_xl_256_ddae"),
    "ddpm_celebahq_256": Case("ddpm_celebahq_256", ("mid-vit-out", "up-level3-repeat1-res-out")),
}


def build(case: Case, folder: Path) -> db.DiffusionBackbone:
    """The backbone of a case, by the code of today; ``folder`` holds its tiny checkpoint."""
    recipe = tiny.recipe(case.recipe) if isinstance(case.recipe, str) else list(case.recipe)
    return db.create_model(case.checkpoint, recipe=recipe, checkpoint_path=folder, **case.keywords)


def load(name: str) -> db.DiffusionBackbone:
    """The backbone of a case, as the code of then pickled it."""
    backbone: db.DiffusionBackbone = pickle.loads(lzma.decompress((FOLDER / f"{name}.pkl.xz").read_bytes()))
    return backbone


def fill(backbone: db.DiffusionBackbone, canvas: torch.Tensor | None) -> None:
    """Give a backbone weights that follow from names and shapes alone, in place, and that keep activations near 1.

    Args:
        backbone: Of any weights.
        canvas: Its fixed noise, which a pickle here lacks, or None if it has none.
    """
    generator, state = torch.Generator().manual_seed(0), backbone.state_dict()
    for name in sorted(state):
        tensor, weight = state[name], name.endswith(".weight")
        if name == "canvas":
            assert canvas is not None
            tensor.copy_(canvas)
        elif tensor.is_floating_point():
            matrix, of_network = weight and tensor.ndim > 1, name.startswith(("denoiser.", "encoder."))
            deviation = (tensor.numel() / len(tensor)) ** -0.5 if matrix else 0.05 if of_network else 1.0
            tensor.normal_(float(weight and not matrix), deviation, generator=generator)


def image() -> torch.Tensor:
    return torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


# Writing.


def write() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    features = json.loads(FEATURES.read_text())["features"] if FEATURES.is_file() else {}
    with _checkpoints():
        for name, case in CASES.items():
            path = FOLDER / f"{name}.pkl.xz"
            if path.exists():
                print(f"{path.name} is there and stays as it is")
                continue
            backbone = build(case, _folder(case.checkpoint))
            fill(backbone, backbone.canvas)
            features[name] = golden.summary(backbone(image()))
            with torch.no_grad():
                for tensor in backbone.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.zero_()
            path.write_bytes(lzma.compress(pickle.dumps(backbone), preset=9 | lzma.PRESET_EXTREME))
    FEATURES.write_text(json.dumps({"diffusers": diffusers.__version__, "features": features}, indent=1) + "\n")


def pickled() -> dict[str, list[str]]:
    """Module of the package -> what pickles of backbones and of their parts name in it."""
    found = defaultdict(set)
    with _checkpoints():
        for thing in _things():
            data = pickle.dumps(thing, protocol=2)  # in which a name is one piece
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "GLOBAL" and argument.startswith("diffusion_backbones"):
                    module, name = argument.split(" ")
                    found[module].add(name)
    return {module: sorted(found[module]) for module in sorted(found)}


def _things() -> Iterator[Any]:
    """Backbones of every family, with every option that stays in them, and the places that weights come from."""
    from diffusion_backbones.hub import HubRepo
    from diffusion_backbones.ldm import SingleFile

    options = [
        ("trainable", False),
        ("trainable", True),
        ("trainable", "lora"),
        ("trainable", "prompt"),
        ("fold", True),
    ]
    options += [("compile", True), ("compile", "freeze"), ("weight_dtype", "int8"), ("dtype", "bfloat16")]
    options += [("encoder", "tiny"), ("input_format", "uint8")]
    yield from (db.create_model("tinysd_gdf", pretrained=True, **{key: value}) for key, value in options)
    yield from (build(case, _folder(case.checkpoint)) for case in CASES.values())
    yield from map(db.get_declaration, db.list_models(include_tags=True))
    families = {db.get_checkpoint(name).family: name for name in db.list_checkpoints()}
    for name in families.values():
        kinds, listed = defaultdict(list), json.loads(stdout("activations", name, "--all", "--json"))
        for block in [site["id"] for site in listed if site["modulation"]][:1]:
            modulated = db.Recipe("modulated", levels=(block,), normalize="adaptive")
            yield db.create_model(name, recipe=modulated, device="meta")
        for site in listed:
            if site["layout"] in ("map", "tokens") and not site["encoder"]:
                kinds[re.sub("[0-9]+", "", site["id"])].append(site["id"])
        for ids in kinds.values():  # each kind is cut in its own way
            yield db.create_model(name, recipe=[ids[len(ids) // 2]], device="meta")
        case = Case(name, (list(kinds.values())[-1][-1],), {"fold": True})
        with contextlib.suppress(ValueError):  # in one family nothing is constant
            yield build(case, _folder(name))
    yield SingleFile(original.write("sd15", _folder("sd15"), Path("sd15.safetensors")), tiny.configs("sd15"))
    yield HubRepo.__new__(HubRepo)  # as if it had been opened


@contextlib.contextmanager
def _checkpoints() -> Iterator[None]:
    """A new current folder, so that no path of this machine is in a pickle."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def _folder(checkpoint: str) -> Path:
    path = Path(checkpoint)
    return path if path.exists() else tiny.folder(checkpoint, path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
