"""Upstream configs as they are in files: checked, and filled up as diffusers does, so that all that follows can rely
on them.

diffusers leaves a key out of a file, or a file from before a key was made lacks it, where the constructor of the class
has a default. What the latents depend on has no default that holds for every network, and must be said.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from diffusion_backbones.families.base import Architecture
from diffusion_backbones.families.image_encoders import OLD_SCALING, UNBUILDABLE, get_image_encoder
from diffusion_backbones.ops.large_libraries import stock
from diffusion_backbones.spec.configs import Config, Configs

LARGEST = 2**20
"""No width, length or side in a config of diffusers is larger."""
DEEPEST = 1000
"""No number of layers is larger."""
SAID = ("scaling_factor",)
"""Keys that must be in a file if the class has them."""
ASKED = ("force_upcast",)
"""Keys that say what a checkpoint's authors found out about it, which a constructor's default does not."""
MAY_BE_ZERO = ("layers", "blocks", "shift", "padding")
"""Parts of the names of whole numbers that may be 0."""


def read(family: type[Architecture], configs: Configs, where: str) -> Configs:
    """The configs of a checkpoint, checked and filled up.

    Args:
        family: What its denoiser is read as.
        configs: Component -> what its file holds.
        where: Names the folder, repository or file in errors.

    Raises:
        ValueError: A config is of another class, or of quantized weights; a key is missing or has a value that cannot
            be; or the network asks for an input that the family does not supply. File and key are named.
    """
    if not isinstance(configs, Mapping):
        raise ValueError(f"{where}: configs must be a JSON object, got {type(configs).__name__}")
    out: dict[str, Any] = {
        name: config if config is None else _object(config, f"{where}: {name}") for name, config in configs.items()
    }
    for name in (family.denoiser, family.encoder, "scheduler"):
        if name and out.get(name) is None:
            raise ValueError(f"{where} has no config of {name}")
    denoiser, at = out[family.denoiser], f"{where}: {family.denoiser}/config.json"
    check_quantization(denoiser, at)
    if not family.matches(denoiser):
        raise ValueError(f"{at} {_other_class(family, denoiser)}")
    out[family.denoiser] = complete(denoiser, family.networks[0], at)
    if family.encoder:
        at_encoder = f"{where}: {family.encoder}/config.json"
        out[family.encoder] = _read_encoder(out[family.encoder], at_encoder)
        if family.shifted:
            _check_shift(out[family.encoder], at_encoder)
    if not isinstance((out.get("model_index") or {}).get("_class_name", ""), str):
        raise ValueError(f"{where}: model_index.json must name a pipeline as _class_name")
    _check_network(family(out), at)
    return out


def complete(config: Config, network: str, where: str) -> dict[str, Any]:
    """A config with the defaults of a class of diffusers for what it leaves out, each value checked for its kind.

    Raises:
        ValueError: A value cannot be.
    """
    known = inspect.signature(stock(network)).parameters
    for key in config.keys() & known.keys():
        _check_value(key, config[key], known[key], where)
    defaults = {key: known[key].default for key in known if key not in (*SAID, *ASKED)}
    return {**{key: value for key, value in defaults.items() if value is not inspect.Parameter.empty}, **config}


def check_quantization(config: Config, where: str) -> None:
    """Raise ``ValueError`` if a config says that its weights are quantized."""
    if found := config.get("quantization_config"):
        method = found.get("quant_method", "an unknown method") if isinstance(found, Mapping) else found
        raise ValueError(
            f"{where} has a quantization_config: the weights are quantized with {method}, which is not read. Give the "
            "weights in float32, float16 or bfloat16; weight_dtype='int8' quantizes them as they are read."
        )


def _object(config: Any, where: str) -> Config:
    if not isinstance(config, Mapping):
        raise ValueError(f"{where} must be a JSON object, got {type(config).__name__}")
    return config


def _other_class(family: type[Architecture], config: Config) -> str:
    if "_class_name" not in config:
        return f"has no _class_name; expected is {family.networks[0]}"
    if config["_class_name"] in family.networks:
        return "is of a network that adds its text in another way, and is read by another family; use local-dir:"
    return f"is of class {config['_class_name']!r}, and the network that is asked for is {' or '.join(family.networks)}"


def _read_encoder(config: Config, where: str) -> Config:
    check_quantization(config, where)
    try:
        encoder = get_image_encoder(config)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    full = complete(_with_old_scaling(config, encoder.network), encoder.network, where)
    if SAID[0] not in full and encoder.scaling != (0.0, 1.0):
        raise ValueError(
            f"{where} has no scaling_factor, which the denoiser was trained with; write it there: 0.18215 for SD 1 and "
            "2, 0.13025 for SDXL"
        )
    try:
        type(encoder)(full).check()
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    except UNBUILDABLE as error:
        raise ValueError(f"{where} does not describe {encoder.network}: {_said(error)}") from error
    return full


def _check_shift(config: Config, where: str) -> None:
    said = config.get("shift_factor") is not None or config.get("latents_mean") is not None
    if config["_class_name"] == "AutoencoderKL" and not said:
        raise ValueError(
            f"{where} has no shift_factor, which the denoiser was trained with; write it there: 0.0609 for Stable "
            "Diffusion 3, 0.1159 for FLUX.1 and those that share its encoder"
        )


def _with_old_scaling(config: Config, network: str) -> Config:
    """A config from before diffusers 0.13 with the scaling that pipelines then had in their code."""
    version = str(config.get("_diffusers_version", "")).split(".")[:2]
    old = network == "AutoencoderKL" and version[0] == "0" and version[-1].isdigit() and int(version[-1]) <= 12
    return {"scaling_factor": OLD_SCALING, **config} if old else config


def _check_network(network: Architecture, where: str) -> None:
    """Ask a network for all that is arithmetic on its config."""
    try:
        network.check()
        list(network.sites())
        sizes = [network.size_divisibility, network.native_size]
        shapes = network.conditioning_shapes
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    except UNBUILDABLE as error:
        raise ValueError(f"{where} does not describe {network.networks[0]}: {_said(error)}") from error
    for what, size in {"a size": sizes, **shapes}.items():
        if not all(isinstance(n, int) and n > 0 for n in size):
            raise ValueError(f"{where} does not describe {network.networks[0]}: it gives {what} {size}")


def _said(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _check_value(key: str, value: Any, parameter: inspect.Parameter, where: str) -> None:
    """Check a value against the annotation of a constructor's parameter, or where there is none, its default."""
    if isinstance(parameter.annotation, str):
        return
    kinds = _kinds(parameter.annotation)
    if parameter.default is not inspect.Parameter.empty:
        kinds |= {_kind(parameter.default)}
    if kinds == {type(None)}:  # a default that says nothing
        return
    whole = not _holds_floats(parameter.annotation) and float not in kinds
    if float in kinds or (int in kinds and parameter.default is None):
        kinds |= {int, float}
    if _kind(value) not in kinds:
        names = sorted({list: "a list", type(None): "null"}.get(kind, kind.__name__) for kind in kinds)
        raise ValueError(f"{where} has {key} {repr(value)[:80]}; it must be {' or '.join(names)}")
    for part in _flat(value):
        _check_number(key, part, whole and isinstance(part, int), where)


def _check_number(key: str, value: Any, whole: bool, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise ValueError(f"{where} has {key} {value!r}; it must be finite")
    least = 0 if any(part in key for part in MAY_BE_ZERO) else 1
    most = DEEPEST if "layers" in key else LARGEST
    if whole and not least <= value <= most:
        raise ValueError(f"{where} has {key} {repr(value)[:80]}; it must be from {least} to {most}")


def _holds_floats(annotation: Any) -> bool:
    return annotation is float or any(map(_holds_floats, typing.get_args(annotation)))


def _flat(value: Any) -> list[Any]:
    return [part for item in value for part in _flat(item)] if isinstance(value, (list, tuple)) else [value]


def _kind(value: Any) -> type:
    return list if isinstance(value, (list, tuple)) else type(value)


def _kinds(annotation: Any) -> set[type]:
    """The JSON kinds that an annotation allows."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (list, tuple) or annotation in (list, tuple):
        return {list}
    return {annotation} if annotation in (int, float, bool, str, type(None)) else set()
