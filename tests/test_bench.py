"""The benchmark: what it times is the same, its numbers add up, and the command says them."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.evaluation import benchmark, benchmark_table, memory_benchmark
from diffusion_backbones.ops.truncation import count_bytes
from diffusion_backbones.reports import costs


@pytest.fixture(scope="module")
def timed():
    setting = benchmark.Setting("tinysd_gdf", size=128, rounds=2, load=True)
    return setting, benchmark.bench(setting)


def test_every_way_is_timed_and_counted(timed):
    _, found = timed
    assert [timing.way for timing in found] == [benchmark.BACKBONE, benchmark.LATENTS, benchmark.HOOKS]
    assert all(len(timing.seconds) == 2 and min(timing.seconds) > 0 for timing in found)
    ours, latents, hooks = found
    assert hooks.speed(hooks) == 1
    cost = costs.measure(db.get_declaration("tinysd_gdf"))  # at 256, four times as many pixels
    assert 3 < (cost.denoiser_gflops + cost.encoder_gflops) / ours.gflops < 5
    assert latents.gflops == pytest.approx(
        ours.gflops * cost.denoiser_gflops / (cost.denoiser_gflops + cost.encoder_gflops), rel=0.1
    )
    assert 0 < ours.parts["encoder"] + ours.parts["denoiser"] <= ours.parts["call"]
    assert 0 < ours.footprint.seconds < 60
    assert latents.footprint is None
    networks = [network for _, network in memory_benchmark.components(db.get_declaration("tinysd_gdf"), "meta")]
    assert hooks.footprint.weights == sum(count_bytes(network) for network in networks)
    assert cost.bytes < ours.footprint.weights < hooks.footprint.weights  # the noise and the prompt are kept too
    assert ours.footprint.peak > 0


def test_without_room_nothing_is_written(monkeypatch):
    monkeypatch.setattr(memory_benchmark.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    backbone = db.create_model("tinysd_gdf")
    with (
        pytest.raises(OSError, match=r"0\.\d GB of weights .* has room for 0\.0 GB; set TMPDIR"),
        memory_benchmark.written(backbone, "float32", print),
    ):
        pass


def test_a_way_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(
        benchmark,
        "_encode_each",
        lambda _, backbone, x, ids: {name: 2 * act for name, act in backbone.forward_activations(x, ids).items()},
    )
    with pytest.raises(RuntimeError, match="an encode for each draw: .* differs by 1 of the largest value"):
        benchmark.bench(benchmark.Setting("tinysd_dift", size=64, rounds=1))


def test_a_tiny_encoder_is_timed_beside_the_exact_one():
    setting = benchmark.Setting("tinysd_gdf", size=64, rounds=1, options={"encoder": "tiny"})
    ours, latents, hooks = benchmark.bench(setting)
    cost = costs.measure(
        replace(
            db.get_declaration("tinysd_gdf"), recipe=db.get_declaration("tinysd_gdf").recipe.override(input_size=64)
        )
    )
    assert ours.gflops == pytest.approx(latents.gflops + cost.tiny_encoder_gflops, rel=1e-3)
    assert "encoder=tiny" in benchmark_table.rows([ours, latents, hooks], setting, 1.0)[0]["options"]


def test_an_ensemble_is_encoded_once(monkeypatch):
    encoded = []
    backbone = benchmark.Setting("tinysd_dift", size=64).build()
    encode = backbone.encoder.encode
    monkeypatch.setattr(backbone.encoder, "encode", lambda x, *a, **k: encoded.append(len(x)) or encode(x, *a, **k))
    ids = backbone.declaration.recipe.ids
    x = benchmark.Setting("tinysd_dift", size=64).images()
    with torch.no_grad():
        expected = backbone.forward_activations(x, ids)
        each = benchmark._encode_each(backbone, backbone, x, ids)
    assert encoded == [1, backbone.declaration.recipe.ensemble]
    assert all(torch.allclose(each[name], expected[name], atol=1e-4) for name in ids)


def test_the_whole_network_is_whole():
    whole = benchmark.Setting("tinysd_gdf", options={"truncate": False}).build()
    assert sum(p.numel() for p in whole.denoiser.parameters()) == costs.published()["tinysd_gdf"]["parameters_total"]


def test_the_whole_network_reads_what_a_recipe_normalises():
    cut = benchmark.Setting("flux_dev_ditf", device="meta")
    whole = replace(cut, options={"truncate": False}).build()
    assert whole.levels == cut.build().levels
    assert "vit-block56-out" in whole.catalogue
    assert whole.forward_activations(cut.images(), ["vit-block56-out"], as_maps=True)["vit-block56-out"].shape[0] == 1


@pytest.mark.parametrize("written", [["--csv", "at/home/speed.csv"], ["--csv=at/home/speed.csv"], []])
def test_a_row_has_its_command(monkeypatch, timed, written):
    monkeypatch.setattr("sys.argv", ["/usr/bin/diffusion-backbones", "bench", *written, "tinysd_gdf", "--size", "128"])
    assert (
        benchmark_table.rows(timed[1], timed[0], 1.0)[0]["command"] == "diffusion-backbones bench tinysd_gdf --size 128"
    )


def test_rows_are_appended(timed, tmp_path):
    setting, found = timed
    for product in (100.0, 200.0):
        benchmark_table.write(benchmark_table.rows(found, setting, product), tmp_path / "new" / "speed.csv")
    with (tmp_path / "new" / "speed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(found)
    assert float(rows[0]["share_of_matmul"]) == pytest.approx(found[0].gflops / found[0].median / 100, rel=1e-3)
    assert float(rows[0]["share_of_matmul"]) == pytest.approx(2 * float(rows[3]["share_of_matmul"]), rel=1e-2)


def test_the_command(monkeypatch, timed, tmp_path):
    monkeypatch.setattr(benchmark, "bench", lambda *_, **__: timed[1])
    monkeypatch.setattr(benchmark, "matmul_gflops", functools.partial(benchmark.matmul_gflops, side=256))
    command = ["bench", "tinysd_gdf", "--size", "128", "--device", "cpu"]
    said = CliRunner().invoke(main, [*command, "--csv", str(tmp_path / "speed.csv")])
    assert said.exit_code == 0, said.output
    assert benchmark.HOOKS in said.output
    assert (tmp_path / "speed.csv").is_file()
    data = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
    assert [row["way"] for row in data] == [timing.way for timing in timed[1]]
    assert CliRunner().invoke(main, ["bench", "tinysd_gfd"]).exit_code == 2


def test_a_product_of_matrices_is_measured():
    assert benchmark.matmul_gflops(side=256) > 0.1
