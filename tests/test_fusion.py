"""Fusions: members exactly as they are alone, then normalized, weighted, reduced and concatenated."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusion_backbones as db
from diffusion_backbones.backbone.fusion import FusedBackbone, TimmExtractor
from diffusion_backbones.backbone.fusion.timm_extractor import extractor
from diffusion_backbones.spec.fusion import Member, TimmModel

pytestmark = pytest.mark.usefixtures("one_thread")
CONV, VIT = TimmModel("test_convnext", input_size=256), TimmModel("test_vit", input_size=256)
X = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def tinysd():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def conv() -> TimmExtractor:
    torch.manual_seed(1)
    return extractor(CONV)


@pytest.fixture(scope="module")
def vit() -> TimmExtractor:
    torch.manual_seed(2)
    return extractor(VIT)


def size_of(backbone) -> int:
    return backbone.declaration.input_size


def stock(member: TimmExtractor, x: torch.Tensor) -> list[torch.Tensor]:
    """timm's own network on images normalized by hand."""
    mean, std = (torch.tensor(member.net.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        return member.net(((x + 1) / 2 - mean) / std)


def same_size(*backbones) -> list[Member]:
    """Members that all see the image as it is."""
    return [Member(b.declaration, input_size=256) for b in backbones]


def fused(members, backbones, **settings) -> FusedBackbone:
    from diffusion_backbones.spec.fusion import Fusion

    return FusedBackbone(Fusion("test", tuple(members), **settings), backbones)


# Members as they are alone.


def test_before_normalization_every_member_is_bit_for_bit_itself(tinysd, conv, vit):
    members = same_size(tinysd, conv, vit)
    members[1] = Member(conv.declaration, input_size=256, maps=(1, 2, 3))
    both = fused(members, [tinysd, conv, vit], normalize="none")
    assert both.feature_info.reduction() == [8, 16, 32]
    sd, cnn, attention = tinysd(X), stock(conv, X), stock(vit, X)
    expected = [
        torch.cat([sd[0], cnn[1]], 1),
        torch.cat([sd[1], cnn[2], attention[0]], 1),
        torch.cat([sd[2], cnn[3]], 1),
    ]
    got = both(X)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert both.feature_info.channels() == [m.shape[1] for m in expected]


def test_a_member_sees_the_image_at_its_own_size(tinysd, vit):
    members = [Member(tinysd.declaration, input_size=256), Member(vit.declaration, input_size=128)]
    both = fused(members, [tinysd, vit], normalize="none")
    small = F.interpolate(X, (48, 80), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    [attention], sd = stock(vit, small), tinysd(X)
    got = both(X)
    assert torch.equal(got[0], sd[0])
    assert torch.equal(got[1], sd[1])
    expected = torch.cat([sd[2], attention], 1)  # stride 16 of half the size is stride 32
    torch.testing.assert_close(got[2], expected, rtol=1e-5, atol=1e-5)  # the oracle normalizes in other steps


@pytest.mark.parametrize("size", [(1, 1), (33, 95), (70, 41)])
def test_any_size_and_batch(tinysd, conv, vit, size):
    both = db.fuse(tinysd, conv, vit)
    x = torch.rand(3, 3, *size) * 2 - 1
    maps = both(x)
    assert [tuple(m.shape[-2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32)]
    for m, alone in zip(maps, both(x[1:2]), strict=True):
        torch.testing.assert_close(m[1:2], alone, rtol=1e-4, atol=1e-4)


# What a fusion does, against arithmetic.


def test_l2_and_weights(tinysd, conv):
    members = [Member(tinysd.declaration, input_size=256), Member(conv.declaration, input_size=256, maps=(1, 2, 3))]
    both = fused(members, [tinysd, conv], weights=(0.25, 2))
    for got, a, b in zip(both(X), tinysd(X), stock(conv, X)[1:], strict=True):
        parts = []
        for m, weight in ((a, 0.25), (b, 2)):
            m = m.double().numpy()
            parts.append(weight * m / np.sqrt((m**2).sum(1, keepdims=True)))
        np.testing.assert_allclose(got.numpy(), np.concatenate(parts, 1), rtol=1e-4, atol=1e-5)


def test_several_maps_of_a_member_at_one_stride_have_one_length(tinysd, vit):
    members = [Member(tinysd.declaration, input_size=256, maps=(1, 0, 2)), Member(vit.declaration, input_size=256)]
    [got] = fused(members, [tinysd, vit], strides=(16,))(X)
    sd = tinysd(X)
    coarse = F.interpolate(sd[2], sd[1].shape[-2:], mode="bilinear", align_corners=False)
    fine = F.adaptive_avg_pool2d(sd[0], sd[1].shape[-2:])
    together = F.normalize(torch.cat([sd[1], fine, coarse], 1), dim=1)
    expected = torch.cat([together, F.normalize(stock(vit, X)[0], dim=1)], 1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def principal(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and axes by singular values, each axis with its largest entry positive, as scikit-learn signs them."""
    mean = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    axes = axes[:n]
    return mean, axes * np.sign(axes[np.arange(n), np.abs(axes).argmax(1)])[:, None]


def rows_of(m: torch.Tensor) -> np.ndarray:
    return m.double().permute(0, 2, 3, 1).flatten(0, 2).numpy()


def test_components_of_a_member_are_fitted_on_all_images_together(tinysd, vit):
    members = [Member(tinysd.declaration, input_size=256, components=4), Member(vit.declaration, input_size=256)]
    both = fused(members, [tinysd, vit], normalize="none")
    assert both.feature_info.channels() == [4, 4 + vit.out_maps[0].channels, 4]
    with pytest.raises(ValueError, match=r"principal components, which are not fitted yet; call fit\(images\)"):
        both(X)
    both.fit([X, X[..., :64, :]])
    first, second, got = tinysd(X), tinysd(X[..., :64, :]), both(X)
    for level in range(3):
        mean, axes = principal(np.concatenate([rows_of(first[level]), rows_of(second[level])]), 4)
        np.testing.assert_allclose(rows_of(got[level])[:, :4], (rows_of(first[level]) - mean) @ axes.T, atol=2e-3)


def test_joint_components_come_last_and_are_saved(tinysd, vit, tmp_path):
    members = same_size(tinysd, vit)
    both = fused(members, [tinysd, vit], components=5, weights=(1, 0.5)).fit(X)
    plain = fused(members, [tinysd, vit], weights=(1, 0.5))(X)
    for got, m in zip(both(X), plain, strict=True):
        mean, axes = principal(rows_of(m), 5)
        np.testing.assert_allclose(rows_of(got), (rows_of(m) - mean) @ axes.T, atol=1e-4)
    again = db.create_model(f"local-dir:{both.save_pretrained(tmp_path)}")
    assert all(torch.equal(a, b) for a, b in zip(both(X), again(X), strict=True))


def test_confidence_is_the_greatest_similarity_less_the_mean_as_a_share(tinysd, vit):
    members = [Member(tinysd.declaration, input_size=256, maps=(1,)), Member(vit.declaration, input_size=256)]
    both = fused(members, [tinysd, vit], weights="confidence")
    query, key = X[:1], X[1:].flip(-1)
    [got] = both(query, against=key)
    clear, parts = [], []
    for q, k in ((tinysd(query)[1], tinysd(key)[1]), (stock(vit, query)[0], stock(vit, key)[0])):
        q, k = rows_of(q), rows_of(k)
        q, k = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (q, k))
        similar = q @ k.T
        clear.append(similar.max(1) - similar.mean(1))
        parts.append(q)
    shares = np.stack(clear) / np.sum(clear, 0)
    expected = np.concatenate([part * share[:, None] for part, share in zip(parts, shares, strict=True)], 1)
    np.testing.assert_allclose(rows_of(got), expected, atol=1e-5)
    [searched] = both(key, weights=(1, 1))
    np.testing.assert_allclose(np.linalg.norm(rows_of(searched), axis=1), np.sqrt(2), rtol=1e-5)
    with pytest.raises(ValueError, match="needs the images that positions are sought in: give against="):
        both(query)


# The contract.


def test_latents_of_every_member_give_the_same(tinysd, vit):
    both = db.fuse(tinysd, Member(VIT, input_size=128), normalize="none")
    x = X[..., :75, :110]
    z, expected = both.encode(x), both(x)
    assert [len(z), z[0].shape[1]] == [2, tinysd.latent_channels]
    assert all(torch.equal(a, b) for a, b in zip(both.forward_latents(z, (75, 110)), expected, strict=True))
    whole = X[..., :64, :128]
    for a, b in zip(both(latents=both.encode(whole)), both(whole), strict=True):
        assert torch.equal(a, b)


def test_copies_pickles_and_folders_give_the_same(tinysd, conv, tmp_path):
    both = db.fuse(tinysd, conv)
    expected = both(X)
    both.train()
    assert not any(m.training for m in both.modules())
    assert not any(p.requires_grad for p in both.parameters())
    folder = both.save_pretrained(tmp_path)
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), db.create_model(f"local-dir:{folder}")):
        assert all(torch.equal(a, b) for a, b in zip(expected, other(X), strict=True))
        assert list(other.state_dict()) == list(both.state_dict())
        assert other.declaration.digest == both.declaration.digest
    assert "test_convnext" in (folder / "README.md").read_text()


def test_a_call_may_set_every_diffusion_backbone_or_one(tinysd, vit):
    both = fused(same_size(tinysd, tinysd, vit), [tinysd, tinysd, vit], normalize="none")
    other, usual, c = tinysd(X, timestep=300), tinysd(X), tinysd.out_maps[0].channels
    assert torch.equal(both(X, timestep=300)[0], torch.cat([other[0], other[0]], 1))
    single = both(X, members={1: {"timestep": 300}})[0]
    assert torch.equal(single[:, :c], usual[0])
    assert torch.equal(single[:, c:], other[0])


def test_pruning_keeps_the_other_maps_as_they_are(tinysd, vit, conv):
    both = copy.deepcopy(db.fuse(tinysd, vit, conv, weights=(1, 2, 3)))
    expected = both(X)
    assert both.prune_intermediate_layers([0, 2]) == [0, 2]
    assert both.feature_info.reduction() == [8, 32]
    assert all(torch.equal(a, b) for a, b in zip(both(X), (expected[0], expected[2]), strict=True))


def test_gradients_reach_every_parameter_that_is_trained(conv):
    tinysd = db.create_model("tinysd_gdf", pretrained=True, trainable=True)
    frozen = db.create_model("tinysd_gdf", pretrained=True)
    frozen.denoiser.load_state_dict(tinysd.denoiser.state_dict())
    both, plain = db.fuse(tinysd, conv), db.fuse(frozen, conv)
    maps = both(X[:1])
    for a, b in zip(maps, plain(X[:1]), strict=True):
        torch.testing.assert_close(a, b)
    sum((m * torch.randn_like(m)).sum() for m in maps).backward()
    assert [n for n, p in both.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not any(p.requires_grad for p in both.members[1].parameters())


def test_by_name_with_a_model_of_timm():
    both = db.create_model("tinysd_gdf+test_vit", pretrained=False, device="meta")
    assert isinstance(both, FusedBackbone)
    assert [member.name for member in both.declaration.members] == ["tinysd_gdf", "test_vit"]
    maps = both(torch.empty(2, 3, 70, 41, device="meta"))
    info = both.feature_info
    assert [tuple(m.shape) for m in maps] == [
        (2, c, -(-70 // s), -(-41 // s)) for c, s in zip(info.channels(), info.reduction(), strict=True)
    ]


# Memory.


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those that are made within."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.seen:
                    self.seen.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.now -= nbytes


def peak(backbone, x) -> int:
    with torch.no_grad(), Peak() as found:
        backbone(x)
    return found.most


def test_in_turn_the_peak_is_that_of_the_largest_member_and_the_maps(tinysd, conv, vit):
    both = fused(same_size(tinysd, conv, vit), [tinysd, conv, vit], normalize="l2")
    maps = sum(m.nbytes for m in both(X))
    largest = max(peak(member, X) for member in (tinysd, conv, vit))
    assert largest <= peak(both, X) <= largest + 0.1 * maps + X.nbytes


def test_in_turn_members_visit_the_device_one_at_a_time(tinysd, vit, monkeypatch):
    both, moves = db.fuse(copy.deepcopy(tinysd), copy.deepcopy(vit), in_turn="cpu"), []
    expected = both(X)
    for name, member in (("a", both.members[0]), ("b", both.members[1])):
        monkeypatch.setattr(member, "to", lambda device, name=name: moves.append((name, str(device))))
    both.visits = torch.device("meta")  # where nothing is, so every member is brought there, and back
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusedBackbone, "device", torch.device("cpu"))
        got = both(X)
    assert moves == [("a", "meta"), ("a", "cpu"), ("b", "meta"), ("b", "cpu")]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Bad input.


@pytest.mark.parametrize(
    ("members", "settings", "error", "message"),
    [
        (["tinysd_gdf"], {}, ValueError, "at least two members, got 1"),
        (["tinysd_gdf", "tinysd_gfd"], {}, KeyError, "neither a backbone nor a model of timm.*tinysd_gdf"),
        (["tinysd_gdf", "tinysd"], {}, KeyError, "checkpoint without a recipe"),
        (["tinysd_gdf", "test_vit"], {"weights": (1, 2, 3)}, ValueError, "2 positive numbers, one for each member"),
        (["tinysd_gdf", "test_vit"], {"weights": (1, -2)}, ValueError, "2 positive numbers"),
        (["tinysd_gdf", "test_vit"], {"weights": "other"}, ValueError, "or 'confidence', got 'other'"),
        (["tinysd_gdf", "test_vit"], {"normalize": "l1"}, ValueError, "normalize must be 'none' or 'l2', got 'l1'"),
        (["tinysd_gdf", "test_vit"], {"strides": (16, 8)}, ValueError, "growing positive integers"),
        (["tinysd_gdf", "test_vit"], {"strides": (2, 8, 16)}, ValueError, "cannot meet at strides .* nearest to 2"),
        (["tinysd_gdf", "test_vit"], {"components": 0}, ValueError, "components must be an integer from 1"),
        (["tinysd_gdf", "test_vit"], {"components": 10**4}, ValueError, "cannot be reduced to 10000 components"),
        (["tinysd_gdf", "test_mlp_mixer"], {}, KeyError, "neither a backbone nor a model of timm"),
        (["tinysd_gdf", torch.nn.Identity()], {}, TypeError, "created with features_only=True, got Identity"),
        (["tinysd_gdf", 7], {}, TypeError, "a member must be a backbone, its name, or a model of timm, got 7"),
    ],
)
def test_what_cannot_be_fused_is_said(members, settings, error, message):
    with pytest.raises(error, match=message):
        db.fuse(*members, device="meta", **settings)


def test_strides_that_are_too_far_from_each_other_cannot_meet():
    with pytest.raises(
        ValueError, match=r"cannot meet at strides \[4\], since test_convnext has a map of stride 128 in"
    ):
        db.fuse(Member(CONV, input_size=1024, maps=(0,)), Member(CONV, input_size=256), device="meta")


def test_a_model_of_timm_without_features_is_refused():
    without = next(name for name in ("mixer_s32_224", "gmlp_s16_224", "sequencer2d_s") if timm.is_model(name))
    try:
        with torch.device("meta"):
            timm.create_model(without, features_only=True)
    except RuntimeError:
        with pytest.raises(ValueError, match=f"{without} of timm gives no feature maps"):
            extractor(TimmModel(without), device=torch.device("meta"))
    with pytest.raises(KeyError, match="no model of timm is called 'test_vitt'. Did you mean"):
        extractor(TimmModel("test_vitt"))


def test_calls_that_cannot_be_are_said(tinysd, vit):
    both = fused(same_size(tinysd, vit), [tinysd, vit])
    z = both.encode(X)
    for call, error, message in (
        (lambda: both(X, latents=z), TypeError, "either images x or latents="),
        (lambda: both(latents=z[:1]), ValueError, "a list of 2 tensors, one for each member.*got 1 of them"),
        (lambda: both(latents=z[0]), ValueError, "a list of 2 tensors"),
        (lambda: both(latents=[z[0], z[1][:1]]), ValueError, "of one batch for every member"),
        (lambda: both(latents=[z[0], z[1][..., :-1]]), ValueError, "has no latents: encode"),
        (lambda: both.forward_latents(z, (96, 0)), ValueError, "size must be height and width"),
        (lambda: both(X, weights=(1,)), ValueError, "2 positive numbers"),
        (lambda: both(X, against=X), ValueError, "takes no against="),
        (lambda: both(X, members={"tinysd": {}}), KeyError, "has no member 'tinysd'"),
        (
            lambda: both(X, members={"test_vit": {"prompt": "a"}}),
            TypeError,
            "no diffusion backbone and takes no prompt",
        ),
        (lambda: both(X, promt="a"), TypeError, "takes no 'promt'"),
        (lambda: both(X.byte()), TypeError, "floating point"),
        (lambda: both(X[:, :2]), ValueError, "expected"),
        (lambda: both.fit(X), ValueError, "no components to fit"),
        (lambda: db.create_model("tinysd_gdf+test_vit", checkpoint_path="x"), TypeError, "is a mapping of tinysd"),
        (lambda: db.create_model("tinysd_gdf+test_vit", recipe=["a"]), TypeError, "recipe= is for one backbone"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_components_fitted_on_too_little_are_refused(tinysd, vit):
    both = fused([Member(tinysd.declaration, input_size=256, components=40), *same_size(vit)], [tinysd, vit])
    with pytest.raises(ValueError, match="40 principal components need at least 41 positions, got 32; fit on more"):
        both.fit(X[:1, :, :32, :64])
    with pytest.raises(ValueError, match="got 0"):
        both.fit([])
