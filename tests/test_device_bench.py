"""The benchmark for a GPU that is at hand for minutes: its rehearsal, and what becomes of a job that goes wrong."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.device import __main__ as command
from benchmarks.device import table
from benchmarks.device.jobs import Job, jobs
from benchmarks.device.table import COLUMNS, Table, keep
from benchmarks.device.worker import Worker

ROOT = Path(__file__).parent.parent
ONLY = [
    ["sd15_gdf", "whole", "bfloat16"],
    ["sd15_gdf", "channels_last=True graph=True"],
    ["profile"],
    ["extract"],
    ["load"],
]


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def script(out, *words):
    environment = {"PYTHON": sys.executable, "WHEELS": "none", "OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    command = ["scripts/device_bench.sh", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    out = tmp_path_factory.mktemp("rehearsal")
    said = script(out, "--rehearse", "--seconds", "600", *(word for words in ONLY for word in ("--only", *words)))
    assert said.returncode == 0, said.stderr
    return out, rows_of(out / "rows.csv"), said.stdout


def test_every_batch_of_every_job_is_measured(rehearsal):
    _, rows, _ = rehearsal
    chosen = [job.rehearsed() for job in jobs() if any(map(job.has, ONLY))]
    assert {job.measure for job in chosen} == {"speed", "profile", "extract", "load"}
    for job in chosen:
        options = " ".join(f"{key}={value}" for key, value in job.options.items())
        found = [row for row in rows if (row["backbone"], row["options"]) == (job.backbone, options)]
        assert {int(row["batch"] or 1) for row in found} >= {*job.batches}, job.name
    failed = [row["note"] for row in rows if "Error" in row["note"] or "stopped" in row["note"]]
    assert not failed
    timed = [row for row in rows if row["seconds"] and not row["way"].startswith("extract")]
    assert all(float(row["seconds"]) > 0 and int(row["weights_bytes"] or 1) > 0 for row in timed)


def test_speed_is_relative_to_the_first_whole_network(rehearsal):
    _, rows, _ = rehearsal
    for batch in ("1", "2"):
        some = [row for row in rows if row["batch"] == batch and row["seconds"]]
        first = next(float(row["seconds"]) for row in some if row["way"] == table.HOOKS)
        assert all(float(row["speed"]) == pytest.approx(first / float(row["seconds"]), rel=2e-3) for row in some)


def test_the_dearest_kernels_are_written(rehearsal):
    out, _, _ = rehearsal
    first, *_ = (out / "profile.txt").read_text().split("\n\n")
    head, total, *lines = first.splitlines()
    assert head == "profile sd15_gdf bfloat16, batch 1"
    assert "ms in kernels" in total
    spent = [float(line.split()[0]) for line in lines]
    assert len(spent) == 10
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0


def test_a_rehearsal_is_not_kept(rehearsal, tmp_path):
    out, *_ = rehearsal
    with pytest.raises(ValueError, match="is a rehearsal on tiny networks"):
        keep(out / "rows.csv", tmp_path / "speed.csv")


def test_timed_rows_are_kept_and_failed_ones_are_not(tmp_path):
    written, kept = Table(tmp_path / "rows.csv", "scripts/device_bench.sh"), tmp_path / "speed.csv"
    whole = {"way": table.HOOKS, "batch": 8, "seconds": 0.3, "torch": "2.11"}
    written.write(Job("speed", "sd15_gdf"), whole)
    written.write(Job("speed", "sd15_gdf"), {**whole, "way": "backbone", "seconds": 0.1})
    written.write(Job("speed", "sd15_gdf"), {"batch": 32, "note": "OutOfMemoryError: too large"})
    kept.write_text(",".join(COLUMNS[:-1]) + "\r\n")
    assert keep(tmp_path / "rows.csv", kept) == 2
    assert [(row["way"], row["speed"]) for row in rows_of(kept)] == [(table.HOOKS, "1"), ("backbone", "3")]


def test_without_a_device_it_ends_in_a_sentence(tmp_path):
    said = script(tmp_path / "out")
    assert said.returncode == 1
    assert said.stderr == (
        "There is no CUDA device here; run this where there is one, or rehearse it on the CPU with --rehearse.\n"
    )
    assert not (tmp_path / "out").exists()


# A job that goes wrong.


def prepare():
    """A bench of jobs that are words; after ``fault`` its device computes no more."""
    state = {"well": True, "done": 0}

    def run(job):
        state["done"] += 1
        yield {"process": os.getpid(), "done": state["done"]}
        if job == "error":
            raise ValueError("of the job\nand more")
        if job == "fault":
            state["well"] = False
            raise RuntimeError("of the device")
        if job == "sleep":
            time.sleep(600)
        if job == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)

    return run, lambda: state["well"]


@pytest.fixture
def worker():
    made = Worker(prepare)
    yield made
    made.stop()


def test_an_error_costs_its_own_job(worker):
    [first] = worker.rows("fine", 60)
    rows = worker.rows("error", 60)
    assert next(rows) == {"process": first["process"], "done": 2}
    with pytest.raises(RuntimeError, match="^ValueError: of the job$"):
        next(rows)
    assert list(worker.rows("fine", 60)) == [{"process": first["process"], "done": 3}]


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        ("fault", RuntimeError, "RuntimeError: of the device"),
        ("crash", RuntimeError, "its process ended with exit code -11"),
        ("sleep", TimeoutError, "stopped after 2 s"),
    ],
)
def test_after_a_fault_a_crash_and_a_job_without_end_there_is_a_new_process(worker, job, error, message):
    rows = worker.rows(job, 2)
    old = next(rows)["process"]
    with pytest.raises(error, match=message):
        next(rows)
    with pytest.raises(ProcessLookupError):
        os.kill(old, 0)
    [row] = worker.rows("fine", 60)
    assert row["process"] != old
    assert row["done"] == 1


class Fake:
    """A worker whose jobs take no time; those that compile never end."""

    def rows(self, job, seconds):
        if job.compiles:
            raise TimeoutError(f"stopped after {seconds:.0f} s")
        for batch in job.batches:
            if batch == 8:
                raise RuntimeError("OutOfMemoryError: too large")
            yield {"batch": batch, "note": "measured"}


def test_what_does_not_fit_the_time_is_skipped_and_what_fails_costs_its_own_rows(tmp_path):
    chosen = [
        Job("speed", "a", (1, 8, 32)),
        Job("speed", "b", options={"compile": "default"}, limit=150),
        Job("speed", "c", options={"compile": "default"}),
        Job("load", "d", expects=2000),
        Job("speed", "e", expects=5),
    ]
    command._measure(chosen, Fake(), Table(tmp_path / "rows.csv", ""), time.monotonic() + 1000)
    assert [(row["backbone"], row["batch"], row["note"]) for row in rows_of(tmp_path / "rows.csv")] == [
        ("a", "1", "measured"),
        ("a", "8", "OutOfMemoryError: too large"),
        ("a", "32", "OutOfMemoryError: too large"),
        ("b", "1", "stopped after 150 s"),
        ("c", "1", "skipped: an earlier one did not end, and 1000 s are left"),
        ("d", "1", "skipped: it takes about 2000 s, and 1000 s are left"),
        ("e", "1", "measured"),
    ]


def test_the_first_job_says_that_nothing_can_be_measured(tmp_path):
    class Broken:
        def rows(self, *_):
            raise RuntimeError("its process ended with exit code 1")

    with pytest.raises(SystemExit, match="Nothing can be measured here: its process ended with exit code 1"):
        command._measure([*jobs()], Broken(), Table(tmp_path / "rows.csv", ""), time.monotonic() + 1000)
