"""What the yardstick compares, and its linear probe."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "tinysd"))

import linear_probe
import photo_features

import diffusion_backbones as db

COLOR, POSITION = (photo_features.features(name, 0) for name in ("color", "position"))


def test_features_of_photographs_have_their_places():
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    assert POSITION.dense(x).shape[2:] == (16, 24)
    torch.testing.assert_close(POSITION.dense(x)[1, :2, 3, 5], torch.tensor([2 * 14 / 64 - 1, 2 * 22 / 96 - 1]))
    torch.testing.assert_close(COLOR.dense(x)[1, :3, 3, 5], x[1, :, 12:16, 20:24].mean((1, 2)))
    patch = x[1, :, 14 - 8 : 14 + 9, 22 - 8 : 22 + 9].flatten()
    patch = patch - patch.mean()
    torch.testing.assert_close(COLOR.matching(x)[1, :, 3, 5], patch / patch.norm())
    with pytest.raises(SystemExit, match=r"resnet needs --resnet"):
        photo_features.features("resnet", 0)


def test_a_name_has_settings_and_a_photo_network_beside(monkeypatch):
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(photo_features, "ResNet", lambda path: lambda x: [x[:, :2] * float(path.name)])
    built = db.create_model("tinysd_gdf", pretrained=True, timesteps=[1, 301], combine="concatenate")
    maps = photo_features.features("tinysd_gdf:timesteps=[1,301];combine=concatenate+resnet", 0, None, Path("7")).maps
    *own, photo = maps(x)
    assert all(torch.equal(m, expected) for m, expected in zip(own, built(x), strict=True))
    assert torch.equal(photo, x[:, :2] * 7)


def test_levels_are_resized_and_of_one_length_for_matching():
    maps = [torch.rand(1, 4, 8, 8), torch.rand(1, 16, 4, 4) * 100]
    network = photo_features.of_maps("two levels", lambda x: maps)
    x = torch.zeros(1, 3, 32, 32)
    assert torch.equal(network.dense(x)[:, :4], maps[0])
    matching = network.matching(x)
    torch.testing.assert_close(matching.norm(dim=1), torch.ones(1, 8, 8))
    torch.testing.assert_close(matching[:, :4].norm(dim=1), torch.full((1, 8, 8), 0.5**0.5))  # none outvotes another
    torch.testing.assert_close(network.pooled(x)[0], torch.cat([m.mean((2, 3)) for m in maps], 1)[0])


def test_the_most_similar_place_is_found():
    torch.manual_seed(0)
    target = F.normalize(torch.randn(32, 6, 9), dim=0)
    source = target.flip(1, 2)  # what is at (y, x) in one is at (5 - y, 8 - x) in the other
    places = torch.tensor([[(x + 0.5) / 9 * 2 - 1, (y + 0.5) / 6 * 2 - 1] for y in range(6) for x in range(9)])
    expected = torch.tensor([[(8 - x + 0.5) * 4, (5 - y + 0.5) * 4] for y in range(6) for x in range(9)])
    torch.testing.assert_close(photo_features.nearest(source, target, places), expected)
    a, b = (POSITION.matching(torch.zeros(1, 3, *size))[0] for size in ((64, 96), (32, 128)))
    found = photo_features.nearest(a, b, torch.tensor([[-0.5, 0.25], [0.9, -0.9]]))
    assert (found - torch.tensor([[32.0, 20.0], [121.6, 1.6]])).abs().max() <= 2.01  # the same relative place


def test_the_linear_probe_separates_what_a_line_separates():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    y = (x[:, 0] > 0).long().numpy()
    probe = linear_probe.Probe(x[:500], y[:500], 2)
    probe.fit(1e-3)
    assert (probe(x[500:]) == y[500:]).mean() > 0.95


def test_the_linear_probe_is_ridge_regression():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 7)) * rng.uniform(1, 9, 7), rng.integers(0, 4, 300)
    probe = linear_probe.Probe(torch.from_numpy(x).float(), y, 4)
    probe.fit(0.1)
    scaled = StandardScaler().fit_transform(x)
    other = Ridge(alpha=0.1 * 300).fit(scaled, np.eye(4)[y])
    assert (probe(torch.from_numpy(x).float()) == other.predict(scaled).argmax(1)).mean() > 0.99
