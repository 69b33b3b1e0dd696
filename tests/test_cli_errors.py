"""The command line answers every error in one line, refuses before it works, and leaves the user's files."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import diffusion_backbones as db
from diffusion_backbones.cli import main
from diffusion_backbones.evaluation import benchmark, csv_table, deviation, visualize
from diffusion_backbones.extraction import images, stages
from diffusion_backbones.factory import entry_points
from diffusion_backbones.selection import run as selection_run

PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def one_line(status: int, *args: object) -> str:
    result = run(*args)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def photo(tmp_path):
    Image.open(PHOTO).crop((0, 0, 48, 32)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


ERRORS = [
    MemoryError(),
    MemoryError("sd15_gdf needs 3.4 GB"),
    OverflowError("int too large"),
    NotImplementedError("Cannot copy out of meta tensor"),
    RuntimeError("Could not determine home\ndirectory."),
    torch.OutOfMemoryError("CUDA out of memory"),
    ZeroDivisionError(),
    AssertionError(),
    RecursionError("too deep"),
    ImportError("no module"),
    UnicodeEncodeError("utf-8", "\udc80", 0, 1, "surrogates not allowed"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_is_one_line(monkeypatch, photo, tmp_path, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(entry_points, "create_model", fails)
    told = one_line(1, "visualize", "tinysd_gdf", photo, "-o", tmp_path / "out.png")
    assert len(told) > len("Error: ")
    assert " ".join(str(error).split()) in told
    traced = run("--traceback", "visualize", "tinysd_gdf", photo, "-o", tmp_path / "out.png")
    assert traced.exception is error


@pytest.mark.parametrize("verb", ["extract", "visualize", "compare", "export", "info"])
def test_an_interruption_is_130(monkeypatch, photo, tmp_path, verb):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(entry_points, "create_model", interrupted)
    monkeypatch.setattr("diffusion_backbones.reports.summary.facts", interrupted)
    arguments = {
        "extract": [photo, "-o", tmp_path / "out"],
        "visualize": [photo, "-o", tmp_path / "out.png"],
        "compare": [photo, "--encoder", "tiny"],
        "export": ["-o", tmp_path / "out.pt2", "--program"],
        "info": ["--json"],
    }[verb]
    result = run(verb, "tinysd_gdf", *arguments)
    assert result.exit_code == 130
    assert "Traceback" not in result.output


@pytest.mark.parametrize("device", ["meta", "nowhere", "cuda:99", "", "cpu:x"])
def test_devices_that_cannot_compute(photo, tmp_path, device):
    assert "cannot be used here" in run("extract", "tinysd_gdf", photo, "-o", tmp_path / "o", "--device", device).stderr
    assert run("extract", "tinysd_gdf", photo, "-o", tmp_path / "o", "--device", device).exit_code == 2


@pytest.mark.parametrize("verb", ["extract", "visualize"])
def test_sizes_that_no_memory_holds(photo, tmp_path, verb):
    out = tmp_path / ("out" if verb == "extract" else "out.png")
    assert "GB of memory" in one_line(1, verb, "tinysd_gdf", photo, "-o", out, "--size", 10**10)


def test_a_place_that_cannot_be_found(photo, tmp_path):
    assert one_line(1, "extract", "local-dir:~nobody_here/x", photo, "-o", tmp_path / "out")


def test_a_limit_of_pixels_names_its_option(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)  # half the limit; Pillow draws text below it too
    Image.new("RGB", (700, 600)).save(tmp_path / "a.png")
    for verb, out in (("extract", "out"), ("visualize", "out.png")):
        command = [verb, "tinysd_gdf", tmp_path / "a.png", "-o", tmp_path / out, "--size", 64]
        assert "--max-pixels 420000" in run(*command).stderr
        assert run(*command, "--max-pixels", 420_000).exit_code == 0
    with pytest.raises(ValueError, match="--max-pixels 420000"):
        images.load(tmp_path / "a.png")


# Refused before anything is measured or built.


@pytest.fixture
def nothing_runs(monkeypatch):
    for module, name in (
        (benchmark, "matmul_gflops"),
        (benchmark, "bench"),
        (entry_points, "create_model"),
        (deviation, "deviations"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("work was begun"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("options", [["--compile", "nope"], ["--csv", "/proc/x.csv"], ["--csv", "/dev/null/x.csv"]])
def test_bench_refuses_before_it_measures(options):
    assert options[0] in one_line(2, "bench", "tinysd_gdf", "--size", "64", *options)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("verb", ["bench", "compare"])
@pytest.mark.parametrize("content", ["name,age\nada,36\n", "\x89PNG\r\n", "\xff\xfe"])
def test_a_table_of_something_else_stays(tmp_path, verb, content):
    table = tmp_path / "mine.csv"
    table.write_bytes(content.encode("latin-1"))
    assert "no table of this kind" in one_line(2, verb, "tinysd_gdf", "--csv", table, *["--encoder", "tiny"][:2])
    assert table.read_bytes() == content.encode("latin-1")


@pytest.mark.usefixtures("nothing_runs")
def test_visualize_refuses_a_place_before_it_computes(photo):
    assert "cannot be written" in one_line(1, "visualize", "tinysd_gdf", photo, "-o", "/proc/out.png")


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("link", ["", "symbolic", "hard"])
def test_a_photograph_is_not_written_over_itself(photo, tmp_path, link):
    out, before = tmp_path / "out.jpg" if link else photo, photo.read_bytes()
    if link == "symbolic":
        out.symlink_to(photo)
    elif link:
        out.hardlink_to(photo)
    assert "which is read" in one_line(1, "visualize", "tinysd_gdf", photo, "-o", out)
    assert photo.read_bytes() == before


@pytest.mark.parametrize("verb", ["extract", "visualize", "export", "select", "bench"])
def test_an_empty_output_is_refused(photo, verb):
    name = "tinysd" if verb == "select" else "tinysd_gdf"
    result = run(
        verb, name, *([photo] if verb in ("extract", "visualize") else []), "--csv" if verb == "bench" else "-o", ""
    )
    assert result.exit_code == 2
    assert "it is empty" in result.stderr


def test_a_selection_replaces_nothing_that_it_did_not_make(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipe.yaml").write_text("soup")
    with pytest.raises(ValueError, match="no selection made it"):
        selection_run._check_folder(out)
    (out / "measured.json").write_text("{}")
    selection_run._check_folder(out)


def test_results_beside_the_images_of_a_selection(tmp_path, photo):
    told = run("select", "tinysd", "--images", tmp_path, "-o", tmp_path / "selection")
    assert told.exit_code == 2
    assert "is in the folder of the images" in told.stderr


# Nothing matches.


@pytest.mark.parametrize("json_output", [[], ["--json"]])
@pytest.mark.parametrize(
    "args", [["list", "nothing_like_it"], ["list", "--checkpoints", "x*y"], ["activations", "sd15", "nothing"]]
)
def test_nothing_that_matches_is_status_1(args, json_output):
    result = run(*args, *json_output)
    assert result.exit_code == 1
    assert result.stdout.strip() in ("", "[]")
    assert "0 " in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["sd15", "sd_turbo", "ddpm_cifar10_32", "flux_dev"])
def test_info_counts_what_activations_lists(name):
    listed = len(run("activations", name, "--all").stdout.splitlines())
    assert f"activations {listed}: diffusion-backbones activations {name} --all" in run("info", name).stdout
    assert json.loads(run("info", name, "--json").stdout)["activations"] == listed


def test_libraries_warn_of_nothing(photo, tmp_path):
    command = [sys.executable, "-m", "diffusion_backbones.cli", "extract", "tinysd_gdf", photo, "-o", tmp_path / "out"]
    ran = subprocess.run(
        [*map(str, command), "--device", "cpu"], capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == "1 extracted, 0 finished before, 0 failed\n"


# Pictures and tables.


@pytest.mark.parametrize("size", [(6000, 1), (1, 6000), (2000, 2), (2, 2000), (1, 1)])
def test_both_sides_of_a_picture_are_bounded(size):
    panel = visualize.Panel("level 0", torch.randn(4, -(-size[1] // 8), -(-size[0] // 8)), 8)
    out = visualize.picture(Image.new("RGB", size), [panel] * 4, "name", "about")
    assert out.width < 8000
    assert out.height < 3500


def test_a_picture_that_no_memory_holds_is_refused(monkeypatch):
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    monkeypatch.setattr(stages, "free_memory", lambda: 10**6)
    with pytest.raises(ValueError, match="GB of memory"):
        visualize.panels(backbone, Image.new("RGB", (256, 256)))


def test_a_table_is_there_whole_or_as_it_was(tmp_path):
    path, columns = tmp_path / "a.csv", ("name", "value")
    csv_table.update(path, columns, lambda _: [{"name": "ü", "value": 1}])
    before = path.read_bytes()

    def fails(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        csv_table.update(path, columns, fails)
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="dict contains fields not in fieldnames"):
        csv_table.update(path, columns, lambda rows: [*rows, {"other": 1}])
    assert path.read_bytes() == before
    csv_table.update(path, columns, lambda rows: [*rows, {"name": "b", "value": 2}])
    with path.open(newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{"name": "ü", "value": "1"}, {"name": "b", "value": "2"}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]
