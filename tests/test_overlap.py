"""Bounded prefetching: the results of ``map``, computed at the same time, and never more under way than the depth."""

from __future__ import annotations

import threading
from itertools import count, islice

import pytest
import torch

from diffusion_backbones.extraction.prefetch import prefetch_map, threads


def slowed(i: int) -> int:
    """Later items are done sooner, so that order is no accident."""
    threading.Event().wait(0.002 * (7 - i % 8))
    return i * i


@pytest.mark.parametrize(("workers", "depth"), [(0, 3), (1, 0), (1, 5), (4, 2), (4, 20)])
def test_it_gives_what_map_gives(workers, depth):
    with threads(workers, finish=False) as pool:
        assert list(prefetch_map(pool, slowed, range(40), depth)) == [i * i for i in range(40)]
        assert list(prefetch_map(pool, slowed, [], depth)) == []


def test_several_are_done_at_once():
    meeting = threading.Barrier(3, timeout=60)  # nobody passes it alone
    with threads(3, finish=False) as pool:
        assert len(list(prefetch_map(pool, lambda _: meeting.wait(), range(6), depth=3))) == 6


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_a_slow_consumer_blocks_its_producer(depth):
    given = []

    def items():
        for i in count():
            given.append(i)
            yield i

    with threads(2, finish=False) as pool:
        results = prefetch_map(pool, lambda i: i, items(), depth)
        for i in range(5):
            assert next(results) == i
            assert len(given) == i + depth + 1


def test_maps_behind_each_other_work_at_once():
    meeting = threading.Barrier(3, timeout=60)

    def meet(at):
        def step(i):
            if i == at:
                meeting.wait()
            return i

        return step

    with threads(1, finish=False) as first, threads(1, finish=False) as second:
        middle = map(meet(1), prefetch_map(first, meet(2), range(8), depth=2))  # in this thread
        assert list(prefetch_map(second, meet(0), middle, depth=1)) == list(range(8))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_errors_come_where_map_raises_them(workers):
    def fails(i):
        if i == 5:
            raise ValueError("five")
        return i

    def broken():
        yield from range(4)
        raise OSError("no more")

    before = threading.active_count()
    got = []
    with pytest.raises(ValueError, match="five"), threads(workers, finish=False) as pool:
        got.extend(prefetch_map(pool, fails, range(100), depth=3))
    assert got == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="no more"), threads(workers, finish=True) as pool:
        list(prefetch_map(pool, fails, broken(), depth=3))
    assert threading.active_count() == before, "a thread was left"


@pytest.mark.parametrize("finish", [True, False])
def test_what_waits_at_the_end_is_finished_or_dropped(finish):
    begun, go, done = threading.Event(), threading.Event(), []

    def work(i):
        begun.set()
        go.wait(60)
        done.append(i)

    def stop():
        yield from range(3)
        begun.wait(60)
        threading.Timer(0.2, go.set).start()  # while the threads are being left
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), threads(1, finish) as pool:
        list(prefetch_map(pool, work, stop(), depth=10))
    assert done == ([0, 1, 2] if finish else [0])


def test_threads_leave_the_cores_to_the_computing_thread():
    mine = torch.get_num_threads()
    with threads(2, finish=False) as pool:
        assert set(islice(prefetch_map(pool, lambda _: torch.get_num_threads(), range(8), depth=4), 8)) == {1}
        assert torch.get_num_threads() == mine
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [mine], "threads of others keep fewer cores than before"
