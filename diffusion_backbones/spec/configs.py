"""Upstream architecture configs: one for every component of a checkpoint, and those that travel with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusion_backbones.spec.checkpoint import Checkpoint, TinyEncoder

Config = Mapping[str, Any]
"""One component's upstream ``config.json``."""

Configs = Mapping[str, Any]
"""Component name (``unet``, ``vae``, ``scheduler`` ...) -> its config, None for one that is left out."""


def drop_components(configs: Configs, components: Iterable[str]) -> Configs:
    """Configs in which some components are None, as in a diffusers pipeline that was loaded without them."""
    return {**configs, **dict.fromkeys(components)}


def is_flow(scheduler: Config) -> bool:
    """Whether a scheduler's config is that of a rectified flow, z_t = (1 - t) z + t noise, and not of a diffusion."""
    named = "FlowMatch" in str(scheduler.get("_class_name"))
    return named or bool(scheduler.get("use_flow_sigmas")) or scheduler.get("prediction_type") == "flow_prediction"


CONFIGS = Path(__file__).parents[1] / "configs"


def package_configs(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The architecture configs that travel with the package: component name -> config."""
    folder = CONFIGS / checkpoint.config_name
    paths = {path.parent.name: path for path in sorted(folder.glob("*/*config.json"))}
    if (index := folder / "model_index.json").is_file():
        paths["model_index"] = index
    return {name: json.loads(path.read_text()) for name, path in paths.items()}


def packaged(tiny: TinyEncoder) -> dict[str, Any]:
    """The ``config.json`` of a tiny encoder, as the package has it."""
    config: dict[str, Any] = json.loads((CONFIGS / tiny.configs / "config.json").read_text())
    return config
