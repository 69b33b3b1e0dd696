"""What users rely on, computed from the package as it is. ``python tests/golden.py`` writes it to a file.

``test_unchanged.py`` compares the package with that file, ``golden/contract.json``: things may be added, but nothing
that is there may change or go. Write the file again only for a change that is meant. Where modules were and what
pickles name stays in it as it was first written: a pickle that somebody has does not change any more.
"""

from __future__ import annotations

import ast
import inspect
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import conftest
import tiny
import torch
from command_line import commands, printed, printed_of_all, sha256, stdout, wrong
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

import diffusion_backbones as db

FILE = Path(__file__).with_name("golden") / "contract.json"
PACKAGE = Path(db.__file__).parent
SAVED, AS_FILE, TRAINED = "sd15_gdf", "sd3_medium_seg4diff", ("tinysd_gdf", "tinysd_vpd")
PARTS_OF_BACKBONE = ("encoder", "denoiser", "conditioning", "provenance", "feature_info")
VALUES = ("declaration", "input_format", "folded", "levels", "chunk", "weight_dtype", "num_features", "pretrained_cfg")
VALUES += ("compiled", "size_divisibility", "latent_channels")
"""What a backbone is documented to have beside methods."""
RECIPE = {"timestep": 7, "noise": "random", "ensemble": 2, "seed": 3}
RECIPE |= {"prompt": "a cat", "prompt_padding": "longest", "scaled": False}
FOREIGN = {"num_classes": 0, "in_chans": 3, "global_pool": "", "img_size": 224, "pretrained_cfg": {}}
FOREIGN |= {"features_only": True, "output_stride": 32, "pretrained_cfg_overlay": {}}
"""What ``create_model`` takes beyond the keywords in its signature, and what it ignores for timm's sake."""


# The parts of the contract.


def names() -> list[str]:
    """What the package exports."""
    return [name for name in db.__all__ if getattr(db, name) is not None]


def signatures() -> dict[str, Any]:
    """Name of a public function, class of data or method -> its parameters."""
    found = {name: getattr(db, name) for name in db.__all__ if name not in ("__version__", "DiffusionBackbone")}
    for cls in reversed(db.DiffusionBackbone.__mro__):
        if cls.__module__.startswith("diffusion_backbones"):
            own = {name: method for name, method in vars(cls).items() if callable(method) and name[0] != "_"}
            found |= {f"DiffusionBackbone.{name}": method for name, method in own.items()}
    taken = {name: parameters(function) for name, function in found.items()}
    if db.Recipe("old", levels=("unet-in",), **{"normalise": "layer"}).normalize == "layer":  # by its former name too
        taken["Recipe"].setdefault("normalise", taken["Recipe"]["normalize"])
    return taken


def parameters(function: Callable[..., Any]) -> dict[str, Any]:
    """Name -> kind, default and, where it may be given without its name, position."""
    found: dict[str, Any] = {}
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            default = "none, it is required" if parameter.default is parameter.empty else repr(parameter.default)
            where = {} if parameter.kind is parameter.KEYWORD_ONLY else {"position": position}
            found[parameter.name] = {"kind": parameter.kind.name, "default": default, **where}
    return found


def attributes() -> list[str]:
    backbone = db.create_model("tinysd_gdf", device="meta")
    return [name for name in (*PARTS_OF_BACKBONE, *VALUES) if hasattr(backbone, name)]


def accepted() -> dict[str, str]:
    """Keyword of ``create_model`` -> digest of the recipe that a backbone has with it."""
    found = {}
    for key, value in (RECIPE | FOREIGN).items():
        backbone = db.create_model("tinysd_gdf", pretrained=True, device="meta", **{key: value})
        found[key] = backbone.declaration.recipe.digest
    return found


def backbones() -> dict[str, Any]:
    """Name -> what it reads, what it returns, and what timm is told."""
    found = {}
    for name in db.list_models(include_tags=True):
        declaration, cfg = db.get_declaration(name), db.get_pretrained_cfg(name)
        levels = json.loads(stdout("info", name, "--json"))["feature_info"]
        found[name] = {
            "checkpoint": declaration.checkpoint.name,
            "digest": declaration.recipe.digest,
            "channels at stride": ", ".join(f"{level['num_chs']} at {level['reduction']}" for level in levels),
            "modules": ", ".join(level["module"] for level in levels),
            "pretrained_cfg": cfg | {"paper_ids": ", ".join(cfg["paper_ids"])},
        }
    return found


def checkpoints() -> dict[str, Any]:
    """Name -> what ``list`` says of it, and how many activations it has, with a digest of where and what they are."""
    found = {row["name"]: row for row in json.loads(stdout("list", "--checkpoints", "--json"))}
    for name, row in found.items():
        listed = json.loads(stdout("activations", name, "--all", "--json"))
        keys = ("id", "path", "port", "channels", "stride", "layout")
        lines = [" ".join(str(site[key]) for key in keys) for site in listed]
        row["activations"] = f"{len(lines)} with sha256 {sha256(chr(10).join(lines))}"
    return found


def prompts() -> dict[str, str]:
    """Names of the files in which prompts are cached: after an update no text encoder runs again."""
    found = {name: prompt_file(name) for name in db.list_checkpoints()}
    for name in db.list_models(include_tags=True):
        checkpoint, recipe = db.get_declaration(name).checkpoint, db.get_declaration(name).recipe
        found[name] = prompt_file(checkpoint.name, recipe.prompt_padding, recipe.without)
    return found


def prompt_file(checkpoint: str, padding: str = "max_length", without: Collection[str] = ()) -> str:
    """The name of the file that caches a prompt of a checkpoint whose text encoders have the fingerprint ``fp``.

    The only place here that makes a ``Prompter``: where its constructor changes, so does this, and the names stay.
    """
    from diffusion_backbones.families import architecture
    from diffusion_backbones.loading.prompts import Prompter

    network = architecture(db.get_checkpoint(checkpoint), package_configs(checkpoint, without))
    return Prompter(network, None, padding)._path("fp", "a cat").name


def package_configs(checkpoint: str, without: Collection[str] = ()) -> dict[str, Any]:
    """Component -> its config in the package, None for what is left out."""
    [folder] = PACKAGE.rglob(f"configs/{db.get_checkpoint(checkpoint).config_name}")
    paths = sorted(folder.glob("*/*config.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths} | dict.fromkeys(without)


def costs() -> dict[str, str]:
    """The keys of ``costs.json``."""
    [file] = PACKAGE.rglob("costs.json")
    return {name: cost["key"] for name, cost in json.loads(file.read_text())["backbones"].items()}


def recipe() -> str:
    """A recipe as a file, which was written after reading it from such a file."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first.yaml"), Path(folder, "second.yaml")
        db.get_declaration(AS_FILE).recipe.to_yaml(first)
        db.Recipe.from_file(first).to_yaml(second)
        return second.read_text()


def saved() -> dict[str, Any]:
    """A backbone and its compact folder: keys of the config, and names and shapes of tensors.

    ``state_dict`` has those that are not in the folder.
    """
    from safetensors.torch import load_file

    checkpoint = db.get_declaration(SAVED).checkpoint.name
    with tempfile.TemporaryDirectory() as place:
        weights = tiny.folder(checkpoint, Path(place, "weights"))
        backbone = db.create_model(checkpoint, recipe=tiny.recipe(SAVED), checkpoint_path=weights)
        folder = backbone.save_pretrained(Path(place, "saved"))
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    return {
        "format": f"{config['library_name']} {config['format']}",
        "config": {key: list(value) if isinstance(value, dict) else [] for key, value in config.items()},
        "tensors": shapes(tensors),
        "state_dict": shapes({name: tensor for name, tensor in backbone.state_dict().items() if name not in tensors}),
    }


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: " x ".join(map(str, tensor.shape)) for name, tensor in tensors.items()}


def in_timm() -> list[str]:
    """Those of our names that timm knows."""
    import timm

    return [name for name in db.list_models() if timm.is_model(name)]


def features() -> dict[str, Any]:
    """What the trained backbone in the package sees in a photograph, to the digits that every processor agrees on."""
    photo = to_tensor(Image.open(conftest.PHOTO).convert("RGB"))[None, :, :75, :110] * 2 - 1
    return {name: summary(db.create_model(name, pretrained=True)(photo)) for name in TRAINED}


def summary(maps: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Level -> its shape and a few numbers that change when anything does."""
    found = {}
    for i, level in enumerate(maps):
        flat = level.detach().double().flatten()
        numbers = {"mean": flat.mean(), "deviation": flat.std()}
        numbers |= {f"value {at}": flat[at * (len(flat) - 1) // 4] for at in range(5)}
        rounded = {name: round(float(number), 6) for name, number in numbers.items()}
        found[f"level{i}"] = {"shape": " x ".join(map(str, level.shape)), **rounded}
    return found


OF_PYTHON = (names, signatures, attributes, accepted, backbones, checkpoints, in_timm, features)
OF_FILES = (prompts, costs, recipe, saved)
PARTS = {part.__name__: part for part in (*OF_PYTHON, *OF_FILES, commands, printed, wrong)}
"""What may grow and must not change."""


# Where modules were.


def modules() -> dict[str, list[str]]:
    """Every module of the package -> the public names that it defines. None is imported."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = defined(ast.parse(path.read_text()))
    return found


def defined(tree: ast.Module) -> list[str]:
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return list(dict.fromkeys(name for name in found if not name.startswith("_")))


# Comparing, and writing.


def differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """A sentence for everything in ``old`` that ``new`` lacks or has otherwise. What is new in ``new`` is not told."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key, value in old.items():
            if key in new:
                yield from differences(value, new[key], f"{where}: {key}")
            else:
                yield f"{where}: {key!r} is gone"
    elif isinstance(old, list) and isinstance(new, list):
        yield from (f"{where}: {value!r} is gone" for value in old if value not in new)
    elif isinstance(old, float) and isinstance(new, float):
        if not math.isclose(old, new, rel_tol=1e-3, abs_tol=1e-3):
            yield f"{where} was {old} and is {new}"
    elif old != new:
        yield f"{where} was {old!r} and is {new!r}"


def current(part: str) -> Any:
    """A part of the contract as the package has it now, as JSON gives it back."""
    return json.loads(json.dumps((PARTS | {"printed_of_all": printed_of_all})[part]()))


def write() -> None:
    import old_pickles

    contract = {part: current(part) for part in (*PARTS, "printed_of_all")}
    if FILE.is_file():
        history = json.loads(FILE.read_text())
        contract |= {part: history[part] for part in ("modules", "pickled")}
    else:
        contract |= {"modules": modules(), "pickled": old_pickles.pickled()}
    FILE.write_text(json.dumps(contract, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
