"""Parameters, operations and bytes: against an independent count, against the networks, and without torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

import diffusion_backbones as db
from diffusion_backbones import costs as module
from diffusion_backbones.costs import costs, measure
from diffusion_backbones.recipe import Recipe
from diffusion_backbones.registry import Declaration


class Counter:
    """Two operations per multiply-add of every convolution, linear layer and attention product that runs, by hooks."""

    def __init__(self, network: nn.Module):
        self.operations = 0
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear, Attention)):
                layer.register_forward_hook(self.count, with_kwargs=True)

    def count(self, layer, args, kwargs, out):
        if isinstance(layer, nn.Conv2d):
            self.operations += 2 * out.numel() * layer.in_channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]
        elif isinstance(layer, nn.Linear):
            self.operations += 2 * out.numel() * layer.in_features
        else:
            queries = args[0].flatten(2).shape[2] if args[0].ndim == 4 else args[0].shape[1]
            text = kwargs.get("encoder_hidden_states")
            keys = queries if text is None else text.shape[1]
            self.operations += 2 * 2 * queries * keys * layer.inner_dim      # q k^T, then the weights times v


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


@pytest.mark.parametrize("name", ["sd15_gdf", "ssd_1b_diffcut", "tinysd_hyperfeatures"])
def test_published_costs_are_those_of_the_network(name):
    backbone, counted = db.create_model(name, device="meta"), costs(db.get_declaration(name))
    assert counted.parameters == sum(p.numel() for p in backbone.denoiser.parameters())
    assert counted.encoder_parameters == sum(p.numel() for p in backbone.encoder.parameters())
    assert counted.bytes == sum(p.nbytes for p in backbone.parameters())
    assert counted.size == backbone.declaration.input_size


@pytest.mark.parametrize("name", db.list_models(include_tags=True))
def test_costs_of_every_backbone_are_published(name, monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail(f"costs.json does not have {name}; run: python scripts/generate.py"))
    assert costs(db.get_declaration(name)).parameters > 0


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
from diffusion_backbones.cards import card
for name in db.list_models():
    card(db.get_declaration(name))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
