"""Jobs in a process of their own: one that takes too long is stopped, and one that breaks the device ends it alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

READY, DONE = "ready", "done"
START = 300
"""Seconds in which the process must be ready; they count towards no job."""

Prepare = Callable[[], tuple[Callable[[Any], Iterator[Any]], Callable[[], bool]]]


@dataclass(frozen=True)
class Failure:
    """Why a job failed, and whether its process can take another."""

    why: str
    well: bool


class Worker:
    """A process that is started when it is needed, kept warm between jobs, and replaced once it has ended.

    Args:
        prepare: Called in the process. It returns a function that yields the rows of a job, and one that says whether
            the device still computes.
    """

    def __init__(self, prepare: Prepare):
        self.prepare, self.process, self.pipe = prepare, None, None

    def rows(self, job: Any, seconds: float) -> Iterator[Any]:
        """The rows of a job as they are measured.

        Raises:
            TimeoutError: It took longer than so many seconds, and was stopped.
            RuntimeError: It failed, or its process ended.
        """
        if self.process is not None and not self.process.is_alive():  # it was killed while it waited
            self.stop()
        if self.process is None:
            self._start()
        self.pipe.send(job)
        until = time.monotonic() + seconds
        while (what := self._receive(until, seconds)) != DONE:
            if isinstance(what, Failure):
                if not what.well:
                    self.stop()
                raise RuntimeError(what.why)
            yield what

    def stop(self) -> None:
        """End the process and all that it started, such as compilers."""
        if self.process is None:
            return
        with suppress(ProcessLookupError):  # it has ended, or not yet made its group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.process = self.pipe = None

    def _start(self) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.prepare))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self._receive(time.monotonic() + START, START)

    def _receive(self, until: float, seconds: float) -> Any:
        if not self.pipe.poll(max(0.0, until - time.monotonic())):
            self.stop()
            raise TimeoutError(f"stopped after {seconds:.0f} s")
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.stop()
            raise RuntimeError(f"its process ended with exit code {code}") from None


def _serve(pipe: Connection, prepare: Prepare) -> None:
    """Measure the jobs that come through the pipe."""
    os.setpgid(0, 0)
    run, well = prepare()
    pipe.send(READY)
    while True:
        job = pipe.recv()
        try:
            for row in run(job):
                pipe.send(row)
            pipe.send(DONE)
        except Exception as error:
            pipe.send(Failure(said(error), well()))


def said(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
