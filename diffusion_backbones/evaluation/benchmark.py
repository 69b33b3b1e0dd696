"""How long a backbone takes, beside the usual ways to get the same features.

GDF's way keeps the whole pipeline in memory, runs the whole network and reads it with hooks; DIFT's way encodes an
image anew for each noise draw. Each gives the same features, which is checked before anything is timed.

Weights are random, since neither operations nor bytes depend on their values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.evaluation import memory_benchmark
from diffusion_backbones.evaluation.memory_benchmark import Footprint
from diffusion_backbones.factory.entry_points import with_random_weights
from diffusion_backbones.reports import costs
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
TURNS = partial(tqdm, desc="Timing", unit="call", disable=None, leave=False)
"""A bar on a terminal."""


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Args:
        name: A registered backbone.
        device: Where it runs.
        dtype: Dtype of weights and maps.
        batch: Images in a call.
        size: Side of the square images in pixels; the backbone's own by default.
        rounds: How often each way is timed, in turn, after one warm-up.
        load: Whether the backbone and the usual pipeline are also written to a temporary folder, loaded and run once,
            each in a process of its own, for seconds and memory.
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
        """Side of the square images in pixels."""
        return self.size or get_declaration(self.name).input_size

    def build(self) -> DiffusionBackbone:
        """The backbone, with random weights."""
        torch.manual_seed(0)
        return with_random_weights(self.name, dtype=self.dtype, device=self.device, noise=self.noise, **self.options)

    @property
    def noise(self) -> str:
        """The recipe's noise, but fixed where it is random, so that every way gets the same."""
        return "none" if get_declaration(self.name).recipe.noise == "none" else "fixed"

    def images(self) -> Tensor:
        """Random images (batch, 3, side, side) in [-1, 1]."""
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.batch, 3, self.side, self.side, generator=generator) * 2 - 1).to(
            self.device, getattr(torch, self.dtype)
        )


@dataclass(frozen=True)
class Timing:
    """One way to get the features, timed.

    Attributes:
        way: Its name.
        seconds: Seconds of each round, for the whole batch.
        gflops: 1e9 operations for one image, all noise draws; a multiply-add counts as two. None if they were not
            counted.
        parts: Seconds of the image encoder and of the denoiser within one call; the rest is padding, noise and the
            pyramid. Empty if they were not measured.
        footprint: Seconds to load it and memory, if they were asked for.
    """

    way: str
    seconds: tuple[float, ...]
    gflops: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    footprint: Footprint | None = None

    @property
    def median(self) -> float:
        """Median of the seconds."""
        return statistics.median(self.seconds)

    def speed(self, other: Timing) -> float:
        """How many times as fast as another way, by the medians, so that whoever reads both can divide them."""
        return other.median / self.median


@torch.no_grad()
def bench(setting: Setting, say: Callable[[str], None] = lambda _: None) -> list[Timing]:
    """Time a backbone and the usual ways in turn, so that what else the machine does slows all of them alike.

    Args:
        setting: What is timed.
        say: Called with progress messages.

    Returns:
        The backbone, then its other ways: with the latents given if there is an image encoder, and with an encode for
        each draw if there are several draws.

    Raises:
        KeyError: The backbone is unknown.
        RuntimeError: A way gives other features.
    """
    contest = _Contest(setting)
    if contest.compiled:
        say(f"Compiled in {contest.compile():.0f} s.")
    contest.check()
    alike = "the same features" if contest.exact else "the same features of the same latents"
    say(f"{' / '.join(contest.ways)}: {alike}. Timing {setting.rounds} rounds.")
    seconds = alternate(contest.ways, setting.rounds, setting.device, TURNS)
    gflops, inside = contest.gflops(), {}
    if "compile" not in setting.options:
        inside[BACKBONE] = parts(contest.backbone, contest.x)
    backbone, x = contest.backbone, contest.x
    del contest  # the whole network must not stay in memory beside those that are loaded
    footprints = _footprints(backbone, x, setting, say) if setting.load else {}
    return [
        Timing(way, tuple(times), gflops.get(way), inside.get(way, {}), footprints.get(way))
        for way, times in seconds.items()
    ]


class _Contest:
    """A backbone, its whole network with the same weights, and the ways to get features from them.

    Attributes:
        ways: Name -> a call that is timed.
        same: Name -> a call that gives activations by id, which must agree.
    """

    def __init__(self, setting: Setting):
        self.tolerance = TOLERANCE[setting.dtype]
        self.compiled, self.exact = bool(setting.options.get("compile")), "encoder" not in setting.options
        self.backbone, self.x, self.side = setting.build(), setting.images(), setting.side
        eager = replace(setting, options={**setting.options, "compile": False})
        self.plain = eager.build() if self.compiled else self.backbone
        self.whole = replace(setting, options={"truncate": False}).build()
        shared = self.plain.denoiser.state_dict()  # shared, not twice in memory
        self.whole.denoiser.load_state_dict(shared, strict=False, assign=True)
        if self.exact:
            self.whole.encoder.load_state_dict(self.plain.encoder.state_dict(), assign=True)
        self.ways: dict[str, Callable[[], Any]] = {}
        self.same: dict[str, Callable[[], dict[str, Tensor]]] = {}
        self._add_ways()

    def _add_ways(self) -> None:
        backbone, whole, x = self.backbone, self.whole, self.x
        recipe, ids = backbone.declaration.recipe, backbone.declaration.recipe.ids
        latents: dict[str, Any] = {}
        if backbone.architecture.encoder:
            latents = {"x": None, "latents": self.plain.encode(x)}
        given: dict[str, Any] = {"x": x} if self.exact else latents
        self.same[BACKBONE] = partial(backbone.forward_activations, ids=ids, **given)
        self.same[HOOKS] = partial(whole.forward_activations, ids=ids, **given)
        self.ways[BACKBONE] = partial(backbone, x)
        if latents and not any(site.encoder for level in backbone.levels for site in level.sites):
            self.ways[LATENTS] = partial(backbone, **latents)
            self.same[LATENTS] = partial(backbone.forward_activations, ids=ids, **latents)
        if latents and recipe.ensemble > 1:
            self.ways[ENCODES] = partial(_encode_each, whole, backbone, x, ids)
            if self.exact:
                self.same[ENCODES] = self.ways[ENCODES]
        if self.compiled:
            self.ways[EAGER] = partial(self.plain, x)
        self.ways[HOOKS] = partial(whole.forward_activations, x, ids)

    def compile(self) -> float:
        """Seconds until the compiled backbone has run once and agreed with the one that is not compiled."""
        began = time.perf_counter()
        eager, compiled = (lambda way=way: _named(self.ways[way]()) for way in (EAGER, BACKBONE))
        _check({BACKBONE: eager, "compiled": compiled}, self.tolerance)
        return time.perf_counter() - began

    def check(self) -> None:
        """Raise ``RuntimeError`` if a way gives other features."""
        _check(self.same, self.tolerance)

    def gflops(self) -> dict[str, float]:
        """1e9 operations for one image, of the ways for which they are known."""
        recipe = replace(self.backbone.declaration.recipe, input_size=self.side)
        measured = costs.measure(replace(self.backbone.declaration, recipe=recipe), self.backbone.configs)
        denoiser = self.backbone.plan.passes * measured.denoiser_gflops
        return {BACKBONE: denoiser + measured.encoder_gflops, LATENTS: denoiser}


def _footprints(
    backbone: DiffusionBackbone, x: Tensor, setting: Setting, say: Callable[[str], None]
) -> dict[str, Footprint]:
    """Seconds to load and memory, of the saved backbone and of the pipeline."""
    declaration, dtype, device, x = backbone.declaration, setting.dtype, setting.device, x.cpu()
    options = {key: value for key, value in setting.options.items() if key == "compile"}  # others are in the folder
    with memory_benchmark.written(backbone, dtype, say) as (saved, pipeline):
        work = memory_benchmark.backbone, memory_benchmark.pipeline
        return {
            BACKBONE: memory_benchmark.alone(work[0], saved, x, dtype, device, **options),
            HOOKS: memory_benchmark.alone(work[1], pipeline, declaration, x, dtype, device),
        }


def parts(backbone: DiffusionBackbone, x: Tensor) -> dict[str, float]:
    """Seconds of the ``encoder`` and of the ``denoiser`` in a call on images ``x`` (B, 3, H, W), and of the whole
    ``call``.
    """
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
        clock["encoder"] = time.perf_counter() - began if backbone.architecture.encoder else 0.0
        backbone.forward_latents(z, size=(x.shape[-2], x.shape[-1]))
        _wait(device)
        return {**clock, "call": time.perf_counter() - began}
    finally:
        for hook in hooks:
            hook.remove()


def alternate(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    progress: Callable[[list[tuple[int, str]]], Iterable[tuple[int, str]]] = iter,
) -> dict[str, list[float]]:
    """Seconds of each way, run in turn ``rounds`` times after one warm-up. ``progress`` wraps the turns."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for i, way in progress([(i, way) for i in range(rounds + 1) for way in ways]):
        seconds = once(ways[way], device)
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
    """1e9 operations a second that the device reaches in a product of two square matrices, the best of five."""
    a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    seconds = alternate({"product": partial(torch.mm, a, b)}, 5, device)["product"]
    return 2 * side**3 / min(seconds) / 1e9


def _encode_each(
    whole: DiffusionBackbone, backbone: DiffusionBackbone, x: Tensor, ids: Sequence[str]
) -> dict[str, Tensor]:
    """DIFT's way: repeat the image and encode all copies, which with a posterior's mode are one latent. Its denoiser
    stops early too.
    """
    z = whole.encode(x.repeat(backbone.declaration.recipe.ensemble, 1, 1, 1))[: len(x)]
    return backbone.forward_activations(None, ids, latents=z)


def _named(maps: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"level {i}": level for i, level in enumerate(maps)}


def _check(same: Mapping[str, Callable[[], dict[str, Tensor]]], tolerance: float) -> None:
    expected = same[BACKBONE]()
    for way, run in same.items():
        for name, act in run().items():
            difference = float((act - expected[name]).abs().max() / expected[name].abs().max())
            if not difference <= tolerance:
                raise RuntimeError(
                    f"{way}: {name} differs by {difference:.2g} of the largest value, and equal features differ by at "
                    f"most {tolerance:g}; these would not be timed alike"
                )


def _wait(device: str) -> None:
    """Block until the device has finished; the CPU always has."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(device)
