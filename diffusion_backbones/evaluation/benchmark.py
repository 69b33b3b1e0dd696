"""How long a backbone takes, beside the usual ways of having the same features.

GDF's way keeps the whole pipeline in memory, runs the whole network and reads it with hooks; DIFT's way encodes an
image anew for each noise draw. Each gives the same features, which is checked before anything is timed.

Random weights do: neither operations nor bytes depend on their values.
"""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones import __version__
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.evaluation import memory_benchmark
from diffusion_backbones.evaluation.memory_benchmark import Footprint
from diffusion_backbones.factory.entry_points import create_model
from diffusion_backbones.families import FAMILIES
from diffusion_backbones.reports import costs
from diffusion_backbones.spec.configs import Configs, package_configs
from diffusion_backbones.spec.recipe import Level
from diffusion_backbones.spec.registry import get_declaration

BACKBONE, LATENTS, HOOKS, ENCODES = (
    "backbone",
    "backbone, latents given",
    "whole network, read with hooks",
    "an encode for each draw",
)
EAGER = "backbone, not compiled"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest difference between two ways, as a share of the largest value."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        name: A registered backbone.
        device, dtype: Where, and of weights and maps.
        batch: Images in a call.
        size: Side of the square images in pixels; the backbone's own by default.
        rounds: How often each way is timed, in turn, after one warm-up.
        load: Whether both are also written to a temporary folder, read again and run once, each in a process of its
            own, for seconds and memory.
        options: Further keywords of ``create_model``, such as ``fold`` or ``compile``, for the backbone alone.
    """

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    size: int | None = None
    rounds: int = 5
    load: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def side(self) -> int:
        return self.size or get_declaration(self.name).input_size

    def build(self) -> DiffusionBackbone:
        """With random weights."""
        torch.manual_seed(0)
        return create_model(self.name, dtype=self.dtype, device=self.device, noise=self.noise, **self.options)

    @property
    def noise(self) -> str:
        """The recipe's, but drawn alike for every way."""
        return "none" if get_declaration(self.name).recipe.noise == "none" else "fixed"

    def configs(self) -> Configs:
        return package_configs(get_declaration(self.name).checkpoint)

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.batch, 3, self.side, self.side, generator=generator) * 2 - 1).to(
            self.device, getattr(torch, self.dtype)
        )


@dataclass(frozen=True)
class Timing:
    """One way of having the features.

    Attributes:
        way: Which.
        seconds: Of each round, for the whole batch.
        gflops: 1e9 operations for one image, all noise draws; a multiply-add counts as two. None if they were not
            counted.
        parts: Seconds of the image encoder and of the denoiser within one call; the rest is padding, noise and the
            pyramid. Empty if not told apart.
        footprint: Seconds to load it and memory, if they were asked for.
    """

    way: str
    seconds: tuple[float, ...]
    gflops: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    footprint: Footprint | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def speed(self, other: Timing) -> float:
        """How many times as fast as another way: the median over rounds, each of which timed both."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))


@torch.no_grad()
def bench(setting: Setting, say: Callable[[str], None] = lambda text: None) -> list[Timing]:
    """Time a backbone and the usual ways, in turn, so that what else the machine does falls on all.

    Args:
        setting: What is timed.
        say: Is told what is done.

    Returns:
        The backbone, then the other ways that it has: latents are given where there is an image encoder, and an image
            is encoded for each draw
        where there are several.

    Raises:
        KeyError: No such backbone.
        RuntimeError: A way gives other features.
    """
    backbone, x = setting.build(), setting.images()
    recipe, ids = backbone.declaration.recipe, backbone.declaration.recipe.ids
    whole = _whole(setting)
    compiled = bool(setting.options.get("compile"))
    plain = replace(setting, options={**setting.options, "compile": False}).build() if compiled else backbone
    whole.denoiser.load_state_dict(
        plain.denoiser.state_dict(), strict=False, assign=True
    )  # shared, not twice in memory
    exact = "encoder" not in setting.options
    if exact:
        whole.encoder.load_state_dict(plain.encoder.state_dict(), assign=True)
    latents: dict[str, Any] = {"x": None, "latents": plain.encode(x)} if backbone.family.encoder else {}
    given: dict[str, Any] = {"x": x} if exact else latents
    same: dict[str, Callable[[], Any]] = {
        way: partial(model.forward_activations, ids=ids, **given)
        for way, model in ((BACKBONE, backbone), (HOOKS, whole))
    }
    ways: dict[str, Callable[[], Any]] = {BACKBONE: partial(backbone, x)}
    if latents and not any(site.encoder for level in backbone.levels for site in level.sites):
        ways[LATENTS] = partial(backbone, **latents)
        same[LATENTS] = partial(backbone.forward_activations, ids=ids, **latents)
    if latents and recipe.ensemble > 1:
        ways[ENCODES] = partial(_encode_each, whole, backbone, x, ids)
        if exact:
            same[ENCODES] = ways[ENCODES]
    if compiled:
        ways[EAGER] = partial(plain, x)
        began = time.perf_counter()
        _check(
            {BACKBONE: lambda: _named(ways[EAGER]()), "compiled": lambda: _named(ways[BACKBONE]())},
            TOLERANCE[setting.dtype],
        )
        say(f"Compiled in {time.perf_counter() - began:.0f} s.")
    ways[HOOKS] = partial(whole.forward_activations, x, ids)
    _check(same, TOLERANCE[setting.dtype])
    say(
        f"{' / '.join(ways)}: the same features{'' if exact else ' of the same latents'}. Timing {setting.rounds} "
        "rounds."
    )
    seconds = alternate(ways, setting.rounds, setting.device)
    measured = costs.measure(
        replace(backbone.declaration, recipe=replace(recipe, input_size=setting.side)), backbone.configs
    )
    denoiser = recipe.ensemble * measured.denoiser_gflops
    gflops = {BACKBONE: denoiser + measured.encoder_gflops, LATENTS: denoiser}
    inside = {} if "compile" in setting.options else {BACKBONE: parts(backbone, x)}
    footprints = {}
    if setting.load:
        del whole, plain, ways, same
        shape = (backbone.declaration, x.cpu(), setting.dtype, setting.device)
        options = {key: value for key, value in setting.options.items() if key == "compile"}  # others are in the folder
        with memory_benchmark.written(backbone, setting.dtype, say) as (saved, pipeline):
            del backbone
            footprints[BACKBONE] = memory_benchmark.alone(memory_benchmark.backbone, saved, *shape[1:], **options)
            footprints[HOOKS] = memory_benchmark.alone(memory_benchmark.pipeline, pipeline, *shape)
    return [
        Timing(way, tuple(times), gflops.get(way), inside.get(way, {}), footprints.get(way))
        for way, times in seconds.items()
    ]


def parts(backbone: DiffusionBackbone, x: Tensor) -> dict[str, float]:
    """Seconds of the ``encoder`` and of the ``denoiser`` in a call on images ``x``, and of the whole ``call``."""
    clock, device = {"encoder": 0.0, "denoiser": 0.0}, str(x.device)

    def tick(*_: Any) -> None:
        _wait(device)
        clock["denoiser"] -= time.perf_counter()

    def tock(*_: Any) -> None:
        _wait(device)
        clock["denoiser"] += time.perf_counter()

    hooks = [backbone.denoiser.register_forward_pre_hook(tick), backbone.denoiser.register_forward_hook(tock)]
    try:
        began = time.perf_counter()
        z = backbone.encode(x)
        _wait(device)
        clock["encoder"] = time.perf_counter() - began if backbone.family.encoder else 0.0
        backbone.forward_latents(z, size=(x.shape[-2], x.shape[-1]))
        _wait(device)
        return {**clock, "call": time.perf_counter() - began}
    finally:
        for hook in hooks:
            hook.remove()


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way, run in turn ``rounds`` times after one warm-up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds + 1):
        for way, run in ways.items():
            seconds = once(run, device)
            if i:
                times[way].append(seconds)
    return times


def once(run: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def matmul_gflops(device: str = "cpu", dtype: str = "float32", side: int = 4096) -> float:
    """What the device reaches in a product of two square matrices, 1e9 operations a second, the best of five."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = alternate({"product": partial(torch.mm, a, b)}, 5, device)["product"]
    return 2 * side**3 / min(seconds) / 1e9


def rows(timings: Sequence[Timing], setting: Setting, product: float) -> list[dict[str, Any]]:
    """A row for each way, with all that it depends on, for a CSV.

    Args:
        product: Of :func:`matmul_gflops`.
    """
    [hooks] = [timing for timing in timings if timing.way == HOOKS]
    shared = {
        "date": datetime.date.today().isoformat(), "hardware": hardware(setting.device), "backbone": setting.name,
        "options": " ".join(f"{key}={value}" for key, value in setting.options.items()), "dtype": setting.dtype, "batch": setting.batch,
        "size": setting.side, "rounds": setting.rounds, "matmul_gflops": product, "torch": torch.__version__, "package": __version__,
        "command": _command(),
    }  # fmt: skip
    return [
        {
            "way": timing.way, "seconds": timing.median, "least": min(timing.seconds), "most": max(timing.seconds), "speed": timing.speed(hooks),
            "gflops": timing.gflops, "share_of_matmul": timing.gflops and setting.batch * timing.gflops / timing.median / product,
            "encoder_seconds": timing.parts.get("encoder"), "denoiser_seconds": timing.parts.get("denoiser"), "parts_seconds": timing.parts.get("call"),
            "load_seconds": timing.footprint and timing.footprint.seconds, "weights_bytes": timing.footprint and timing.footprint.weights,
            "peak_bytes": timing.footprint and timing.footprint.peak, **shared,
        }
        for timing in timings
    ]  # fmt: skip


def write(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Append rows to a CSV; numbers have four digits."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]))
        if new:
            writer.writeheader()
        writer.writerows(
            {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in found
        )


def hardware(device: str) -> str:
    """The device in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _encode_each(
    whole: DiffusionBackbone, backbone: DiffusionBackbone, x: Tensor, ids: Sequence[str]
) -> dict[str, Tensor]:
    """DIFT repeats the image and encodes all copies, which with a posterior's mode are one latent; its denoiser stops
    early too.
    """
    z = whole.encode(x.repeat(backbone.declaration.recipe.ensemble, 1, 1, 1))[: len(x)]
    return backbone.forward_activations(None, ids, latents=z)


def _whole(setting: Setting) -> DiffusionBackbone:
    """The same recipe on a network that nothing was cut off: the only level is the last activation, and the recipe's
    are read with hooks.
    """
    declaration = get_declaration(setting.name)
    recipe = declaration.recipe
    catalogue = FAMILIES[declaration.checkpoint.family].activations(setting.configs(), setting.name)
    last = [
        site.id for site in (catalogue[id] for id in catalogue) if not site.encoder and site.layout in ("map", "tokens")
    ][-1]
    recipe = replace(
        recipe, levels=(Level((last,)),), discard=(), normalise="none"
    )  # of the maps, which are not compared
    torch.manual_seed(0)  # the weights of Setting.build
    return create_model(
        declaration.checkpoint.name, recipe=recipe, dtype=setting.dtype, device=setting.device, noise=setting.noise
    )


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"level {i}": level for i, level in enumerate(maps)}


def _check(same: Mapping[str, Callable[[], dict[str, Tensor]]], tolerance: float) -> None:
    expected = same[BACKBONE]()
    for way, run in same.items():
        for id, act in run().items():
            difference = float((act - expected[id]).abs().max() / expected[id].abs().max())
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{way}: {id} differs by {difference:.2g} of the largest value; what is timed would not be the same"
                )


def _command() -> str:
    """As it was typed, but for the file that it writes to."""
    words = ["", Path(sys.argv[0]).name, *sys.argv[1:]]
    return " ".join(word for before, word in pairwise(words) if before != "--csv" and word.partition("=")[0] != "--csv")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
