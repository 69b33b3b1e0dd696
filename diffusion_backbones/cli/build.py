"""From the options of a verb to a device and a backbone on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from diffusion_backbones.cli.options import ModelOptions

if TYPE_CHECKING:
    import torch

    from diffusion_backbones.backbone.module import DiffusionBackbone


def build_backbone(
    name: str, model: ModelOptions, dtype: str | None = None, truncate: bool = True
) -> DiffusionBackbone:
    """The backbone that the options ask for.

    Args:
        name: A backbone's name or place.
        model: The options.
        dtype: What it computes in, except on the CPU; the default of ``create_model`` if None.
        truncate: Whether it is cut behind the last activation of its recipe.
    """
    import torch

    from diffusion_backbones.evaluation.visualize import UNTRAINED  # torch
    from diffusion_backbones.factory.entry_points import create_model, with_random_weights  # torch

    where = find_device(model.device)
    if model.random_weights:
        torch.manual_seed(0)
    create = with_random_weights if model.random_weights else create_model
    backbone = create(
        name,
        pretrained=not model.random_weights,
        checkpoint_path=model.checkpoint_path,
        out_indices=model.levels,
        dtype=None if where.type == "cpu" else dtype,
        device=where,
        prompt=model.prompt,
        timestep=model.timestep,
        encoder=model.encoder,
        truncate=truncate,
    )
    if model.random_weights:
        click.echo(UNTRAINED, err=True)
    return backbone


def random_provenance(model: ModelOptions, backbone: DiffusionBackbone) -> dict[str, str] | None:
    """The provenance of random weights; None for other weights, whose provenance the backbone has."""
    if not model.random_weights:
        return None
    return {"random": f"seed 0 on {backbone.device.type}"} | ({"encoder": model.encoder} if model.encoder else {})


def find_device(name: str) -> torch.device:
    """The device that ``--device`` names.

    Raises:
        BadParameter: The device does not exist or cannot be used.
    """
    import torch

    if name == "auto":
        available = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return available or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # 'meta' has no values
    except Exception as error:  # every backend has errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise click.BadParameter(f"{name!r} cannot be used here: {reason}", param_hint="'--device'") from error
    return device
