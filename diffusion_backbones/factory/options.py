"""What ``create_model`` takes beside a name: build options, the recipe's settings, and keywords of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from diffusion_backbones.ops.quantization import check_weight_dtype
from diffusion_backbones.ops.tensor_checks import FLOATING
from diffusion_backbones.spec.foreign_keywords import COUNTERPARTS
from diffusion_backbones.spec.input_format import InputFormat, get_input_format
from diffusion_backbones.spec.suggestions import closest
from diffusion_backbones.spec.validation import MOST, as_integer, check_count, check_flag
from diffusion_backbones.surgery.compilation import check_compile
from diffusion_backbones.surgery.trainable import check_trainable

OVERLAY = ("file", "custom_load")
"""Keys of timm's ``pretrained_cfg_overlay``: the weights, and that the model loads them itself, as all do here."""
WEIGHTS = ("file", "url", "hf_hub_filename", "state_dict")
"""Keys of timm's ``pretrained_cfg`` that name weights."""
OVERRIDES = (
    "timestep",
    "timesteps",
    "combine",
    "noise",
    "inversion_steps",
    "ensemble",
    "seed",
    "prompt",
    "prompt_padding",
    "scaled",
    "classes",
    "discard",
    "normalize",
    "debias",
    "components",
)
"""Settings of a recipe that ``create_model`` takes by themselves."""

PLACES = ("pretrained", "checkpoint_path", "cache_dir", "recipe", "encoder")
"""Keywords that say what is built and where its weights are."""

FOREIGN_KEYWORDS: dict[str, Callable[[Any], str]] = {
    "num_classes": lambda n: "" if n == 0 else f"a backbone has no classifier, so num_classes must be 0, got {n}",
    "in_chans": lambda n: "" if n == 3 else f"the image encoder takes RGB, so in_chans must be 3, got {n}",
    "global_pool": lambda p: (
        "" if p == "" else f"a backbone returns maps and pools nothing, so global_pool must be '', got {p!r}"
    ),
    "img_size": lambda s: (
        ""
        if _is_size(s)
        else f"img_size must be an integer from 1 up, or two; any size is accepted in a call, got {s!r}"
    ),
    "pretrained_cfg": lambda c: (
        ""
        if _says_no_weights(c)
        else "pretrained_cfg describes weights, which the name does here; give checkpoint_path="
    ),
    "features_only": lambda f: (
        "" if f is True else f"features_only={f!r} asks for a classifier, and a backbone has none; it must be True"
    ),
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
        device = as_device(given["device"])
        check_compile(given["compile"], device, given["trainable"])
        check_trainable(given["trainable"], given["lora_rank"], given["prompt_tokens"])
        if given["chunk"] is not None:
            check_count("chunk", given["chunk"])
        for flag in ("truncate", "fold", "encoder_levels"):
            check_flag(flag, given[flag])
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


def check_strides(strides: Any) -> tuple[int, ...] | None:
    """``out_strides`` as a tuple.

    Raises:
        ValueError: They are not growing positive integers.
    """
    if strides is None:
        return None
    given = list(strides) if isinstance(strides, Iterable) and not isinstance(strides, str) else []
    checked = tuple(s for s in map(as_integer, given) if s is not None and 1 <= s <= MOST)
    if not given or len(checked) < len(given) or list(checked) != sorted(set(checked)):
        raise ValueError(f"out_strides must be growing positive integers such as (4, 8, 16, 32), got {strides!r}")
    return checked


def check_overlay(overlay: Any) -> Any:
    """The weights that timm's ``pretrained_cfg_overlay`` names, or None.

    Raises:
        TypeError: It is no mapping, or says what has no effect here.
    """
    if overlay is None:
        return None
    if not isinstance(overlay, Mapping):
        raise TypeError(f"pretrained_cfg_overlay must be a mapping with file, got {overlay!r}")
    if other := [key for key in overlay if key not in OVERLAY]:
        raise TypeError(
            f"pretrained_cfg_overlay takes file, a place of weights, and not {', '.join(map(str, other))}; give "
            "'hf-hub:owner/repo' as the name for a repository, and input_format= for another normalization"
        )
    return overlay.get("file")


def as_device(device: torch.device | str | None) -> torch.device:
    """A device that can be used here; None is torch's default.

    Raises:
        ValueError: There is no such device, or it cannot be used.
    """
    if device is None:
        return torch.get_default_device()
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device={device!r} cannot be used here; it must be a torch.device or its name, such as 'cpu', 'cuda:0' or "
            f"'meta'. ({reason})"
        ) from error
    return found


def _says_no_weights(cfg: Any) -> bool:
    """Whether timm's description of a model leaves its weights as they are declared; a tag is part of the name here."""
    return isinstance(cfg, Mapping) and not {key for key in WEIGHTS if cfg.get(key)}


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    whole = [as_integer(side) for side in sides]
    return len(whole) == 2 and all(side is not None and side >= 1 for side in whole)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A dtype that networks compute in, by itself or by name; None is torch's default.

    Raises:
        ValueError: It is another dtype, or unknown.
    """
    if dtype is None:
        return torch.get_default_dtype()
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype).removeprefix("torch."), None)
    if found not in FLOATING:
        names = ", ".join(repr(str(known).removeprefix("torch.")) for known in FLOATING)
        raise ValueError(f"dtype must be one that networks compute in, {names} or the torch.dtype, got {dtype!r}")
    return found
