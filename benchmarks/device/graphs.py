"""A call as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor

from diffusion_backbones.backbone import pipeline

Maps = Sequence[Tensor]
WARM_UPS = 3


def captured(run: Callable[[Tensor], Maps], x: Tensor) -> Callable[[], Maps]:
    """A call that copies ``x`` to where the graph reads it, and starts all kernels of ``run`` at once.

    The check of images reads values on the host, which no graph can, and is left out. On the CPU, where there are no
    graphs, it is the call itself, without the check.

    Raises:
        AssertionError: The graph gives other maps.
        RuntimeError: The call cannot be captured.
    """
    with mock.patch.object(pipeline, "check_image"):
        expected, given = [level.clone() for level in run(x)], x.clone()
        replay = _cuda_graph(run, given) if x.is_cuda else lambda: run(given)

        def call() -> Maps:
            given.copy_(x)
            return replay()

        for ours, theirs in zip(call(), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))
    return call


def _cuda_graph(run: Callable[[Tensor], Maps], x: Tensor) -> Callable[[], Maps]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set up what they need at their first calls, which a graph must not hold
        for _ in range(WARM_UPS):
            run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        maps = run(x)

    def replay() -> Maps:
        graph.replay()
        return maps

    return replay
