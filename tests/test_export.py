"""Exported files: they run without this package, give the same features, and say what they are."""

from __future__ import annotations

import json

import pytest
import torch
import warm
from click.testing import CliRunner

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.factory import export

WITHOUT = """
import sys
sys.modules["diffusion_backbones"] = sys.modules["diffusers"] = None
import torch
path, images, out = sys.argv[1:]
if "program" in path:
    extra = {"metadata.json": ""}
    model, about = torch.export.load(path, extra_files=extra).module(), extra["metadata.json"]
else:
    import json
    model = torch._inductor.aoti_load_package(path)
    about = json.dumps(model.get_metadata())
torch.save([list(model(x)) for x in torch.load(images)], out)
print(about)
"""


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


def images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape[0], 3, *shape[1:], generator=generator) * 2 - 1


def same(maps, expected):
    for m, e in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


def run_without_the_package(path, batches, tmp_path):
    torch.save(batches, tmp_path / "images.pt")
    run = warm.run(WITHOUT, str(path), str(tmp_path / "images.pt"), str(tmp_path / "maps.pt"))
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(tmp_path / "maps.pt"), json.loads(run.stdout.splitlines()[-1])


def small(**settings):
    """So small that compiling it takes seconds."""
    torch.manual_seed(0)
    return db.create_model("ddpm_cifar10_32", recipe=["down-level0-repeat0-res-out"], **settings)


def test_a_compiled_file_of_any_size_and_batch(tmp_path):
    path, backbone = tmp_path / "new" / "backbone.pt2", small()
    said = db.export(backbone, path, dynamic=True)
    assert [file.name for file in path.parent.iterdir()] == ["backbone.pt2"]
    batches = [images(1, 32, 32), images(2, 64, 32), images(5, 32, 96)]
    maps, about = run_without_the_package(path, batches, tmp_path)
    for x, found in zip(batches, maps, strict=True):
        same(found, backbone(x))
    assert said.items() <= about.items()


def test_the_command(backbone, tmp_path):
    path = tmp_path / "new" / "program.pt2"
    result = CliRunner().invoke(
        main,
        [
            "export",
            "tinysd_gdf",
            "-o",
            str(path),
            "--program",
            "--levels",
            "0,2",
            "--size",
            "64",
            "128",
            "--device",
            "cpu",
        ],
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(path)
    assert "(B, 3, H, W) float32, RGB in [-1, 1]" in result.stdout
    x = images(3, 64, 128)
    [maps], about = run_without_the_package(path, [x], tmp_path)
    same(maps, backbone(x, indices=[0, 2]))
    assert about["name"] == "tinysd_gdf"
    assert (about["channels"], about["strides"], about["size"], about["batch"]) == (
        "48 224",
        "8 32",
        "64 x 128",
        "1 to 32",
    )


@pytest.mark.parametrize("settings", [{"size": (50, 36)}, {"size": (32, 32), "batch": 2}, {"dynamic": True}], ids=str)
def test_an_exported_program(settings, tmp_path):
    path, backbone = tmp_path / "program.pt2", small()
    said = db.export(backbone, path, compiled=False, **settings)
    model = torch.export.load(path, extra_files=(extra := {"metadata.json": ""})).module()
    assert json.loads(extra["metadata.json"]) == said
    for n in (2, 2) if settings.get("batch") else (1, 3):
        x = images(n, *settings.get("size", (32, 32 * n)))
        same(model(x), backbone(x))
    with pytest.raises(AssertionError, match="Guard failed"):
        model(images(2, 33, 32))


@pytest.mark.parametrize(
    ("build", "settings"),
    [(lambda: db.create_model("tinysd_gdf", pretrained=True), {"size": (64, 128)}), (small, {"dynamic": True})],
    ids=["tinysd", "any size"],
)
def test_onnx(build, settings, tmp_path):
    import onnxruntime

    path, backbone = tmp_path / "backbone.onnx", build()
    said = db.export(backbone, path, **settings)
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_modelmeta().custom_metadata_map == said
    for n in (1, 3):
        x = images(n, *settings.get("size", (64 * n, 64)))
        maps = session.run([f"level{i}" for i in range(len(backbone.levels))], {"image": x.numpy()})
        same([torch.from_numpy(m) for m in maps], backbone(x))


def test_a_compiled_file_of_one_size_and_batch_leaves_the_backbone_as_it_was(tmp_path):
    backbone, x = small(), images(2, 30, 40)
    expected = backbone(x)
    db.export(backbone, tmp_path / "backbone.pt2", size=(30, 40), batch=2)
    [maps], about = run_without_the_package(tmp_path / "backbone.pt2", [x], tmp_path)
    same(maps, expected)
    same(backbone(x), expected)
    assert (about["size"], about["batch"]) == ("30 x 40", "2")
    assert all(p.is_contiguous() for p in backbone.parameters())


def test_a_compiled_backbone_is_exported_as_it_is_written():
    x = images(2, 32, 32)
    same(export.trace(small(compile=True), size=(32, 32)).module()(x), small()(x))


def test_bad_input(backbone, tmp_path):
    path = tmp_path / "a.pt2"
    for settings, error, said in [
        ({"size": (64,)}, ValueError, r"size must be height and width in pixels.*got \(64,\)"),
        ({"size": (0, 64)}, ValueError, "size must be height and width"),
        ({"size": (64, 64), "dynamic": True}, ValueError, "fixes what dynamic=True leaves open"),
        ({"batch": 0}, ValueError, "batch must be an integer from 1 up"),
    ]:
        with pytest.raises(error, match=said):
            db.export(backbone, path, **settings)
    for name in ("a.pt", "a.torchscript", "a"):
        with pytest.raises(ValueError, match=r"ends in none of \.pt2, \.onnx"):
            db.export(backbone, tmp_path / name)
    with pytest.raises(ValueError, match=r"ONNX, which is never compiled"):
        db.export(backbone, tmp_path / "a.onnx", compiled=False)
    with pytest.raises(ValueError, match="on the meta device and has no weights"):
        db.export(db.create_model("tinysd_gdf", device="meta"), path)
    with pytest.raises(ValueError, match="noise='random', which an exported file cannot draw.*noise='fixed'"):
        db.export(db.create_model("tinysd_gdf", noise="random"), path)
    with pytest.raises(ValueError, match="lumina_image_2_custom cannot be exported: .*lengths of texts"):
        db.export(db.create_model("lumina_image_2", recipe=["vit-block2-out"], device="meta"), path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        db.export(backbone, tmp_path / "file" / "a.pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_what_is_missing_is_said(backbone, tmp_path, monkeypatch):
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(FileNotFoundError, match="needs a C\\+\\+ compiler"),
    ):
        db.export(backbone, tmp_path / "a.pt2")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"onnx and onnxscript; install them with pip install 'diffusion-backbones\[export\]'"
    ):
        db.export(backbone, tmp_path / "a.onnx")


def test_an_existing_file_is_kept_unless_told(tmp_path):
    path = tmp_path / "a.pt2"
    path.write_text("mine")
    result = CliRunner().invoke(main, ["export", "tinysd_gdf", "-o", str(path)])
    assert result.exit_code == 1
    assert "exists; choose another name or overwrite it" in result.stderr
    assert path.read_text() == "mine"
    db.export(small(), path, size=(32, 32), compiled=False, overwrite=True)
    assert torch.export.load(path)


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["tinysd_gfd", "-o", "a.pt2"], 2, "tinysd_gdf"),
        (["tinysd_gdf", "-o", "a.zip"], 1, "none of .pt2, .onnx"),
        (["tinysd_gdf", "-o", "a.pt2", "--size", "64", "64", "--dynamic"], 2, "give one of them"),
        (["tinysd_gdf", "-o", "a.pt2", "--size", "0", "64"], 2, "--size"),
        (["tinysd_gdf", "-o", "a.pt2", "--levels", "x"], 2, "different positions"),
        (["local-dir:x", "-o", "a.pt2", "--random-weights"], 2, "does not go with local-dir:x"),
    ],
)
def test_the_command_refuses(args, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["export", *args])
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
