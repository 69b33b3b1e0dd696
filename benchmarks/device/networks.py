"""The backbone of a job, with random weights made on the device, and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import tiny
from benchmarks.device.graphs import captured
from benchmarks.device.jobs import EACH, WHOLE, Job
from benchmarks.device.place import Place
from diffusion_backbones import DiffusionBackbone
from diffusion_backbones.evaluation import benchmark
from diffusion_backbones.evaluation.benchmark import Setting


def setting(job: Job, batch: int, place: Place) -> Setting:
    """What is timed, as a row of the benchmark says it."""
    side = tiny.SIDE if place.rehearse else None
    return Setting(job.backbone, place.device, job.dtype, batch, side, options=job.options)


def build(job: Job, place: Place) -> DiffusionBackbone:
    """The backbone of a job. Its prompt is random numbers too: a blank one would be zeros, which are fast at times."""
    options = {key: value for key, value in job.options.items() if key not in ("channels_last", "graph")}
    if job.instead == WHOLE:
        options["truncate"] = False
    with tiny.networks() if place.rehearse else nullcontext():
        backbone = replace(setting(job, 1, place), options=options).build()
    for _, tensor in backbone.conditioning.items():
        if tensor.is_floating_point():
            tensor.normal_()
    return backbone.to(memory_format=torch.channels_last) if job.options.get("channels_last") else backbone


def ways(job: Job, backbone: DiffusionBackbone, x: Tensor) -> Mapping[str, Callable[[], Any]]:
    """What is timed by its name: calls on images ``x`` (B, 3, H, W)."""
    ids = backbone.declaration.recipe.ids
    if job.instead == WHOLE:
        return {benchmark.HOOKS: partial(backbone.forward_activations, x, ids)}
    if job.instead == EACH:
        return {benchmark.ENCODES: partial(benchmark._encode_each, backbone, backbone, x, ids)}
    if job.options.get("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {benchmark.BACKBONE: (backbone, x)}
    if backbone.architecture.encoder and not any(site.encoder for level in backbone.levels for site in level.sites):
        calls[benchmark.LATENTS] = (lambda z: backbone(latents=z), backbone.encode(x))
    return {
        way: captured(run, given) if job.options.get("graph") else partial(run, given)
        for way, (run, given) in calls.items()
    }
