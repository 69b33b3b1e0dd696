"""What ``create_model`` takes beside a name: build options, the recipe's settings, and keywords of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from diffusion_backbones.ops.quantization import check_weight_dtype
from diffusion_backbones.spec.foreign_keywords import COUNTERPARTS
from diffusion_backbones.spec.input_format import InputFormat, get_input_format
from diffusion_backbones.spec.suggestions import closest
from diffusion_backbones.spec.validation import check_count
from diffusion_backbones.surgery.compilation import check_compile
from diffusion_backbones.surgery.trainable import check_trainable

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OVERRIDES = ("timestep", "noise", "ensemble", "seed", "prompt", "prompt_padding", "scaled")
"""Settings of a recipe that ``create_model`` takes by themselves."""

PLACES = ("pretrained", "checkpoint_path", "cache_dir", "recipe", "encoder")
"""Keywords that say what is built and where its weights are."""

FOREIGN_KEYWORDS: dict[str, Callable[[Any], str]] = {
    "num_classes": lambda n: "" if n == 0 else f"a backbone has no classifier, so num_classes must be 0, got {n}",
    "in_chans": lambda n: "" if n == 3 else f"the image encoder takes RGB, so in_chans must be 3, got {n}",
    "global_pool": lambda p: (
        "" if p == "" else f"a backbone returns maps and pools nothing, so global_pool must be '', got {p!r}"
    ),
    "img_size": lambda _: "",  # any size is accepted as it is
    "pretrained_cfg": lambda _: "",  # the declaration says it
    "features_only": lambda f: "" if f else "features_only=False asks for a classifier, and a backbone has none",
    "output_stride": lambda s: (
        ""
        if s == 32
        else f"output_stride={s} dilates a classifier's network; here out_strides=(...) resamples the pyramid"
    ),
    "feature_cls": lambda c: f"feature_cls={c!r} chooses among timm's wrappers, and this backbone needs none",
}
"""Keyword of timm's ``create_model`` -> why a value of it cannot be, or nothing if it can."""


@dataclass(frozen=True)
class BuildOptions:
    """Build options that are not part of the recipe; see :func:`~diffusion_backbones.create_model`."""

    out_indices: int | Sequence[int] | None = None
    out_strides: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=torch.get_default_device)
    weight_dtype: str | None = None
    trainable: bool | str = False
    lora_rank: int | None = None
    prompt_tokens: int | None = None
    input_format: InputFormat | None = None
    encoder_levels: bool = False
    chunk: int | None = None
    fold: bool = False
    compile: bool | str = False
    truncate: bool = True

    @classmethod
    def parse(cls, **given: Any) -> BuildOptions:
        """The options as ``create_model`` is given them, checked.

        Raises:
            ImportError: A package that an option needs is missing.
            TypeError: Options that do not go together.
            ValueError: A value that cannot be.
        """
        device = torch.device(given["device"]) if given["device"] is not None else torch.get_default_device()
        check_compile(given["compile"], device, given["trainable"])
        check_trainable(given["trainable"], given["lora_rank"], given["prompt_tokens"])
        if given["chunk"] is not None:
            check_count("chunk", given["chunk"])
        if not isinstance(given["truncate"], bool):
            raise TypeError(f"truncate must be True or False, got {given['truncate']!r}")
        name = given["input_format"]
        checked = {
            "device": device,
            "dtype": as_dtype(given["dtype"]),
            "out_strides": check_strides(given["out_strides"]),
            "input_format": get_input_format(name) if name is not None else None,
            "weight_dtype": check_weight_dtype(given["weight_dtype"], given["trainable"]),
        }
        return cls(**(given | checked))


def recipe_overrides(given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's settings among further keywords of ``create_model``; what is None is dropped, as in timm.

    Raises:
        TypeError: An unknown keyword; the closest is named.
        ValueError: A keyword of timm with a value that cannot be.
    """
    settings = {}
    for key, value in given.items():
        if value is None:
            continue
        if key in OVERRIDES:
            settings[key] = value
        elif key not in FOREIGN_KEYWORDS:
            raise TypeError(f"create_model has no keyword {key!r}{_meant(key)}")
        elif reason := FOREIGN_KEYWORDS[key](value):
            raise ValueError(reason)
    return settings


def _meant(key: str) -> str:
    """What was meant by an unknown keyword, as the end of a sentence: what other libraries call so, or the nearest."""
    if key in COUNTERPARTS:
        return f": {COUNTERPARTS[key]}."
    options = [option.name for option in fields(BuildOptions)]
    return f".{closest(key, [*OVERRIDES, *FOREIGN_KEYWORDS, *PLACES, *options])}"


def check_strides(strides: Sequence[int] | None) -> tuple[int, ...] | None:
    """``out_strides`` as a tuple.

    Raises:
        ValueError: They are not growing positive integers.
    """
    if strides is None:
        return None
    strides = tuple(strides)
    if not strides or any(not isinstance(s, int) or s < 1 for s in strides) or list(strides) != sorted(set(strides)):
        raise ValueError(f"out_strides must be growing positive integers such as (4, 8, 16, 32), got {strides}")
    return strides


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype that networks compute in, by itself or by name; None is torch's default.

    Raises:
        ValueError: It is another dtype, or unknown.
    """
    if dtype is None:
        return torch.get_default_dtype()
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in DTYPES:
        names = ", ".join(repr(str(known).removeprefix("torch.")) for known in DTYPES)
        raise ValueError(f"dtype must be one that networks compute in, {names} or the torch.dtype, got {dtype!r}")
    return found
