"""Where jobs run, and what the process that runs them needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.device.jobs import Job


@dataclass(frozen=True)
class Place:
    """Where a job runs.

    Args:
        device: A torch device.
        out: The folder of what is written.
        rehearse: Whether networks are tiny and nothing is compiled.
    """

    device: str
    out: Path
    rehearse: bool

    def prepare(self) -> tuple[Callable[[Job], Iterator[Mapping[str, Any]]], Callable[[], bool]]:
        """Import what jobs need.

        Returns:
            A function that gives the rows of a job, and one that says whether the device still computes.
        """
        import torch  # here, so that the process that waits starts at once

        from benchmarks.device import measures
        from diffusion_backbones import create_model

        create_model("tinysd_gdf", device="meta")  # imports what networks need, which is not a job's time
        torch.set_grad_enabled(False)
        if self.rehearse:
            torch.compiler.set_stance("force_eager")
            torch.set_num_threads(1)  # tiny tensors: on a busy machine threads wait for each other far longer
        return lambda job: measures.run(job, self), lambda: measures.well(self.device)
