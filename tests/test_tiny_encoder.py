"""``encoder="tiny"``: what diffusers' own ``AutoencoderTiny`` gives reaches the denoiser, scaled or not, saved or not;
and how far off it is is measured.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diffusers import AutoencoderTiny
from safetensors import safe_open

import diffusion_backbones as db
from diffusion_backbones.cli.program import main
from diffusion_backbones.evaluation import deviation
from diffusion_backbones.factory import tiny_encoder
from diffusion_backbones.families import architecture
from diffusion_backbones.families.image_encoders import get_image_encoder
from diffusion_backbones.reports import backbone_card, costs
from diffusion_backbones.spec.checkpoint import Checkpoint
from diffusion_backbones.spec.configs import CONFIGS, package_configs, packaged

pytestmark = pytest.mark.usefixtures("costs_not_measured")

FITTED = {name: db.get_checkpoint(name) for name in db.list_checkpoints() if db.get_checkpoint(name).tiny_encoder}
PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"
WEIGHTS = CONFIGS / "tinysd" / "vae" / "tiny" / "diffusion_pytorch_model.safetensors"


def images(count: int = 1) -> list[torch.Tensor]:
    return [torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(count)]


def stock(config: dict[str, object], seed: int = 0) -> AutoencoderTiny:
    torch.manual_seed(seed)
    return AutoencoderTiny.from_config(config).eval()


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True, encoder="tiny")


# What is declared.


@pytest.mark.parametrize("name", FITTED)
def test_every_declared_one_fits_its_checkpoint(name):
    checkpoint = FITTED[name]
    network = architecture(checkpoint)
    config = tiny_encoder.fitted(packaged(checkpoint.tiny_encoder), network, network.image_encoder)
    assert get_image_encoder(config).scaling == network.image_encoder.scaling
    assert config["latent_channels"] == network.latent_channels
    assert get_image_encoder(config).stride == network.latent_stride
    assert Checkpoint.from_dict(json.loads(json.dumps(asdict(checkpoint)))) == checkpoint


def test_the_published_sizes():
    """1,222,532 parameters for four channels (README of madebyollin/taesd at 0203732), and a ninth of the operations of
    the exact encoder.
    """
    cost = costs.measure(db.get_declaration("sd15_gdf"))
    assert cost.tiny_encoder_parameters == 1222532
    assert cost.encoder_gflops / cost.tiny_encoder_gflops == pytest.approx(9.1, abs=0.1)
    built = db.create_model("sd15_gdf", encoder="tiny", device="meta")
    measured = costs.costs(built.declaration, built.configs)
    assert (measured.encoder_parameters, measured.encoder_gflops) == (
        cost.tiny_encoder_parameters,
        cost.tiny_encoder_gflops,
    )
    assert costs.costs(db.get_declaration("dit_xl_256_ddae")).tiny_encoder_gflops == 0


# What it computes.


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd3_medium", "flux_dev"])
def test_latents_are_those_of_the_stock_network_without_its_scale(name):
    """Scaled as the checkpoint's own, with its shift, they are the stock network's output."""
    checkpoint = FITTED[name]
    configs = package_configs(checkpoint)
    config = tiny_encoder.fitted(packaged(checkpoint.tiny_encoder), own := architecture(checkpoint), own.image_encoder)
    kind = get_image_encoder(config)
    torch.manual_seed(0)
    encoder = kind.truncate(kind.build()).eval()
    assert encoder.decoder is None
    [x] = images()
    expected = stock(packaged(checkpoint.tiny_encoder)).encode(x).latents
    factor, shift = configs["vae"]["scaling_factor"], configs["vae"].get("shift_factor") or 0.0
    torch.testing.assert_close((kind.encode(encoder, x) - shift) * factor, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_features_are_those_of_its_latents(backbone):
    whole = AutoencoderTiny.from_pretrained(WEIGHTS.parent, torch_dtype=torch.float32)
    [x] = images()
    z = whole.encode(x).latents
    torch.testing.assert_close(backbone.encode(x), z, rtol=1e-5, atol=1e-5)
    exact = db.create_model("tinysd_gdf", pretrained=True)
    for given, expected in zip(backbone(x), exact(latents=z), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    unscaled = db.create_model("tinysd_gdf", pretrained=True, encoder="tiny", scaled=False)
    torch.testing.assert_close(unscaled.encode(x), z / exact.encoder.config.scaling_factor, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(backbone(x)[0][1:], backbone(x[1:])[0], rtol=1e-4, atol=1e-4)


def test_what_diffusers_writes_is_read_without_complaint(caplog):
    db.create_model("tinysd_gdf", pretrained=True, encoder="tiny")
    assert not caplog.records


def test_it_trains_the_denoiser_behind_it():
    backbone = db.create_model("tinysd_gdf", pretrained=True, encoder="tiny", trainable=True)
    backbone(images()[0])[0].square().mean().backward()
    assert all(parameter.grad is None for parameter in backbone.encoder.parameters())
    assert any(parameter.grad is not None for parameter in backbone.denoiser.parameters())


# Where it comes from, and where it is kept.


def test_the_package_has_an_encoder_alone(backbone):
    assert WEIGHTS.stat().st_size < 1e6
    with safe_open(WEIGHTS, "pt") as file:
        assert all(name.startswith("encoder.") for name in file.keys())  # noqa: SIM118  (an open file is no mapping)
    assert backbone.provenance == {"path": str(CONFIGS / "tinysd"), "vae_path": str(WEIGHTS.parent)}
    assert backbone.encoder.decoder is None


def test_a_saved_backbone_keeps_it(backbone, tmp_path):
    again = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")
    [x] = images()
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), again(x), strict=True))
    assert again.declaration.checkpoint == backbone.declaration.checkpoint
    card = (tmp_path / "README.md").read_text()
    assert "as the tiny encoder gives them" in card
    assert "## Tiny encoder" not in card
    with pytest.raises(TypeError, match="a saved backbone keeps its image encoder"):
        db.create_model(f"local-dir:{tmp_path}", encoder="tiny")


def test_a_folder_whose_image_encoder_is_a_tiny_one(tmp_path, tiny_folder):
    """As people publish faster checkpoints; its config.json says it."""
    folder = tiny.folder("sd15", tmp_path)
    for file in (folder / "vae").iterdir():
        file.unlink()
    whole = stock(packaged(FITTED["sd15"].tiny_encoder))
    whole.save_pretrained(folder / "vae")
    [x] = images()
    with torch.no_grad():
        torch.testing.assert_close(
            db.create_model("sd15_gdf", checkpoint_path=folder).encode(x), whole.encode(x).latents, rtol=1e-5, atol=1e-5
        )


def test_float16_needs_no_exception():
    """It is SDXL's own encoder that overflows."""
    half = [db.create_model("sdxl_gdf", encoder=encoder, dtype="float16", device="meta") for encoder in ("tiny", None)]
    assert [next(b.encoder.parameters()).dtype for b in half] == [torch.float16, torch.float32]


# What is refused.


def test_what_is_refused(tiny_folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"no tiny encoder is known for the latents of dit_xl_256\. These have one: .*sd15.*tinysd"
    ):
        db.create_model("dit_xl_256_ddae", encoder="tiny", device="meta")
    with pytest.raises(ValueError, match=r"encoder='tinny' is none of 'tiny'\. Did you mean tiny\?"):
        db.create_model("sd15_gdf", encoder="tinny", device="meta")
    with pytest.raises(
        KeyError,
        match="has no activation 'encoder-level0-repeat0-res-out': its image encoder has no readable activations",
    ):
        db.create_model("sd15", recipe=["encoder-level0-repeat0-res-out"], encoder="tiny", device="meta")
    with pytest.raises(ValueError, match="it has no readable activations .tiny encoders never do."):
        db.create_model("sd15_gdf", encoder="tiny", encoder_levels=True, out_strides=(4, 8), device="meta")
    with pytest.raises(FileNotFoundError, match=r"is in madebyollin/taesd on the hub; add pretrained=True"):
        db.create_model("sd15_gdf", encoder="tiny", checkpoint_path=tiny_folder("sd15"))
    folder = tiny.folder("tinysd", tmp_path)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))
    with pytest.raises(
        ValueError,
        match="the network takes 4 channels, and the image encoder gives 8",
    ):
        db.create_model("tinysd_gdf", encoder="tiny", checkpoint_path=folder)
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderOfTomorrow"}))
    with pytest.raises(
        ValueError,
        match=r"the image encoder is of class 'AutoencoderOfTomorrow', by its config\.json; known are AutoencoderKL,",
    ):
        db.create_model("tinysd_gdf", checkpoint_path=folder)


# How far off it is.


@torch.no_grad()
def test_deviations_equal_a_plain_count(backbone):
    exact = db.create_model("tinysd_gdf", pretrained=True)
    found = deviation.deviations(exact, backbone, images(2))
    assert [row.level for row in found] == ["latents", "0", "1", "2"]
    assert [(row.channels, row.stride) for row in found[1:]] == list(
        zip(exact.feature_info.channels(), exact.feature_info.reduction(), strict=True)
    )
    for i, row in enumerate(found[1:]):
        a, b = (torch.cat([net(x)[i] for x in images(2)]) for net in (exact, backbone))
        assert row.error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-4)
        assert row.cosine == pytest.approx(float(F.cosine_similarity(a, b, dim=1).mean()), rel=1e-4)
    assert 0 < found[0].error < 1
    assert all(row.error < 1e-6 and row.cosine > 1 - 1e-6 for row in deviation.deviations(exact, exact, images(1)))
    with pytest.raises(ValueError, match="no image"):
        deviation.deviations(exact, backbone, [])


def test_the_command_prints_and_writes(tmp_path, monkeypatch):
    photo, table = str(PHOTO), tmp_path / "found.csv"
    args = ["compare", "tinysd_gdf", photo, "--encoder", "tiny", "--size", "64", "--csv", str(table)]
    monkeypatch.setattr("sys.argv", ["bin/diffusion-backbones", *args])
    for _ in range(2):  # the second time in the place of the first
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(table.open()))
    assert (
        [line.split()[0] for line in result.stdout.splitlines()]
        == [row["level"] for row in rows]
        == ["latents", "0", "1", "2"]
    )
    assert (rows[0]["command"], rows[0]["images"]) == ("diffusion-backbones " + " ".join(args), "1")
    result = CliRunner().invoke(main, ["compare", "tinysd_gdf", photo])
    assert result.exit_code == 2
    assert "--encoder tiny" in result.stderr


def test_cards_say_how_far_off_it_is_or_that_nobody_measured():
    measured = backbone_card.card(db.get_declaration("tinysd_gdf"))
    assert "(`diffusion-backbones compare tinysd_gdf --encoder tiny" in measured
    unmeasured = backbone_card.card(db.get_declaration("sdxl_gdf"))
    assert "[madebyollin/taesdxl](https://huggingface.co/madebyollin/taesdxl) (mit)" in unmeasured
    assert "was not measured here; `diffusion-backbones compare sdxl_gdf IMAGES --encoder tiny` does" in unmeasured
    assert "Tiny encoder" not in backbone_card.card(db.get_declaration("dit_xl_256_ddae"))
