"""Measure the package on a GPU that is at hand for minutes: ``scripts/device_bench.sh``.

Random weights, made on the device. Rows go to OUT/rows.csv as they are measured, the dearest kernels to
OUT/profile.txt. What no longer fits the time is skipped, and what fails costs its own row; both say so.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.device.jobs import Job, jobs
from benchmarks.device.place import Place
from benchmarks.device.table import Table, keep
from benchmarks.device.worker import Worker

SECONDS = 470


def main() -> None:
    began = time.monotonic()
    args = _parse()
    if args.keep:
        print(f"{keep(args.keep)} rows were appended.")
        return
    device = "cpu" if args.rehearse else "cuda"
    if not args.rehearse and not _has_gpu():
        sys.exit(
            "There is no CUDA device here; run this where there is one, or rehearse it on the CPU with --rehearse."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "profile.txt").unlink(missing_ok=True)
    chosen = [job for job in jobs() if job.measure == "product" or not args.only or any(map(job.has, args.only))]
    if args.rehearse:
        chosen = [job.rehearsed() for job in chosen]
    words = ["--rehearse"] * args.rehearse + [word for words in args.only or () for word in ("--only", *words)]
    table = Table(args.out / "rows.csv", " ".join(["scripts/device_bench.sh", *words]))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whoever ends this ends its worker too
    worker = Worker(Place(device, args.out.resolve(), args.rehearse).prepare)
    try:
        _measure(chosen, worker, table, began + args.seconds)
    finally:
        worker.stop()
    print(f"{time.monotonic() - began:.0f} s: {args.out / 'rows.csv'}")


def _measure(chosen: list[Job], worker: Worker, table: Table, until: float) -> None:
    """Run the jobs one by one and write their rows, until there is no time left."""
    compiling = 0.0  # the longest of those that wait for a compiler
    for job in chosen:
        left, waiting = until - time.monotonic(), set(job.batches)
        expects = max(job.expects, compiling) if job.compiles else job.expects
        if expects > left:
            why = "an earlier one did not end" if expects == float("inf") else f"it takes about {expects:.0f} s"
            _fail(job, table, waiting, f"skipped: {why}, and {max(0.0, left):.0f} s are left")
            continue
        started = time.monotonic()
        try:
            for row in worker.rows(job, min(job.limit, left)):
                waiting.discard(row.get("batch", 1))
                table.write(job, row)
        except (RuntimeError, TimeoutError) as error:
            _fail(job, table, waiting, str(error))
            if job.measure == "product":
                sys.exit(f"Nothing can be measured here: {error}")
            if job.compiles and len(waiting) == len(job.batches) and isinstance(error, TimeoutError):
                compiling = float("inf")
        if job.compiles:
            compiling = max(compiling, time.monotonic() - started)


def _fail(job: Job, table: Table, batches: set[int], note: str) -> None:
    """A row for every batch size that has none."""
    for batch in sorted(batches):
        table.write(job, {"batch": batch, "note": note})


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/device_bench.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo/device_bench"), help="folder of what is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"after which it ends, {SECONDS} by default")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny networks, not compiled")
    parser.add_argument(
        "--only",
        nargs="+",
        action="append",
        metavar="WORD",
        help="jobs whose names have all these words, such as sd15_gdf fold; may be given several times",
    )
    parser.add_argument("--keep", type=Path, metavar="ROWS", help="append the rows of a run to speed.csv, and end")
    return parser.parse_args()


if __name__ == "__main__":
    main()
