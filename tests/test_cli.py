"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.evaluation import visualize
from diffusion_backbones.reports import backbone_card, checkpoint_card, markdown
from diffusion_backbones.reports.costs import costs, whole_network

PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def ok(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def fails(status: int, *args: object) -> str:
    """What is said on stderr; stdout stays empty and there is no traceback."""
    result = run(*args)
    assert result.exit_code == status, (result.output, result.exception)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture
def photo(tmp_path):
    Image.open(PHOTO).crop((0, 0, 64, 48)).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


# Reading declarations.


@pytest.mark.parametrize(
    "args",
    [
        ["list"],
        ["list", "--checkpoints"],
        ["info", "sdxl_gdf"],
        ["info", "flux2_dev"],
        ["activations", "sdxl", "--size", "1024", "--all"],
        ["card", "sd15_gdf"],
        ["card", "qwen_image"],
        ["--help"],
        ["extract", "--help"],
        ["select", "--paper"],
    ],
    ids=" ".join,
)
def test_what_reads_declarations_needs_no_torch(args):
    code = (
        "import sys; from diffusion_backbones.cli.program import main; main(sys.argv[1:], standalone_mode=False); "
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    assert not {"torch", "diffusers", "transformers", "timm", "sklearn"} & set(result.stderr.splitlines()[-1].split())


def test_list():
    rows = ok("list").splitlines()
    assert [row.split()[0] for row in rows] == db.list_models()
    [row] = [row for row in rows if row.startswith("sd15_gdf ")]
    assert "320@8 · 640@16 · 2560@32" in row
    assert "creativeml-openrail-m" in row
    assert ok("list", "sd15_*").split("\n")[0].startswith("sd15_")
    assert [row.split()[0] for row in ok("list", "gdf").splitlines()] == db.list_models("*gdf*")
    assert [row.split()[0] for row in ok("list", "--pretrained").splitlines()] == db.list_pretrained()
    nothing = run("list", "nothing_like_it")
    assert (nothing.exit_code, nothing.stdout) == (1, "")  # as grep answers


def test_list_tells_of_checkpoints_that_no_recipe_reads():
    others = "2 checkpoints without a published recipe match too: list --checkpoints"
    assert run("list", "flux2").stderr.splitlines()[-1] == f"0 backbones; {others}"
    assert run("list", "sd35").stderr.splitlines()[-1] == f"1 backbones; {others}"
    assert run("list", "tinysd_gdf").stderr.splitlines()[-1] == "1 backbones"


def test_list_for_machines():
    rows = json.loads(ok("list", "--json"))
    assert [row["name"] for row in rows] == db.list_models()
    [row] = [row for row in rows if row["name"] == "sd15_gdf"]
    assert row["levels"] == [
        {"channels": 320, "stride": 8},
        {"channels": 640, "stride": 16},
        {"channels": 2560, "stride": 32},
    ]
    assert (row["license"], row["gated"]) == ("creativeml-openrail-m", False)
    assert json.loads(run("list", "nothing_like_it", "--json").stdout) == []


def test_list_checkpoints():
    assert [row.split()[0] for row in ok("list", "--checkpoints").splitlines()] == db.list_checkpoints()
    rows = json.loads(ok("list", "--checkpoints", "--pretrained", "--json"))
    assert {row["name"] for row in rows} == set(db.list_checkpoints())
    assert next(row for row in rows if row["name"] == "sd15")["hub_id"] == db.get_checkpoint("sd15").hub_id


@pytest.mark.parametrize("name", db.list_models())
def test_info_says_everything(name):
    declaration, text = db.get_declaration(name), ok("info", name)
    recipe, checkpoint, cost = declaration.recipe, declaration.checkpoint, costs(declaration)
    said = [
        *recipe.ids,
        *recipe.notes,
        *recipe.unverified,
        *checkpoint.unverified,
        *checkpoint.mirrors,
        recipe.source,
        checkpoint.hub_id,
        checkpoint.status,
    ]
    said += [
        str(checkpoint.license),
        markdown.millions(cost.parameters),
        markdown.millions(cost.parameters_total),
        markdown.gflops(cost.encoder_gflops),
    ]
    assert [sentence for sentence in said if sentence not in text] == []


@pytest.mark.parametrize("name", db.list_checkpoints())
def test_info_of_a_checkpoint_says_what_it_takes_and_what_is_doubted(name):
    checkpoint, text = db.get_checkpoint(name), ok("info", name)
    cost = costs(whole_network(checkpoint))
    said = [
        checkpoint.title,
        checkpoint.hub_id,
        str(checkpoint.license),
        *checkpoint.unverified,
        markdown.millions(cost.parameters_total),
        markdown.memory(cost.bytes),
    ]
    said += [model for model in db.list_models() if db.get_declaration(model).checkpoint is checkpoint] or [
        "none published"
    ]
    assert [sentence for sentence in said if sentence not in text] == []
    assert json.loads(ok("info", name, "--json"))["costs"]["parameters_total"] == cost.parameters_total


def test_info_for_machines():
    facts = json.loads(ok("info", "tinysd_gdf", "--json"))
    backbone = db.create_model("tinysd_gdf")
    assert facts["feature_info"] == backbone.feature_info.get_dicts(keys=["num_chs", "reduction", "module", "index"])
    assert facts["recipe_digest"] == db.Recipe.from_dict(facts["recipe"]).digest
    assert db.Checkpoint.from_dict(facts["checkpoint"]) == backbone.declaration.checkpoint
    assert facts["costs"]["parameters"] == sum(p.numel() for p in backbone.denoiser.parameters())
    assert facts["costs"]["bytes"] == 4 * (
        facts["costs"]["parameters"] + sum(p.numel() for p in backbone.encoder.parameters())
    )


def test_activations():
    result = run("activations", "sd15")
    assert len(result.stdout.splitlines()) == 197
    assert result.stderr.splitlines()[-1].startswith("197 of 197 activations of sd15; --all adds ")
    assert len(ok("activations", "sdxl_gdf").splitlines()) == 612
    assert ok("activations", "sd15_gdf") == result.stdout
    more = ok("activations", "sd15", "--all").splitlines()
    assert {row.split()[0] for row in result.stdout.splitlines()} < {row.split()[0] for row in more}
    beyond = run("activations", "dit_xl_256").stderr.splitlines()[-1]
    assert beyond.startswith("168 of 168 activations of dit_xl_256; --all adds ")
    some = run("activations", "sd15", "up-level1-*-cross-q")
    assert some.stdout.split()[:5] == [
        "up-level1-repeat0-vit-block0-cross-q",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q",
        "out",
        "1280",
        "32",
    ]
    assert some.stderr.splitlines()[-1] == "3 of 197 activations of sd15"
    assert run("activations", "flux2_dev", "--all").stderr.splitlines()[-1].endswith(" activations of flux2_dev")


@pytest.mark.parametrize("size", [128, 100])
def test_shapes_are_those_of_the_network(size):
    """Every activation, the extensions included, of a whole network that ran on an image of that size."""
    rows = json.loads(ok("activations", "tinysd", "--all", "--size", size, "--json"))
    backbone = db.create_model("tinysd", recipe=["unet-out"])
    found = backbone.forward_activations(torch.zeros(1, 3, size, size), [row["id"] for row in rows])
    assert {row["id"]: tuple(row["shape"]) for row in rows} == {
        name: tuple(tensor.shape[1:]) for name, tensor in found.items()
    }


def test_card():
    assert ok("card", "sd15_gdf") == backbone_card.card(db.get_declaration("sd15_gdf"))
    assert ok("card", "sd35_large") == checkpoint_card.card(db.get_checkpoint("sd35_large"))


# Running backbones.


def test_extract(photo, tmp_path):
    out = tmp_path / "out"
    assert (
        ok("extract", "tinysd_gdf", photo, "-o", out, "--levels", "2,0", "--dtype", "float32")
        == f"{out / 'manifest.json'}\n"
    )
    found = load_file(out / "photo.jpg.safetensors")
    expected = dict(
        zip(
            ("level0", "level2"),
            db.create_model("tinysd_gdf", pretrained=True)(load(photo), indices=[0, 2]),
            strict=True,
        )
    )
    assert found.keys() == expected.keys()
    for name, level in expected.items():
        torch.testing.assert_close(found[name], level[0])
    again = run("extract", "tinysd_gdf", photo, "-o", out, "--levels", "0,2", "--dtype", "float32", "--workers", "0")
    assert again.stderr.splitlines()[-1] == "0 extracted, 1 finished before, 0 failed"
    told = fails(1, "extract", "tinysd_gdf", photo, "-o", out, "--levels", "0,2")
    assert 'dtype was "float32" and is "float16"' in told
    assert ok("extract", "tinysd_gdf", photo, "-o", out, "--levels", "0,2", "--overwrite")


def test_prompt_and_timestep_reach_the_network(photo, tmp_path):
    ok(
        "extract",
        "tinysd_gdf",
        photo,
        "-o",
        tmp_path / "out",
        "--prompt",
        "a cat",
        "--timestep",
        "7",
        "--dtype",
        "float32",
    )
    found = load_file(tmp_path / "out" / "photo.jpg.safetensors")
    for i, level in enumerate(db.create_model("tinysd_gdf", pretrained=True)(load(photo), prompt="a cat", timestep=7)):
        torch.testing.assert_close(found[f"level{i}"], level[0])


def test_random_weights_are_the_same_every_time_and_say_so(photo, tmp_path):
    for name in ("one", "two"):
        result = run("extract", "tinysd_gdf", photo, "-o", tmp_path / name, "--random-weights", "--device", "cpu")
        assert result.exit_code == 0
        assert visualize.UNTRAINED in result.stderr
    one, two = (load_file(tmp_path / name / "photo.jpg.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["weights"] == {"random": "seed 0 on cpu"}


def test_saved_backbones_and_folders(photo, tmp_path, tiny_folder):
    saved = db.create_model("tinysd_gdf", pretrained=True).save_pretrained(tmp_path / "saved")
    ok("extract", f"local-dir:{saved}", photo, "-o", tmp_path / "saved_out")
    ok("extract", "tinysd_gdf", photo, "-o", tmp_path / "out")
    found, expected = (load_file(tmp_path / name / "photo.jpg.safetensors") for name in ("saved_out", "out"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    result = run("visualize", "sd15_gdf", photo, "-o", tmp_path / "out.png", "--checkpoint-path", tiny_folder("sd15"))
    assert result.exit_code == 0, result.output
    assert visualize.UNTRAINED not in result.stderr


@pytest.mark.usefixtures("photo")
def test_one_broken_image_makes_the_status_1(tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    result = run("extract", "tinysd_gdf", tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout == f"{tmp_path / 'out' / 'manifest.json'}\n"
    assert f"failed: {tmp_path / 'broken.jpg'} cannot be read as an image" in result.stderr
    assert result.stderr.splitlines()[-1] == "1 extracted, 0 finished before, 1 failed"


def test_visualize(photo, tmp_path):
    out = tmp_path / "pictures" / "out.png"
    result = run("visualize", "tinysd_gdf", photo, "-o", out)
    assert result.exit_code == 0, result.output
    expected = [
        "level 0: (48, 6, 8) @ stride 8",
        "level 1: (96, 3, 4) @ stride 16",
        "level 2: (224, 2, 2) @ stride 32",
        str(out),
    ]
    assert result.stdout.splitlines() == expected
    assert visualize.UNTRAINED not in result.stderr
    alone = run("visualize", photo, "-o", tmp_path / "alone.png")
    assert alone.stdout.splitlines()[:3] == expected[:3]
    assert (tmp_path / "alone.png").read_bytes() == out.read_bytes()
    picture = Image.open(out)
    random = tmp_path / "random.png"
    assert visualize.UNTRAINED in run("visualize", "tinysd_gdf", photo, "-o", random, "--random-weights").stderr
    assert visualize.RED in {colour for _, colour in Image.open(random).getcolors(2**24)}, (
        "the picture itself must say that the weights are random"
    )
    assert visualize.RED not in {colour for _, colour in picture.getcolors(2**24)}
    again = tmp_path / "again.png"
    ok("visualize", "tinysd_gdf", photo, "-o", again)
    assert Image.open(again).tobytes() == picture.tobytes()
    assert (
        ok("visualize", "tinysd_gdf", photo, "-o", out, "--size", "96", "--levels", "1").splitlines()[0]
        == "level 1: (96, 6, 6) @ stride 16"
    )


def test_visualize_several_images(photo, tmp_path):
    """One sheet; the first argument may be an image, whose name is no backbone's."""
    other, out = tmp_path / "other.png", tmp_path / "out.png"
    Image.open(PHOTO).crop((100, 50, 164, 98)).save(other)
    printed = ok("visualize", "tinysd_gdf", photo, other, "-o", out).splitlines()
    shapes = ["0: (48, 6, 8) @ stride 8", "1: (96, 3, 4) @ stride 16", "2: (224, 2, 2) @ stride 32"]
    assert printed == [*(f"{path}: level {shape}" for path in (photo, other) for shape in shapes), str(out)]
    ok("visualize", photo, other, "-o", tmp_path / "unnamed.png")
    assert (tmp_path / "unnamed.png").read_bytes() == out.read_bytes()
    ok("visualize", photo, other, "-o", tmp_path / "white.png", "--hide-background")
    assert (tmp_path / "white.png").read_bytes() != out.read_bytes()
    assert Image.open(tmp_path / "white.png").size == Image.open(out).size
    assert "'gone.png' does not exist" in fails(2, "visualize", "gone.png", photo, "-o", out)
    assert "Did you mean tinysd_gdf" in fails(2, "visualize", "tinysd_gfd", photo, "-o", out)
    assert "does not exist" in fails(2, "visualize", "tinysd_gdf", photo, tmp_path / "gone.png", "-o", out)
    assert "which is read" in fails(1, "visualize", "tinysd_gdf", photo, other, "-o", other)


def test_a_very_large_image_gets_advice(tmp_path):
    Image.open(PHOTO).resize((660, 440)).save(tmp_path / "large.jpg")
    for verb, out in (("extract", "out"), ("visualize", "out.png")):
        assert (
            "--size 256 takes far less"
            in run(verb, "tinysd_gdf", tmp_path / "large.jpg", "-o", tmp_path / out, "--levels", "2").stderr
        )
    assert "far less" not in run("extract", "tinysd_gdf", PHOTO, "-o", tmp_path / "two", "--size", "64").stderr


# Errors.


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["lst"], "No such command 'lst'. Did you mean 'list'?"),
        (["list", "--jsn"], "No such option '--jsn'"),
        (["info", "sd15_gdff"], "no backbone is called 'sd15_gdff'. Did you mean sd15_gdf"),
        (["extract", "sd15", PHOTO, "-o", "out"], "'sd15' is a checkpoint, and a backbone needs a recipe too"),
        (["activations", "sd16"], "no backbone is called 'sd16'. Did you mean"),
        (["card"], "Missing argument 'NAME'"),
        (["extract", "sd15_gdff", PHOTO, "-o", "out"], "Did you mean sd15_gdf"),
        (["extract", "tinysd_gdf", PHOTO], "Missing option '-o'"),
        (["extract", "tinysd_gdf", "-o", "out"], "Missing argument 'IMAGES...'"),
        (["extract", "tinysd_gdf", "nowhere.jpg", "-o", "out"], "'nowhere.jpg' does not exist"),
        (["extract", "tinysd_gdf", PHOTO, "-o", "out", "--levels", "a,b"], "must be different positions such as 0,2"),
        (["extract", "tinysd_gdf", PHOTO, "-o", "out", "--levels", "1,1"], "must be different positions such as 0,2"),
        (["extract", "tinysd_gdf", PHOTO, "-o", "out", "--device", "abacus"], "'abacus' cannot be used here"),
        (["extract", "tinysd_gdf", PHOTO, "-o", "out", "--dtype", "int8"], "'int8' is not one of"),
        (["extract", "tinysd_gdf", PHOTO, "-o", "out", "--workers", "-1"], "-1 is not in the range x>=0"),
        (
            ["extract", "tinysd_gdf", PHOTO, "-o", "out", "--random-weights", "--prompt", "a"],
            "does not go with --prompt",
        ),
        (["extract", "hf-hub:a/b", PHOTO, "-o", "out", "--random-weights"], "does not go with hf-hub:a/b"),
        (["compare", "tinysd_gdf", PHOTO], "--encoder tiny is missing"),
        (["export", "sd15_gdff", "-o", "out.pt2"], "Did you mean sd15_gdf"),
        (["export", "tinysd_gdf", "-o", "out.pt2", "--levels", "1,1"], "must be different positions such as 0,2"),
        (["visualize", "tinysd_gdf", PHOTO, "-o", "out.txt"], "'out.txt' must end in one of .png"),
    ],
)
def test_wrong_usage_is_status_2(args, told):
    assert told in " ".join(fails(2, *args).split())


def test_failures_are_one_line_and_status_1(photo, tmp_path):
    (tmp_path / "broken.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.ckpt").write_bytes(b"\x80\x02}.")
    out = tmp_path / "out"
    for told, args in {
        "is not a folder": ["extract", "local-dir:nowhere", photo, "-o", out],
        "holds no image": ["extract", "tinysd_gdf", tmp_path / "empty", "-o", out],
        "indices must be different positions from -3 to 2, got [7]": [
            "extract",
            "tinysd_gdf",
            photo,
            "-o",
            out,
            "--levels",
            "7",
        ],
        "timestep: expected int <= 999, got 1000": ["extract", "tinysd_gdf", photo, "-o", out, "--timestep", "1000"],
        "is a pickle": ["extract", "tinysd_gdf", photo, "-o", out, "--checkpoint-path", tmp_path / "weights.ckpt"],
        "cannot be downloaded": ["extract", "sd15_gdf", photo, "-o", out],
        "cannot be read as an image": ["visualize", "tinysd_gdf", tmp_path / "broken.jpg", "-o", tmp_path / "out.png"],
        "cannot be written": ["visualize", "tinysd_gdf", photo, "-o", photo / "out.png"],
    }.items():
        lines = fails(1, *args).splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("Error: ")
        assert told in lines[0]
    assert not out.exists()


def test_a_key_error_is_not_shown_in_quotes(monkeypatch):
    def unknown(_):
        raise KeyError("no such thing.\nDid you mean 'that'?")

    monkeypatch.setattr(backbone_card, "card", unknown)
    assert fails(1, "card", "sd15_gdf") == "Error: no such thing. Did you mean 'that'?\n"
    assert isinstance(run("--traceback", "card", "sd15_gdf").exception, KeyError)


def test_version_and_help():
    assert ok("--version") == f"diffusion-backbones, version {db.__version__}\n"
    for verb in main.commands:
        text = ok(verb, "--help")
        assert f"diffusion-backbones {verb} " in text, "the help of every verb has an example"
    assert run().exit_code == 2


def test_an_option_means_the_same_in_every_verb():
    """A verb may say what a size or a prompt is for; where weights come from and where they run is said alike."""
    told = {}
    for verb, command in main.commands.items():
        for option in (option for option in command.params if isinstance(option, click.Option)):
            told.setdefault(option.opts[-1], {})[verb] = option.help
    for name in ("--device", "--levels", "--encoder", "--json", "--timestep", "--random-weights", "--checkpoint-path"):
        texts = {text for verb, text in told[name].items() if verb != "select"}
        assert len(texts) == 1, told[name]
    assert len(told["--device"]) > 4


def load(path: Path) -> torch.Tensor:
    """(1, 3, H, W) in [-1, 1]."""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(Image.open(path))[None] * 2 - 1
