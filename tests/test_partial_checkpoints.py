"""Parts of checkpoints, in every form that people have them in: what a part lacks comes from its base, and what it
holds from itself. The right features are those of diffusers' own pipeline on the same parts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import original
import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from stock_pipeline import LEVELS, pipeline, stock_pyramid
from torch import Tensor

import diffusion_backbones as db

WEIGHTS = "diffusion_pytorch_model.safetensors"
X = torch.linspace(-1, 1, 3 * 64 * 128).view(1, 3, 64, 128).sin()
NOISE = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(3))
PREFIX = "model.diffusion_model."
State = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def prompts(monkeypatch, tmp_path):
    """No prompt is known."""
    monkeypatch.setenv("DIFFUSION_BACKBONES_CACHE", str(tmp_path / "prompts"))


@pytest.fixture(scope="module")
def folders(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """A base, and a checkpoint of the same topology with other weights in every part."""
    return tiny_folder("sd15"), tiny.folder("sd15", tmp_path_factory.mktemp("tuned"), seed=1)


@pytest.fixture(scope="module")
def right(folders, tmp_path_factory) -> Callable[[set[str]], list[Tensor]]:
    """The features of the base with some components of the other checkpoint, as diffusers computes them."""
    known: dict[frozenset[str], list[Tensor]] = {}

    def compute(parts: set[str]) -> list[Tensor]:
        if frozenset(parts) not in known:
            mixed = tmp_path_factory.mktemp("mixed")
            for component in folders[0].iterdir():
                source = folders[1] if component.name in parts else folders[0]
                copy = shutil.copytree if component.is_dir() else shutil.copy
                copy(source / component.name, mixed / component.name)
            pipe = pipeline("sd15", mixed)
            known[frozenset(parts)] = stock_pyramid(pipe, LEVELS["sd15_gdf"], X, NOISE, 51, "a photo of a cat")
        return known[frozenset(parts)]

    return compute


def file(tuned: Path, path: Path, keep: Callable[[str], bool], rename: Callable[[str], str] = str) -> Path:
    """Some tensors of the other checkpoint's single file."""
    whole = original.write("sd15", tuned, path.with_name("whole.safetensors"))
    save_file({rename(name): tensor for name, tensor in load_file(whole).items() if keep(name)}, path)
    whole.unlink()
    return path


def part_folder(tuned: Path, path: Path, *components: str) -> Path:
    for component in components:
        shutil.copytree(tuned / component, path / component)
    return path


FORMS: dict[str, tuple[Callable[[Path, Path], Path], set[str]]] = {
    "diffusers file": (lambda tuned, _: tuned / "unet" / WEIGHTS, {"unet"}),
    "prefixed file": (lambda tuned, to: file(tuned, to / "a.safetensors", lambda n: n.startswith(PREFIX)), {"unet"}),
    "bare file": (
        lambda tuned, to: file(
            tuned, to / "a.safetensors", lambda n: n.startswith(PREFIX), lambda n: n.removeprefix(PREFIX)
        ),
        {"unet"},
    ),
    "file without vae": (
        lambda tuned, to: file(tuned, to / "a.safetensors", lambda n: not n.startswith("first_stage_model.")),
        {"unet", "text_encoder"},
    ),
    "file without text": (
        lambda tuned, to: file(tuned, to / "a.safetensors", lambda n: not n.startswith("cond_stage_model.")),
        {"unet", "vae"},
    ),
    "whole file": (
        lambda tuned, to: file(tuned, to / "a.safetensors", lambda _: True),
        {"unet", "vae", "text_encoder"},
    ),
    "folder of a unet": (lambda tuned, _: tuned / "unet", {"unet"}),
    "checkpoint of a training script": (lambda tuned, to: part_folder(tuned, to / "c", "unet"), {"unet"}),
    "folder of a vae": (lambda tuned, to: part_folder(tuned, to / "c", "vae"), {"vae"}),
    "folder without tokenizer": (
        lambda tuned, to: part_folder(tuned, to / "c", "unet", "vae", "text_encoder"),
        {"unet", "vae", "text_encoder"},
    ),
}


def assert_right(backbone: db.DiffusionBackbone, expected: list[Tensor]) -> None:
    for ours, stock in zip(backbone(X, noise=NOISE), expected, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_part_is_completed_by_the_folder_that_it_is_given_beside(form, folders, right, tmp_path):
    make, parts = FORMS[form]
    levels = db.get_declaration("sd15_gdf").recipe.levels
    recipe = db.Recipe("mine", levels, timestep=51, prompt="a photo of a cat")
    path = make(folders[1], tmp_path)
    backbone = db.create_model(f"local-dir:{folders[0]}", recipe=recipe, checkpoint_path=path)
    assert_right(backbone, right(parts))
    assert backbone.provenance == {"path": str(folders[0])} | {f"{part}_path": str(path) for part in parts}


@pytest.fixture
def published(monkeypatch, tmp_path, folders) -> Hub:
    """Stable Diffusion 1.5's repository, with the base's weights, on a hub of the loopback interface."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    checkpoint = db.get_checkpoint("sd15")
    hub.add(checkpoint.hub_id, folders[0], commit=checkpoint.revision)
    yield hub
    hub.off()


@pytest.mark.parametrize("form", ["diffusers file", "folder of a unet", "folder of a vae", "folder without tokenizer"])
def test_a_part_is_completed_by_the_hub_where_that_is_allowed(form, folders, right, published, tmp_path):
    make, parts = FORMS[form]
    path = make(folders[1], tmp_path)
    given = {"checkpoint_path": path, "prompt": "a photo of a cat"}
    assert_right(db.create_model("sd15_gdf", pretrained=True, **given), right(parts))
    sent = published.downloaded(db.get_checkpoint("sd15").hub_id)
    assert not any(name.startswith(f"{part}/") and name.endswith(".safetensors") for part in parts for name in sent)


@pytest.mark.parametrize(
    ("form", "lacks"),
    [
        ("diffusers file", "vae, text_encoder"),
        ("folder of a unet", "vae, text_encoder, tokenizer, scheduler"),
        ("checkpoint of a training script", "vae, text_encoder, tokenizer, scheduler"),
        ("folder of a vae", "unet, scheduler"),
    ],
)
def test_a_part_alone_says_what_it_lacks_and_where_that_comes_from(form, lacks, folders, tmp_path):
    path = FORMS[form][0](folders[1], tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=rf"lacks {lacks}.*What a file or a folder lacks comes from a whole checkpoint: add pretrained=True to "
        r"take them from stable-diffusion.*'local-dir:FOLDER'",
    ):
        db.create_model("sd15_gdf", checkpoint_path=path)


def test_a_whole_folder_asks_no_hub(folders, right):
    backbone = db.create_model("sd15_gdf", pretrained=True, checkpoint_path=folders[0], prompt="a photo of a cat")
    assert_right(backbone, right(set()))
    assert backbone.provenance == {"path": str(folders[0])}


def test_averaged_weights_beside_the_others_are_told_of(folders, tmp_path, caplog):
    part = part_folder(folders[1], tmp_path / "c", "unet")
    shutil.copytree(folders[1] / "unet", part / "unet_ema")
    db.create_model(f"local-dir:{folders[0]}", recipe=["mid-vit-out"], checkpoint_path=part)
    assert f"{part} holds averaged weights too (unet_ema)" in caplog.text


# Companions, and names that other programs write.


def keys(state: State, old: str, new: str) -> State:
    return {name.replace(old, new, 1) if name.startswith(old) else name: tensor for name, tensor in state.items()}


def beside(**more: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name.replace("__", "."): tensor for name, tensor in more.items()}


TEXT = "cond_stage_model."
WRITTEN: dict[str, Callable[[State], State]] = {
    "logit scale and projection beside the transformer": beside(
        cond_stage_model__logit_scale=torch.tensor(4.6), cond_stage_model__text_projection=torch.eye(32)
    ),
    "projection inside the transformer": beside(cond_stage_model__transformer__text_projection__weight=torch.eye(32)),
    "clip_l": lambda state: keys(state, TEXT, f"{TEXT}clip_l."),
    "no text_model": lambda state: keys(state, f"{TEXT}transformer.text_model.", f"{TEXT}transformer."),
    "schedules": beside(denoiser__sigmas=torch.rand(1000), v_pred=torch.zeros(1)),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_companions_and_names_of_other_programs_change_nothing(what, folders, right, tmp_path):
    whole = original.write("sd15", folders[1], tmp_path / "whole.safetensors")
    state = {name: tensor.clone() for name, tensor in WRITTEN[what](load_file(whole)).items()}
    save_file(state, tmp_path / "written.safetensors")
    levels = db.get_declaration("sd15_gdf").recipe.levels
    recipe = db.Recipe("mine", levels, timestep=51, prompt="a photo of a cat")
    place = f"local-dir:{folders[0]}"
    backbone = db.create_model(place, recipe=recipe, checkpoint_path=tmp_path / "written.safetensors")
    assert_right(backbone, right({"unet", "vae", "text_encoder"}))


@pytest.mark.parametrize("spelling", ["open clip", "transformers", "clip_g"])
def test_the_second_encoder_of_sdxl_is_read_in_every_spelling(spelling, tiny_folder, tmp_path):
    folder = tiny_folder("sdxl")
    state = load_file(original.write("sdxl", folder, tmp_path / "whole.safetensors"))
    prefix = "conditioner.embedders.1."
    if spelling != "open clip":
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        inner = f"{prefix}clip_g.transformer." if spelling == "clip_g" else f"{prefix}model."
        state |= {inner + name: t for name, t in load_file(folder / "text_encoder_2/model.safetensors").items()}
    file = tmp_path / "written.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, file)
    place, recipe = f"local-dir:{folder}", ["mid-vit-out"]
    got = db.create_model(place, recipe=recipe, checkpoint_path=file).conditioning
    for name, expected in db.create_model(place, recipe=recipe).conditioning.items():
        assert torch.equal(dict(got.items())[name], expected), name


def test_a_tensor_that_does_not_fit_is_named_as_it_is_stored(folders, tmp_path):
    state = load_file(original.write("sd15", folders[1], tmp_path / "whole.safetensors"))
    state[f"{PREFIX}time_embed.0.weight"] = torch.zeros(3, 5)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(
        ValueError, match=rf"{PREFIX}time_embed\.0\.weight \(3, 5\), expected .*of another architecture\?"
    ):
        db.create_model(f"local-dir:{folders[0]}", recipe=["mid-vit-out"], checkpoint_path=tmp_path / "odd.safetensors")


@pytest.mark.parametrize("name", ["edm_mean", "edm_std"])
def test_latents_that_are_normalized_otherwise_are_refused(name, folders, tmp_path):
    state = load_file(original.write("sd15", folders[1], tmp_path / "whole.safetensors"))
    save_file(state | {name: torch.zeros(1, 4, 1, 1)}, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match=rf"holds {name}: its latents are normalized and its noise is scheduled"):
        db.create_model("sd15_gdf", checkpoint_path=tmp_path / "edm.safetensors")


def test_a_mark_of_zero_terminal_snr_is_heeded(folders, tmp_path):
    """The levels are those of stock DDPM with rescale_betas_zero_snr, at a step where they differ much."""
    base, recipe = folders[0], db.Recipe("late", levels=("mid-vit-out",), timestep=900)
    state = load_file(original.write("sd15", folders[1], tmp_path / "whole.safetensors"))
    save_file(state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "marked.safetensors")
    config = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    for name, rescaled in (("whole", False), ("marked", True)):
        backbone = db.create_model(f"local-dir:{base}", recipe=recipe, checkpoint_path=tmp_path / f"{name}.safetensors")
        stock = DDPMScheduler(**{key: config[key] for key in keys}, rescale_betas_zero_snr=rescaled)
        bar = stock.alphas_cumprod[900].item()
        assert backbone.forward_process.levels(900) == pytest.approx((bar**0.5, (1 - bar) ** 0.5), rel=1e-5)


# Other architectures.


@pytest.mark.parametrize(
    ("given", "asked", "how", "reads"),
    [
        ("sd15", "sd21", "convolutions and not linear layers", "sd13, sd14, sd15"),
        ("sd21", "sd15", "linear layers and not convolutions", "sd21"),
        ("sdxl", "sd15", "", "sdxl"),
        ("sd15", "sdxl", "", "sd13, sd14, sd15"),
    ],
)
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_file_of_another_architecture_says_which_names_read_it(
    layout, given, asked, how, reads, tiny_folder, tmp_path
):
    path = tiny_folder(given) / "unet" / WEIGHTS
    if layout == "original":
        path = original.write(given, tiny_folder(given), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"is not a file of my_.*{how}.*though not the widths, of .*{reads}") as error:
        db.create_model(f"local-dir:{tiny_folder(asked)}", recipe=["mid-vit-out"], checkpoint_path=path)
    assert "config.json" not in str(error.value)


@pytest.mark.parametrize(("given", "asked"), [("sd15", "sdxl"), ("sd21", "sdxl")])
def test_a_whole_file_of_another_architecture_says_so_before_what_it_lacks(given, asked, tiny_folder, tmp_path):
    """SDXL has a second text encoder; to add one to a file of Stable Diffusion would not help."""
    path = original.write(given, tiny_folder(given), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=rf"is not a file of {asked}.*though not the widths, of .*{given}"):
        db.create_model(f"{asked}_gdf", checkpoint_path=path)


def test_a_unet_of_more_channels_says_whose_they_are(folders, tmp_path):
    state = load_file(original.write("sd15", folders[1], tmp_path / "whole.safetensors"))
    state[f"{PREFIX}input_blocks.0.0.weight"] = torch.zeros(16, 9, 3, 3)
    save_file(state, tmp_path / "inpaint.safetensors")
    with pytest.raises(ValueError, match="it takes 9 channels where latents have 4, as inpainting networks do"):
        db.create_model(
            f"local-dir:{folders[0]}", recipe=["mid-vit-out"], checkpoint_path=tmp_path / "inpaint.safetensors"
        )
