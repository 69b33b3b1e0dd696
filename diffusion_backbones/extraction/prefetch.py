"""Bounded prefetching: a ``map`` that computes ahead in threads. Several can stand in a row and work at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


@contextmanager
def threads(n: int, finish: bool) -> Iterator[Executor | None]:
    """Threads for :func:`prefetch_map`, or None for 0. On exit, also by an error, all of them have ended.

    Each runs its tensor operations on one core, so that they do not take the cores from the thread that computes.

    Args:
        n: Number of threads.
        finish: Whether calls that still wait for a thread on exit are finished or dropped. A call that has begun is
            always finished.
    """
    if n == 0:
        yield None
        return
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=not finish)
        torch.set_num_threads(before)  # this thread kept its number; those started from now on get it again


def prefetch_map(pool: Executor | None, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """``map(function, items)`` in the threads of ``pool``: the same order, and errors at the same place.

    Items are taken in the thread that consumes the results, and at most ``depth + 1`` of them are under way: a slow
    consumer blocks its producer, so memory stays bounded. Without a pool it is ``map``.

    Args:
        pool: From :func:`threads`.
        function: Called in the threads of the pool.
        items: Any iterable, such as another map of this kind.
        depth: Number of results that are computed, or wait, while the last one is used.
    """
    if pool is None:
        yield from map(function, items)
        return
    begun: deque[Future[B]] = deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) > depth:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
