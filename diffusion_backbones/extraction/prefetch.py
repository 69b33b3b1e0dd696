"""Maps that run ahead of who takes from them, one behind the other: each works while the others do, and none gets far
ahead.
"""

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
    """Threads for :func:`ahead`, none for 0. When this is left, by an error too, none of them runs any longer.

    Each does its tensor operations alone, so that they do not take the cores from the thread that computes.

    Args:
        n: How many.
        finish: Whether what still waits for a thread then is done or dropped. What has begun is always done.
    """
    if n == 0:
        yield None
        return
    alone = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=not finish)
        torch.set_num_threads(alone)  # this thread kept its number; those started from now on get it again


def ahead(pool: Executor | None, function: Callable[[A], B], items: Iterable[A], depth: int) -> Iterator[B]:
    """``map(function, items)`` in the threads of ``pool``, in order, with errors where they would be raised there.

    Items are taken in the thread that takes the results, and never more than ``depth + 1`` of them are under way: so
    who is slow stops who is before it, and memory does not grow. Without a pool it is ``map``.

    Args:
        pool: Of :func:`threads`.
        function: Called in its threads.
        items: May be another map of this kind.
        depth: How many results are worked on, or wait, while the last one is used.
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
