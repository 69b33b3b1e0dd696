"""Parameters, operations and bytes: against an independent count, against the networks, and without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

import diffusion_backbones as db
from diffusion_backbones.families import architecture, meta_trace
from diffusion_backbones.reports import costs as module
from diffusion_backbones.reports.costs import costs, measure, whole_network
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.recipe import Recipe


class Counter:
    """Two operations per multiply-add of every convolution, linear layer and attention product that runs, by hooks.

    ``attention=False`` leaves attention to whoever watches it another way.
    """

    def __init__(self, network: nn.Module, attention: bool = True):
        self.operations = 0
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, *([Attention] if attention else []))):
                layer.register_forward_hook(self.count, with_kwargs=True)

    def count(self, layer, args, kwargs, out):
        if isinstance(layer, nn.Conv2d):
            self.operations += (
                2 * out.numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
            )
        elif isinstance(layer, nn.Linear):
            self.operations += 2 * out.numel() * layer.in_features
        else:
            queries = args[0].flatten(2).shape[2] if args[0].ndim == 4 else args[0].shape[1]
            text = kwargs.get("encoder_hidden_states")
            keys = queries if text is None else text.shape[1]
            self.operations += 2 * 2 * queries * keys * layer.inner_dim  # q k^T, then the weights times v


def test_operations_equal_an_independent_count():
    backbone = db.create_model("tinysd_vpd")
    encoder, denoiser = Counter(backbone.encoder), Counter(backbone.denoiser)
    backbone(torch.zeros(1, 3, 256, 256))
    counted = costs(backbone.declaration)
    assert counted.encoder_gflops == pytest.approx(encoder.operations / 1e9, abs=1e-3)
    assert counted.denoiser_gflops == pytest.approx(denoiser.operations / 1e9, abs=1e-3)


def test_convention_of_stable_diffusion():
    """1117 GFLOPs for the encoder and 803 for the U-Net at 512 x 512, by which the documents quote."""
    counted = costs(db.get_declaration("sd15_vpd"))
    assert round(counted.encoder_gflops) == 1117
    assert round(counted.denoiser_gflops) == 803


def test_truncation_saves_operations_and_parameters():
    recipe = Recipe("one", levels=("up-level1-upsampler-out",), timestep=261)
    counted = measure(Declaration("sd15_one", db.get_checkpoint("sd15"), recipe))
    assert round(counted.denoiser_gflops) == 439
    assert round(counted.parameters / 1e6) == 769
    assert round(counted.parameters_total / 1e6) == 860


@pytest.mark.parametrize("name", ["dit_xl_256_ddae", "sd3_medium_seg4diff", "flux_dev_ditf", "flux_dev_ditf_tracking"])
def test_operations_of_transformers_equal_an_independent_count(name, monkeypatch):
    """At full size, on meta; every attention goes through PyTorch's fused one, for text and image alike."""
    backbone = db.create_model(name, device="meta")
    layers, products = Counter(backbone.denoiser, attention=False), []

    def attend(query, key, value, *args, **kwargs):
        products.append(2 * 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1])
        return torch.empty_like(query)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    latent = backbone.declaration.input_size // backbone.latent_stride
    backbone.forward_latents(torch.empty(1, backbone.latent_channels, latent, latent, device="meta"), ensemble=1)
    assert products
    assert costs(backbone.declaration).denoiser_gflops == pytest.approx(
        (layers.operations + sum(products)) / 1e9, rel=1e-4
    )


def test_operations_of_flux_by_arithmetic():
    """DiTF at 640 pixels: 1600 image and 512 text tokens of width 3072 through 19 double and 9 single blocks."""
    image, text, width = 1600, 512, 3072
    tokens = image + text
    attention = 4 * tokens**2 * width
    double = (
        2 * tokens * (4 + 8) * width**2 + attention + 2 * 12 * width**2
    )  # projections, FFN; attention; two modulations
    single = 2 * tokens * (3 + 4 + 5) * width**2 + attention + 2 * 3 * width**2
    entry = 2 * width * (64 * image + 4096 * text)
    assert costs(db.get_declaration("flux_dev_ditf")).denoiser_gflops == pytest.approx(
        (19 * double + 9 * single + entry) / 1e9, rel=1e-4
    )


@pytest.mark.parametrize("name", db.list_models())
def test_published_costs_are_those_of_the_network(name):
    backbone, counted = db.create_model(name, device="meta"), costs(db.get_declaration(name))
    assert counted.parameters == sum(p.numel() for p in backbone.denoiser.parameters())
    assert counted.encoder_parameters == sum(p.numel() for p in backbone.encoder.parameters())
    assert counted.bytes == sum(p.nbytes for p in backbone.parameters())
    assert counted.size == backbone.declaration.input_size


@pytest.mark.parametrize("name", ["flux2_klein_4b", "sd35_medium", "ddpm_cifar10_32"])
def test_published_costs_of_a_checkpoint_are_those_of_its_whole_network(name):
    checkpoint = db.get_checkpoint(name)
    whole = meta_trace.build(architecture(checkpoint))
    counted = costs(whole_network(checkpoint))
    assert counted.parameters_total == sum(p.numel() for p in whole.parameters())
    assert 0.99 * counted.parameters_total < counted.parameters <= counted.parameters_total


@pytest.mark.parametrize("name", db.list_checkpoints())
def test_costs_of_every_checkpoint_are_published(name, monkeypatch):
    monkeypatch.setattr(
        module, "measure", lambda *_: pytest.fail(f"costs.json does not have {name}; run: python scripts/generate.py")
    )
    assert costs(whole_network(db.get_checkpoint(name))).parameters_total > 0


@pytest.mark.parametrize("name", db.list_models(include_tags=True))
def test_costs_of_every_backbone_are_published(name, monkeypatch):
    monkeypatch.setattr(
        module, "measure", lambda *_: pytest.fail(f"costs.json does not have {name}; run: python scripts/generate.py")
    )
    assert costs(db.get_declaration(name)).parameters > 0


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("flux_dev_ditf", None), ("sd35_large", ["vit-block37-out"]), ("flux2_dev", ["vit-block55-out"])],
)
def test_the_memory_that_the_documents_name(name, recipe):
    """docs/memory.md: the weights in sixteen bits, in eight as diffusers casts them, and two blocks with what is in
    none.
    """
    denoiser = db.create_model(name, recipe=recipe, dtype=torch.bfloat16, device="meta").denoiser
    blocks = [
        sum(p.nbytes for p in block.parameters())
        for part in denoiser.children()
        if isinstance(part, nn.ModuleList)
        for block in part
    ]
    whole = sum(p.nbytes for p in denoiser.parameters())
    denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    eight = sum(p.nbytes for p in denoiser.parameters())
    cells = " | ".join(f"{size / 1e9:.2f}" for size in (whole, eight, 2 * max(blocks) + whole - sum(blocks)))
    text = (Path(__file__).parent.parent / "docs" / "memory.md").read_text()
    assert f"| `{name}`{', whole' if recipe else ''} | {cells} |" in text


def test_another_recipe_is_measured():
    declaration = db.get_declaration("tinysd_gdf")
    shorter = replace(declaration, recipe=declaration.recipe.override(levels=declaration.recipe.levels[1:]))
    assert costs(shorter).parameters < costs(declaration).parameters


def test_another_architecture_is_measured():
    declaration = db.get_declaration("sd15_gdf")
    counted = costs(declaration, tiny.configs("sd15"))
    assert counted.parameters < costs(declaration).parameters / 100


def test_a_size_is_padded_as_the_backbone_pads_it():
    declaration = db.get_declaration("tinysd_gdf")
    odd = replace(declaration, recipe=declaration.recipe.override(input_size=225))
    assert costs(odd) == costs(declaration)


def test_listing_costs_and_cards_needs_no_torch():
    code = """
import sys, diffusion_backbones as db
from diffusion_backbones.reports import checkpoint_card
from diffusion_backbones.reports.backbone_card import card
for name in db.list_models():
    card(db.get_declaration(name))
for name in db.list_checkpoints():
    checkpoint_card.card(db.get_checkpoint(name))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
