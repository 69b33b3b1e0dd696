"""Which file of a checkpoint holds a component's weights, among its variants."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from diffusion_backbones.ops.file_formats import PICKLE_REFUSED, PICKLES


def choose(names: Iterable[str], component: str, stem: str, half: bool) -> str:
    """Choose the file of a checkpoint that holds a component's weights.

    Args:
        names: All file names, relative to the checkpoint.
        component: Name of its folder, ``unet`` ...
        stem: ``diffusion_pytorch_model`` or ``model``.
        half: Prefer the ``fp16`` variant, otherwise the one of full precision; the other is taken where it is missing,
            and where both are, the only variant that is there.

    Returns:
        The name of a ``.safetensors`` file, or of an index of shards.

    Raises:
        FileNotFoundError: There is none, or several variants; the message names a pickle that is there instead.
    """
    names = list(names)
    inside = [name for name in names if name.startswith(component + "/") and name.count("/") == 1]
    alone = not inside and any(
        name.startswith(f"{stem}.") for name in names
    )  # at the root of a repository of one network
    inside, at = ([name for name in names if "/" not in name], "") if alone else (inside, f"{component}/")
    full = [f"{at}{stem}.safetensors", f"{at}{stem}.safetensors.index.json"]
    variants = _variants(inside, at + stem)
    for candidate in variants.get("fp16", []) + full if half else full + variants.get("fp16", []):
        if candidate in inside:
            return candidate
    if len(variants) == 1:
        return next(iter(variants.values()))[0]
    if variants:
        raise FileNotFoundError(
            f"no {full[0]}, but the variants {', '.join(variants)}; leave one of them in {component}/, or rename it"
        )
    for name in inside:
        if name.endswith(PICKLES):
            raise FileNotFoundError(f"{name} {PICKLE_REFUSED}")
    raise FileNotFoundError(
        f"no {full[0]} (nor its fp16 variant, nor an index of shards); {component}/ holds: "
        f"{', '.join(inside) or 'nothing'}"
    )


def _variants(names: Iterable[str], stem: str) -> dict[str, list[str]]:
    """Variant of a component's weights, such as ``fp16`` -> its file or its index of shards."""
    found: dict[str, list[str]] = {}
    ways = (
        r"\.(?!safetensors)([\w-]+)\.safetensors",
        r"\.safetensors\.index\.([\w-]+)\.json",
        r"\.(?!safetensors)([\w-]+)\.safetensors\.index\.json",
    )
    for way in ways:
        for name in names:
            match = re.fullmatch(re.escape(stem) + way, name)
            if match and not re.search(r"-\d{5}-of-\d{5}$", match[1]):
                found.setdefault(match[1], []).append(name)
    return found


def is_usual(name: str, stem: str) -> bool:
    """Whether a file of weights is the one of full precision or the ``fp16`` variant."""
    variant = PurePosixPath(name).name.removeprefix(stem).removesuffix(".json")
    return variant.replace(".fp16", "").replace(".index", "") == ".safetensors"
