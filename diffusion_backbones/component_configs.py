"""What upstream configs are: one for every component of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Config = Mapping[str, Any]
"""One component's upstream ``config.json``."""

Configs = Mapping[str, Any]
"""Component name (``unet``, ``vae``, ``scheduler`` ...) -> its config, None for one that is left out."""

LoadText = Callable[[str], tuple[Any, Any]]
"""Component name of a text encoder -> (tokenizer, model), loaded on first use."""


def left_out(configs: Configs, components: Iterable[str]) -> Configs:
    """Configs in which some components are None, as in a diffusers pipeline that was loaded without them."""
    return {**configs, **dict.fromkeys(components)}


def is_flow(scheduler: Config) -> bool:
    """Whether a scheduler's config is that of a rectified flow, z_t = (1 - t) z + t noise, and not of a diffusion."""
    return "FlowMatch" in scheduler.get("_class_name", "") or scheduler.get("prediction_type") == "flow_prediction"
