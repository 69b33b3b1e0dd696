"""An image alone and in a batch, at any position: the same features to rounding, by the figures of the README."""

from __future__ import annotations

import pytest
import torch

import diffusion_backbones as db

FIGURES = {"float32": 3e-6, "bfloat16": 3e-2}
"""The largest difference, as a share of the root of the mean square of a map."""


@pytest.mark.parametrize("name", ["tinysd_gdf", "sd15_gdf", "sdxl_gdf", "dit_xl_256_ddae", "pixart_sigma_512"])
@pytest.mark.parametrize("dtype", FIGURES)
def test_an_image_alone_and_in_a_batch(name, dtype, tiny_folder):
    place = (
        {"pretrained": True}
        if name == "tinysd_gdf"
        else {"checkpoint_path": tiny_folder(name.partition("_gdf")[0].partition("_ddae")[0])}
    )
    recipe = {"recipe": ["vit-block3-out"]} if "pixart" in name else {}
    backbone = db.create_model(name, dtype=dtype, **place, **recipe)
    images = torch.rand(5, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = backbone(images)
    for order in ([3], [1, 3], [4, 3, 2, 1, 0]):
        for whole, some in zip(together, backbone(images[order]), strict=True):
            alone, inside = some[order.index(3)].float(), whole[3].float()
            difference = (alone - inside).norm() / inside.norm()
            assert difference <= FIGURES[dtype], (name, dtype, order, float(difference))
    assert all(torch.equal(a, b) for a, b in zip(backbone(images), together, strict=True))  # one batch, the same bits
