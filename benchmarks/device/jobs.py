"""What is measured, in the order in which it is wanted: a run that is cut off has told the most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

WHOLE, EACH = "whole", "each"
"""What a job times in place of the backbone: GDF's way, the whole network with hooks; DIFT's, an encode a draw."""

LAYOUT, GRAPH, FOLD = {"channels_last": True}, {"graph": True}, {"fold": True}
"""``channels_last`` and ``graph`` are done to a backbone once it is built; the rest are options of ``create_model``."""
PLAIN: tuple[Mapping[str, Any], ...] = ({}, LAYOUT, GRAPH, FOLD, LAYOUT | GRAPH | FOLD)
COMPILED = {"compile": "default"}
ALL = LAYOUT | GRAPH | FOLD | COMPILED


@dataclass(frozen=True)
class Job:
    """One backbone, built once in one way, at several batch sizes.

    Args:
        measure: A function of :mod:`~benchmarks.device.measures`.
        backbone: A registered backbone.
        batches: Images in a call; a row for each, or a few.
        options: Options of ``create_model``, ``channels_last`` and ``graph``.
        dtype: Dtype of weights and maps.
        instead: :data:`WHOLE` or :data:`EACH`, or empty for the backbone itself.
        expects: Seconds that it is thought to take. With fewer left it is skipped.
        limit: Seconds after which it is stopped.
    """

    measure: str
    backbone: str = ""
    batches: Sequence[int] = (1,)
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    instead: str = ""
    expects: float = 10
    limit: float = 45

    @property
    def compiles(self) -> bool:
        """Whether it waits for a compiler, which takes long or never ends."""
        return "compile" in self.options

    def rehearsed(self) -> Job:
        """The same with what a CPU can do: one and two images in place of many, no float16, and more time."""
        return replace(self, batches=(1, 2)[: len(self.batches)], dtype="bfloat16", limit=600)

    @property
    def name(self) -> str:
        """How the job is called where it is chosen and reported."""
        words = [self.measure, self.backbone, self.instead, *(f"{k}={v}" for k, v in self.options.items()), self.dtype]
        return " ".join(filter(None, words))

    def has(self, words: Sequence[str]) -> bool:
        """Whether all the words are in its name."""
        return all(word in self.name for word in words)


def jobs() -> Iterator[Job]:
    """All jobs; the first says whether anything can be measured at all."""
    yield Job("product", expects=0, limit=90)
    yield from _plain("sd15_gdf", (1, 8, 32))
    yield Job("profile", "sd15_gdf", (1, 8))
    yield Job("profile", "sd15_gdf", (8,), LAYOUT)
    yield from _plain("sdxl_gdf", (1, 8))
    yield Job("extract", "sd15_gdf", (8,), expects=25, limit=90)
    yield _compiled("sd15_gdf", (8, 32, 1), COMPILED)
    yield from _plain("sd21_dift", (1, 8))
    yield from _int8("flux_dev_ditf", expects=20)
    yield from _int8("sd3_medium_seg4diff", expects=10)
    yield _compiled("sd15_gdf", (8, 32, 1), ALL)
    yield Job("load", "sd15_gdf", expects=45, limit=120)
    yield _compiled("sdxl_gdf", (1, 8), ALL)
    yield _compiled("sd15_gdf", (8, 1), {"compile": "max"})
    yield _compiled("sdxl_gdf", (1, 8), COMPILED)
    yield _compiled("sd21_dift", (8, 1), ALL)
    yield _compiled("sd21_dift", (8, 1), COMPILED)


def _plain(name: str, batches: Sequence[int]) -> Iterator[Job]:
    """What needs no compiler. GDF's way comes first: the others are so many times as fast."""
    for dtype in ("float16", "bfloat16"):
        yield Job("speed", name, batches, dtype=dtype, instead=WHOLE)
    if name == "sd21_dift":  # the only one of several draws
        yield Job("speed", name, batches, dtype="float16", instead=EACH)
    for options in PLAIN:
        yield Job("speed", name, batches, options)


def _int8(name: str, expects: float) -> Iterator[Job]:
    yield Job("speed", name, instead=WHOLE, expects=expects, limit=90)
    for options in ({}, {"weight_dtype": "int8"}):
        yield Job("speed", name, (1,), options, expects=expects, limit=90)


def _compiled(name: str, batches: Sequence[int], options: Mapping[str, Any]) -> Job:
    return Job("speed", name, batches, options, expects=60, limit=150)
