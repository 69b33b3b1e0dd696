"""Inputs that cannot be right, and what became of each: for :mod:`test_fuzz`.

Whether a value can be is decided by predicates that are written from the documentation and share no code with
the package.
"""

from __future__ import annotations

import ast
import functools
import math
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import diffusion_backbones as db

PACKAGE = Path(db.__file__).parent
FUZZ = int(os.environ.get("FUZZ", "1"))
"""How many times the number of inputs that CI draws."""
RAW = 0.03
"""The largest share of errors that are another library's and not explained."""

JUNK = [
    *(True, False, 0, 1, 2, -1, 7, 2**31, 2**63, 2**65, -(2**70), 0.5, -0.0, 1e300),
    *(
        float("nan"),
        float("inf"),
        -float("inf"),
        1j,
        b"1",
        "",
        "0",
        "1",
        "False",
        "no",
        "fixed",
        "none",
        "x" * 300,
        "\x00",
    ),
    *([], [0], [1.5], [True], ["0"], [None], [[]], (), (1, 2), (4, 2), {}, {"a": 1}, {1}, range(3), object(), object),
    *(np.int64(3), np.float64("nan"), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.array(["a"]), np.array(2)),
    *(torch.tensor(3), torch.tensor([1.0, float("nan")]), torch.zeros(0), torch.zeros(2, dtype=torch.bool)),
    *(torch.zeros(3, dtype=torch.complex64), torch.float32, torch.device("cpu"), Path("nowhere"), slice(2), len),
]
"""Values of every kind that Python, numpy and torch have."""


def plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's."""
    return value.item() if isinstance(value, (np.generic, np.ndarray, torch.Tensor)) and value.ndim == 0 else value


def is_int(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    value = plain(value)
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_count(value: Any) -> bool:
    return is_int(value, 1, 2**31 - 1)


def is_bool(value: Any) -> bool:
    return isinstance(plain(value), bool)


def is_real(value: Any, low: float, high: float) -> bool:
    value = plain(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def is_one_of(*known: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (str, bool)) and value in known


def is_list_of(member: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and all(map(member, value))


def is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass
class Survey:
    """What became of the inputs of one kind: refused with an error of ours, refused raw, accepted, or wrong."""

    kind: str
    ours: int = 0
    accepted: int = 0
    raw: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def refuses(
        self, what: Any, function: Callable[[], Any], must: bool, right: Callable[[Any], bool] | None = None
    ) -> None:
        """Run one input.

        Args:
            what: Says which.
            function: Uses it.
            must: Whether it must be refused.
            right: Whether a result of an input that may be accepted is right.
        """
        try:
            result = function()
        except (Exception, SystemExit) as error:
            if is_ours(error):
                self.ours += 1
            else:
                self.raw.append(f"{what!r:.200}: {type(error).__name__}: {error!s:.200} ({frame(error)})")
        else:
            self.accepted += 1
            if must or (right is not None and not right(result)):
                self.wrong.append(f"{what!r:.300}")

    def check(self) -> None:
        """Nothing is accepted that cannot be right, and few errors are those of other libraries."""
        total = self.ours + self.accepted + len(self.raw)
        said = (
            f"{self.kind}: {total} inputs, {self.ours} refused by name, {self.accepted} accepted, {len(self.raw)} raw"
        )
        print(said)
        assert not self.wrong, f"{said}; accepted, and wrong: " + "\n".join(self.wrong)
        assert len(self.raw) <= RAW * total, f"{said}:\n" + "\n".join(self.raw)


def survey(kind: str, strategy: st.SearchStrategy[Any], examples: int, one: Callable[[Survey, Any], None]) -> None:
    """Draw inputs, always the same ones, run each, and check what became of them."""
    found = Survey(kind)

    @settings(
        max_examples=examples * FUZZ,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        one(found, drawn)

    run()
    found.check()


def is_ours(error: BaseException) -> bool:
    """Whether an error is raised, in so many words, by a statement of this package, or is one of the command line's."""
    if isinstance(error, SystemExit):
        return error.code in (1, 2) and is_ours(error.__context__) if error.__context__ else error.code in (1, 2)
    if isinstance(error, click.UsageError):
        return True
    if isinstance(error, click.ClickException) and error.__cause__ is not None:
        return is_ours(error.__cause__)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(PACKAGE) and last.lineno in _raises(last.filename)


@functools.cache
def _raises(filename: str) -> frozenset[int]:
    """The lines of a file's ``raise`` statements."""
    nodes = [node for node in ast.walk(ast.parse(Path(filename).read_text())) if isinstance(node, ast.Raise)]
    return frozenset(line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1))


def frame(error: BaseException) -> str:
    """Where an error was raised, and the last line of this package on the way there."""
    steps = traceback.extract_tb(error.__traceback__)
    own = [step for step in steps if Path(step.filename).is_relative_to(PACKAGE)]
    return " < ".join(f"{Path(step.filename).name}:{step.lineno}" for step in (steps[-1:] + own[-1:]))
