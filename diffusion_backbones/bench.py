"""How long a backbone takes, beside the usual ways of having the same features.

GDF's way keeps the whole pipeline in memory, runs the whole network and reads it with hooks; DIFT's way encodes an image anew for each noise draw. Each
gives the same features, which is checked before anything is timed.

Random weights do: neither operations nor bytes depend on their values.
"""

from __future__ import annotations

import csv
import datetime
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_backbones import __version__, costs
from diffusion_backbones.backbone import DiffusionBackbone
from diffusion_backbones.factory import create_model
from diffusion_backbones.families import FAMILIES, Configs
from diffusion_backbones.recipe import Level
from diffusion_backbones.registry import get_declaration, package_configs

BACKBONE, LATENTS, HOOKS, ENCODES = "backbone", "backbone, latents given", "whole network, read with hooks", "an encode for each draw"
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
    """

    name: str
    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1
    size: int | None = None
    rounds: int = 5

    @property
    def side(self) -> int:
        return self.size or get_declaration(self.name).input_size

    def build(self) -> DiffusionBackbone:
        """With random weights."""
        torch.manual_seed(0)
        return create_model(self.name, dtype=self.dtype, device=self.device, noise=self.noise)

    @property
    def noise(self) -> str:
        """The recipe's, but drawn alike for every way."""
        return "none" if get_declaration(self.name).recipe.noise == "none" else "fixed"

    def configs(self) -> Configs:
        return package_configs(get_declaration(self.name).checkpoint)

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.batch, 3, self.side, self.side, generator=generator) * 2 - 1).to(self.device, getattr(torch, self.dtype))


@dataclass(frozen=True)
class Timing:
    """One way of having the features.

    Attributes:
        way: Which.
        seconds: Of each round, for the whole batch.
        gflops: 1e9 operations for one image, all noise draws; a multiply-add counts as two. None if they were not counted.
        peak: Bytes in use at most while it was built and ran once in a process of its own, less what importing took; None where that cannot be read.
        ready: Seconds until it was built, in that process.
    """

    way: str
    seconds: tuple[float, ...]
    gflops: float | None = None
    peak: int | None = None
    ready: float | None = None

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
        The backbone, then the other ways that it has: latents are given where there is an image encoder, and an image is encoded for each draw
        where there are several.

    Raises:
        KeyError: No such backbone.
        RuntimeError: A way gives other features.
    """
    backbone, x = setting.build(), setting.images()
    recipe, ids = backbone.declaration.recipe, backbone.declaration.recipe.ids
    whole = _whole(setting)
    whole.denoiser.load_state_dict(backbone.denoiser.state_dict(), strict=False, assign=True)          # shared, not twice in memory
    whole.encoder = backbone.encoder
    ways: dict[str, Callable[[], Any]] = {BACKBONE: partial(backbone, x)}
    same: dict[str, Callable[[], dict[str, Tensor]]] = {BACKBONE: partial(backbone.forward_activations, x, ids)}
    same[HOOKS] = partial(whole.forward_activations, x, ids)
    if backbone.family.encoder:
        z = backbone.encode(x)
        if not any(site.encoder for level in backbone.levels for site in level.sites):
            ways[LATENTS] = partial(backbone, latents=z)
            same[LATENTS] = partial(backbone.forward_activations, None, ids, latents=z)
        if recipe.ensemble > 1:
            ways[ENCODES] = same[ENCODES] = partial(_encode_each, backbone, x, ids)
    ways[HOOKS] = same[HOOKS]
    _check(same, TOLERANCE[setting.dtype])
    say(f"{' / '.join(ways)}: the same features. Timing {setting.rounds} rounds.")
    seconds = alternate(ways, setting.rounds, setting.device)
    measured = costs.measure(replace(backbone.declaration, recipe=replace(recipe, input_size=setting.side)), backbone.configs)
    denoiser = recipe.ensemble * measured.denoiser_gflops
    gflops = {BACKBONE: denoiser + measured.encoder_gflops, LATENTS: denoiser}
    del backbone, whole, ways, same
    say("Each once in a process of its own, for its memory.")
    alone = {way: in_own_process(_peak, setting, way) for way in (BACKBONE, HOOKS)}
    return [Timing(way, tuple(times), gflops.get(way), *alone.get(way, (None, None))) for way, times in seconds.items()]


def alternate(ways: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each way, run in turn ``rounds`` times after one warm-up."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(rounds + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            _wait(device)
            if i:
                times[way].append(time.perf_counter() - began)
    return times


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
    return [
        {
            "date": datetime.date.today().isoformat(), "backbone": setting.name, "way": timing.way, "hardware": hardware(setting.device),
            "dtype": setting.dtype, "batch": setting.batch, "size": setting.side, "rounds": setting.rounds,
            "seconds": timing.median, "least": min(timing.seconds), "most": max(timing.seconds), "speed": timing.speed(hooks), "gflops": timing.gflops,
            "matmul_gflops": product, "share_of_matmul": timing.gflops and setting.batch * timing.gflops / timing.median / product,
            "peak_bytes": timing.peak, "ready_seconds": timing.ready, "torch": torch.__version__, "package": __version__,
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
        writer.writerows({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()} for row in found)


def hardware(device: str) -> str:
    """The device in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _encode_each(backbone: DiffusionBackbone, x: Tensor, ids: Sequence[str]) -> dict[str, Tensor]:
    """DIFT repeats the image and encodes all copies, which with a posterior's mode are one latent."""
    z = backbone.encode(x.repeat(backbone.declaration.recipe.ensemble, 1, 1, 1))[: len(x)]
    return backbone.forward_activations(None, ids, latents=z)


def _whole(setting: Setting) -> DiffusionBackbone:
    """The same recipe on a network that nothing was cut off: the only level is the last activation, and the recipe's are read with hooks."""
    declaration = get_declaration(setting.name)
    recipe = declaration.recipe
    catalogue = FAMILIES[declaration.checkpoint.family].activations(setting.configs(), setting.name)
    last = [site.id for site in (catalogue[id] for id in catalogue) if not site.encoder and site.layout in ("map", "tokens")][-1]
    recipe = replace(recipe, levels=(Level((last,)),))
    return create_model(declaration.checkpoint.name, recipe=recipe, dtype=setting.dtype, device=setting.device, noise=setting.noise)


def _check(same: Mapping[str, Callable[[], dict[str, Tensor]]], tolerance: float) -> None:
    expected = same[BACKBONE]()
    for way, run in same.items():
        for id, act in run().items():
            difference = float((act - expected[id]).abs().max() / expected[id].abs().max())
            if not difference <= tolerance:
                raise RuntimeError(f"{way}: {id} differs by {difference:.2g} of the largest value; what is timed would not be the same")


# Memory.


def in_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """What a function gives in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


@torch.no_grad()
def _peak(setting: Setting, way: str) -> tuple[int | None, float]:
    """Most bytes in use while a way was built and ran once, and seconds until it was built."""
    import transformers  # noqa: F401

    create_model(setting.name, device="meta")                                # imports all that is needed, so that it counts for nothing
    x, before = setting.images(), _memory(setting.device, start=True)
    began = time.perf_counter()
    if way == BACKBONE:
        backbone = setting.build()
        ready = time.perf_counter() - began
        backbone(x)
    else:
        backbone, *others = _whole(setting), *_rest_of_pipeline(setting)
        ready = time.perf_counter() - began
        backbone.forward_activations(x, get_declaration(setting.name).recipe.ids)
        del others
    _wait(setting.device)
    after = _memory(setting.device)
    return (None if before is None or after is None else after - before), ready


def _rest_of_pipeline(setting: Setting) -> list[Any]:
    """What a pipeline holds beside the denoiser and the image encoder: the decoder and the text encoders."""
    import transformers

    declaration = get_declaration(setting.name)
    family, configs = FAMILIES[declaration.checkpoint.family], setting.configs()
    rest: list[Any] = []
    with torch.device(setting.device):
        if family.encoder:
            vae = family.image_encoder.build(family.encoder_config(configs))
            rest += [vae.decoder] if hasattr(vae, "decoder") else []
        for name in family.text_encoder_names(configs):
            cls = getattr(transformers, configs[name]["architectures"][0])
            rest.append(cls(cls.config_class(**{key: value for key, value in configs[name].items() if key != "architectures"})))
    return [module.to(getattr(torch, setting.dtype)) for module in rest]


def _memory(device: str, start: bool = False) -> int | None:
    """Bytes in use: at the ``start`` of a measurement now, later the most since then. None where it cannot be read."""
    if torch.device(device).type == "cuda":
        if start:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    if start and Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    return next((int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmHWM")), None)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
