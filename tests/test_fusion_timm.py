"""Members that are timm's: their weights, their sizes, what of them is trained. The oracle is timm itself."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file

import diffusion_backbones as db
from diffusion_backbones.backbone.fusion.timm_extractor import extractor
from diffusion_backbones.factory.random_weights import RandomWeightsWarning
from diffusion_backbones.spec.fusion import Member, TimmModel

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0)) * 2 - 1
NAMES = ("test_vit", "test_convnext", "test_efficientnet", "test_resnet")


def whole(name: str) -> torch.nn.Module:
    torch.manual_seed(3)
    return timm.create_model(name).eval()


def intermediates(net: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return net.forward_intermediates(x, intermediates_only=True)


# Weights.


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_timm_wrote_is_read_as_timm_reads_it(name, tmp_path):
    net = whole(name)
    path = tmp_path / f"{name}.safetensors"
    save_file(net.state_dict(), path)
    got = extractor(TimmModel(name), checkpoint_path=path)
    side = net.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, side, side)
    expected = intermediates(net, x)[-1]
    torch.testing.assert_close(got(x)[-1], expected, rtol=1e-5, atol=1e-5)
    assert got.provenance == {"path": str(path)}


def test_weights_of_a_member_are_given_by_name(tmp_path):
    net, path = whole("test_convnext"), tmp_path / "own.safetensors"
    save_file(net.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RandomWeightsWarning)
        both = db.create_model(
            "test_convnext+test_vit",
            trainable=True,
            checkpoint_path={"test_convnext": path},
            out_strides=(4, 8, 16, 32),
        )
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(both.members[0](x)[-1].detach(), intermediates(net, x)[-1], rtol=1e-5, atol=1e-5)


def test_a_file_that_is_not_the_network_is_refused(tmp_path):
    path = tmp_path / "own.safetensors"
    state = whole("test_vit").state_dict()
    lacking = {key: t for key, t in state.items() if not key.startswith("blocks.3.")}
    other = {**state, "blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"][:3].clone()}
    for tensors, message in ((lacking, r"lacks blocks\.3\..* and \d+ more"), (other, "does not fit the network")):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            extractor(TimmModel("test_vit"), checkpoint_path=path)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"own\.safetensors"):
        extractor(TimmModel("test_vit"), checkpoint_path=path)
    with pytest.raises(FileNotFoundError):
        extractor(TimmModel("test_vit"), checkpoint_path=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"only \.safetensors is read"):
        extractor(TimmModel("test_vit"), checkpoint_path=tmp_path / "own.bin")


def test_a_head_of_other_classes_is_no_part_of_the_maps(tmp_path):
    net = timm.create_model("test_vit", num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "seven.safetensors")
    got = extractor(TimmModel("test_vit"), checkpoint_path=tmp_path / "seven.safetensors")
    x = torch.randn(1, 3, 160, 160)
    torch.testing.assert_close(got(x)[-1], intermediates(net, x)[-1], rtol=1e-5, atol=1e-5)


def test_weights_that_timm_would_unpickle_without_limit_are_refused():
    pickled = [
        name
        for name in timm.list_pretrained()
        if (cfg := timm.get_pretrained_cfg(name)).url and not cfg.hf_hub_id and not cfg.custom_load
    ]
    if not pickled:  # then there is nothing of the kind, and timm's own test model stands in for it
        pytest.fail("timm has no weights at a bare URL any more; drop the check")
    with pytest.raises(ValueError, match="only as a pickle, which can run code; convert http"):
        extractor(TimmModel(pickled[0]), True, device=torch.device("meta"))


def test_random_weights_of_a_member_are_warned_of_where_it_was_asked_for():
    sd = db.create_model("tinysd_gdf", pretrained=True)
    for build in (
        lambda: db.fuse(sd, "test_vit"),
        lambda: db.fuse(sd, Member(TimmModel("test_vit"), input_size=256)),
        lambda: db.create_model("test_convnext+test_vit"),
        lambda: db.create_model("test_vit+tinysd_gdf"),
    ):
        with pytest.warns(RandomWeightsWarning, match="test_vit has random weights") as told:
            build()
        assert {one.filename for one in told if one.category is RandomWeightsWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RandomWeightsWarning)
        db.create_model("test_convnext+test_vit", device="meta")
        db.create_model("test_convnext+test_vit", trainable=True)
        db.fuse(sd, timm.create_model("test_convnext", features_only=True))


# Sizes.


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "test_vit"])
def test_networks_of_one_size_take_any(name):
    built = extractor(TimmModel(name), device=torch.device("meta"))
    for h, w in ((1, 1), (70, 200), (260, 33)):
        maps = built(torch.empty(1, 3, h, w, device="meta"))
        assert [m.shape[-2:] for m in maps] == [(-(-h // m.stride), -(-w // m.stride)) for m in built.out_maps]


def test_a_network_that_was_built_for_one_size_is_refused():
    fixed = timm.create_model("test_vit", features_only=True, out_indices=(-1,))
    with pytest.raises(ValueError, match="takes images of its own size alone.*create it with dynamic_img_size=True"):
        db.fuse("tinysd_gdf", fixed, device="meta")
    any_size = timm.create_model("test_vit", features_only=True, out_indices=(-1,), dynamic_img_size=True)
    [m] = db.fuse(db.create_model("tinysd_gdf"), any_size, strides=(16,))(X)
    assert m.shape[-2:] == (6, 10)


# What is trained.


def test_a_network_of_ones_own_stays_as_it_is():
    net = timm.create_model("test_convnext", features_only=True).eval()
    frozen = db.fuse("test_vit", net, strides=(16,))
    assert all(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    with torch.no_grad():
        net.stem_0.weight.mul_(2)
    assert torch.equal(frozen.members[1].net.stem_0.weight, net.stem_0.weight)  # in the same memory
    net.train().stem_0.requires_grad_(False)
    trained = db.fuse("test_vit", net, strides=(16,))
    assert not trained.members[1].net.stem_0.weight.requires_grad


def unread(fused) -> list[str]:
    """The parameters that are trained and get no gradient."""
    for p in fused.parameters():
        p.grad = None
    sum(m.square().sum() for m in fused(X[:1])).backward()
    return [name for name, p in fused.named_parameters() if p.requires_grad and p.grad is None]


def trained(fused) -> int:
    return sum(p.requires_grad for p in fused.parameters())


@pytest.mark.parametrize("kept", [[0], [1, 2]])
def test_after_pruning_all_that_is_trained_gets_gradients(kept):
    both = db.create_model("test_convnext+test_vit", trainable=True, out_indices=kept)
    assert unread(both) == []
    assert trained(both) > 0


@pytest.mark.parametrize("maps", [(), (0,), (0, 2)])
def test_where_maps_are_not_read_all_that_is_trained_gets_gradients(maps):
    conv, sd = Member(TimmModel("test_convnext"), maps=maps), Member(db.get_declaration("tinysd_gdf"), maps=maps)
    for members in ((conv, "test_resnet"), (sd, "test_resnet")):
        both = db.fuse(*members, trainable=True)
        assert unread(both) == []
        assert trained(both.members[0]) > 0 or not maps
        assert trained(both.members[1]) > 0
