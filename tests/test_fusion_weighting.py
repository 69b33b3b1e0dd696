"""Weights of members: by confidence where a call asks for it, and where only some maps of a member have gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import diffusion_backbones as db
from diffusion_backbones.backbone.fusion.timm_extractor import extractor
from diffusion_backbones.spec.fusion import TimmModel

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tinysd():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(2)
    return extractor(TimmModel("test_vit", input_size=256))


def rows_of(m: torch.Tensor) -> np.ndarray:
    return m.double().permute(0, 2, 3, 1).flatten(0, 2).numpy()


def test_a_call_that_asks_for_confidence_gets_the_shares_alone(vit):
    """Whatever numbers the fusion has: the vectors of its members have lengths that sum to 1."""
    sd = db.create_model("tinysd_gdf", pretrained=True, out_indices=[1])
    both = db.fuse(sd, vit, weights=(1, 0.25))
    query, key = X[:1], X[1:].flip(-1)
    [got] = both(query, weights="confidence", against=key)
    clear, parts = [], []
    for q, k in ((sd(query)[0], sd(key)[0]), (both.members[1](normal(vit, query))[0], vit(normal(vit, key))[0])):
        q, k = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (rows_of(q), rows_of(k)))
        similar = q @ k.T
        clear.append(similar.max(1) - similar.mean(1))
        parts.append(q)
    shares = np.stack(clear) / np.sum(clear, 0)
    expected = np.concatenate([part * share[:, None] for part, share in zip(parts, shares, strict=True)], 1)
    np.testing.assert_allclose(rows_of(got), expected, atol=1e-5)


def normal(vit, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(vit.net.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return ((x + 1) / 2 - mean) / std


@pytest.mark.parametrize("settings", [{"components": 4}, {"normalize": "none"}])
def test_confidence_is_refused_in_a_call_where_a_fusion_cannot_have_it(tinysd, vit, settings):
    both = db.fuse(tinysd, vit, **settings)
    if "components" in settings:
        both.fit(X)
    with pytest.raises(ValueError, match="go with normalize='l2', and with no components behind them"):
        both(X[:1], weights="confidence", against=X[1:])


@pytest.mark.parametrize("settings", [{}, {"weights": (0.5, 2)}, {"weights": (0.5, 2), "normalize": "none"}])
def test_a_member_with_gradients_in_some_of_its_maps_is_weighted_as_a_whole(vit, settings):
    """The first map of ODISE is of the image encoder alone, which is not trained."""
    sd = db.create_model("tinysd_odise", pretrained=True, trainable=True)
    maps = sd(X)
    [fused] = db.fuse(sd, vit, strides=(16,), **settings)(X)
    assert len({m.requires_grad for m in maps}) == 2
    size, (a, b) = fused.shape[-2:], settings.get("weights", (1, 1))
    parts = [
        F.interpolate(m, size, mode="bilinear") if m.shape[-1] < size[1] else F.adaptive_avg_pool2d(m, size)
        for m in maps
    ]
    whole, other = torch.cat(parts, 1), vit(normal(vit, X))[0]
    if settings.get("normalize") != "none":
        whole, other = F.normalize(whole, dim=1), F.normalize(other, dim=1)
    torch.testing.assert_close(fused, torch.cat([a * whole, b * other], 1), rtol=1e-4, atol=1e-5)
