"""What a fusion keeps: its folder, its principal components, its members' places, its name, what it is told."""

from __future__ import annotations

import copy
import json
import threading
import time

import pytest
import timm
import torch
import torch.nn.functional as F

import diffusion_backbones as db
from diffusion_backbones.backbone.fusion import FusedBackbone, TimmExtractor
from diffusion_backbones.backbone.fusion.timm_extractor import extractor
from diffusion_backbones.integrations.transformers import DiffusionBackboneConfig, DiffusionBackboneModel
from diffusion_backbones.ops import pyramid
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.fusion import Fusion, Member, TimmModel

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def both() -> FusedBackbone:
    return db.create_model("test_convnext+test_vit")


# Its folder.


def files(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_cannot_be_saved_leaves_an_earlier_save_whole(both, tmp_path, monkeypatch):
    sd = db.create_model("tinysd_gdf", pretrained=True)
    fused = db.fuse(sd, both.members[1])
    before = files(fused.save_pretrained(tmp_path / "f"))
    with pytest.raises(ValueError, match="max_shard_size must be"):
        fused.save_pretrained(tmp_path / "f", max_shard_size="large")
    monkeypatch.setattr(sd, "weight_dtype", "int8")
    with pytest.raises(ValueError, match="has rounded weights"):
        fused.save_pretrained(tmp_path / "f")
    monkeypatch.undo()
    of_meta = db.fuse(sd, extractor(TimmModel("test_vit"), device=torch.device("meta")))
    with pytest.raises(ValueError, match="test_vit is on the meta device"):
        of_meta.save_pretrained(tmp_path / "f")
    assert files(tmp_path / "f") == before
    other = tmp_path / "g/member0"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="of something else"):
        fused.save_pretrained(tmp_path / "g")
    assert list(files(tmp_path / "g")) == ["member0/config.json"]


@pytest.mark.parametrize("with_timm", [True, False])
def test_after_an_interruption_it_is_said_and_saved_again(both, tmp_path, with_timm):
    sd = db.create_model("tinysd_gdf", pretrained=True)
    fused = db.fuse(sd, both.members[1] if with_timm else db.create_model("tinysd_dift", pretrained=True))
    folder = fused.save_pretrained(tmp_path / "f")
    (folder / "config.json").unlink()  # which is written last
    with pytest.raises(ValueError, match="saving was interrupted"):
        db.create_model(f"local-dir:{folder}")
    again = db.create_model(f"local-dir:{fused.save_pretrained(folder)}")
    assert all(torch.equal(a, b) for a, b in zip(again(X), fused(X), strict=True))


# Its members' places.


def test_calls_of_two_threads_do_not_move_a_member_from_under_each_other(both, monkeypatch):
    fused = db.fuse(*copy.deepcopy(both).members)
    expected, place, seen = fused(X), {"at": "cpu"}, []
    inside, device, forward = threading.Event(), torch.device, TimmExtractor.forward

    def computing(self, *args, **kwargs):
        seen.append(place["at"])
        inside.set()
        time.sleep(0.5 * min(len(seen), 3))  # the second to come would be the last to leave
        seen.append(place["at"])
        return forward(self, *args, **kwargs)

    def to(self, where):
        place["at"] = str(where)

    monkeypatch.setattr(TimmExtractor, "device", property(lambda self: device(place["at"])))
    monkeypatch.setattr(TimmExtractor, "to", to)
    monkeypatch.setattr(TimmExtractor, "forward", computing)
    monkeypatch.setattr(FusedBackbone, "device", device("cpu"))
    fused.visits = device("meta")  # where nothing is, so every member is brought there, and back
    got: list[list[torch.Tensor]] = []
    first, second = (threading.Thread(target=lambda: got.append(fused(X))) for _ in range(2))
    first.start()
    inside.wait(60)
    second.start()
    first.join(60)
    second.join(60)
    assert set(seen) == {"meta"}
    assert len(got) == 2
    assert all(torch.equal(a, b) for maps in got for a, b in zip(maps, expected, strict=True))
    assert place == {"at": "cpu"}


# Its name.


def test_a_fusion_that_could_not_be_listed_is_not_registered(monkeypatch):
    monkeypatch.setattr(registry, "_fusions", dict(registry._fusions))
    sized = [Member(TimmModel(name), input_size=160) for name in ("test_vit", "test_convnext")]
    with pytest.raises(ValueError, match=r"give Member\(TimmModel\('test_vit'\), input_size="):
        db.register_fusion(Fusion("unsized", (Member(TimmModel("test_vit")), sized[1])))
    with pytest.raises(ValueError, match="'test_resnet' is a model of timm; give another name="):
        db.register_fusion(Fusion("test_resnet", tuple(sized)))
    assert not {"unsized", "test_resnet"} & {*db.list_fusions()}
    assert not timm.is_model("unsized")
    monkeypatch.setattr(registry, "_listeners", [])  # timm forgets no name
    db.register_fusion(Fusion("sized", tuple(sized)))
    assert "sized" in db.list_fusions()


def test_a_fusion_is_named_where_backbones_are_asked_for():
    assert isinstance(db.create_model("xlt_gdf_seg", device="meta"), db.FusedBackbone)
    assert db.is_model("sd_dino")
    with pytest.raises(KeyError, match=r"`list_models\(\)` lists them all, and `list_fusions\(\)` fusions"):
        db.get_declaration("sd_dinoo")


# What it is told.


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"bogus": 1}, "bogus=1 does nothing"),
        ({"fold": True}, "fold=True does nothing"),
        ({"timestep": 5}, "timestep=5 does nothing"),
        ({"trainable": "lora"}, "trainable='lora' does nothing.*trainable=True or False"),
        ({"weight_dtype": "int8"}, "weight_dtype='int8' does nothing"),
    ],
)
def test_a_keyword_that_no_member_takes_is_refused(both, keywords, message):
    with pytest.raises(TypeError, match=message):
        db.create_model("test_vit+test_convnext", device="meta", **keywords)
    with pytest.raises(TypeError, match=message):
        db.fuse("test_vit", db.create_model("tinysd_gdf", device="meta"), device="meta", **keywords)
    with pytest.raises(TypeError, match="all of them are given built"):
        db.fuse(*both.members, **keywords)


def test_keywords_that_say_nothing_are_taken(both):
    same = db.create_model(
        "test_vit+test_convnext", device="meta", fold=False, truncate=True, prompt=None, num_classes=0
    )
    assert (
        same.feature_info.channels() == db.create_model("test_vit+test_convnext", device="meta").feature_info.channels()
    )
    with pytest.raises(ValueError, match="num_classes must be 0, got 5"):
        db.create_model("test_vit+test_convnext", num_classes=5)
    for keyword in ({"pretrained": True}, {"device": "cpu"}, {"cache_dir": "x"}):
        with pytest.raises(TypeError, match=f"{next(iter(keyword))}=.* does nothing"):
            db.fuse(*both.members, **keyword)


def test_the_name_of_two_members_is_not_that_of_the_first():
    sd = db.create_model("tinysd_gdf", pretrained=True)
    fused = db.fuse(sd, sd, normalize="none")
    with pytest.raises(KeyError, match=r"has 'tinysd_gdf' at positions \[0, 1\]; give one of these"):
        fused(X, members={"tinysd_gdf": {"timestep": 300}})
    c = sd.out_maps[0].channels
    assert torch.equal(fused(X, members={1: {"timestep": 300}})[0][:, c:], sd(X, timestep=300)[0])


# Its principal components.


@pytest.fixture
def reduced(both):
    return db.fuse(*copy.deepcopy(both).members, components=5, strides=(16,)).fit(X)


def test_components_stay_as_they_were_fitted_in_any_dtype(both, reduced):
    before = copy.deepcopy(reduced.reducers.state_dict())
    plain = db.fuse(*both.members, strides=(16,))(X)[0]
    reducer = reduced.reducers["stride16"]
    expected = torch.einsum(
        "nc,bchw->bnhw", reducer.axes.double(), plain.double() - reducer.mean.double()[:, None, None]
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        moved = copy.deepcopy(reduced).to(dtype)
        after = moved.reducers.state_dict()
        assert all(
            torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before
        )
    exact = moved.reducers["stride16"](plain.double())
    torch.testing.assert_close(exact, expected, rtol=1e-12, atol=1e-12)


def test_whether_they_are_fitted_is_asked_of_the_device_once(reduced, monkeypatch):
    reduced(X)
    asked = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: asked.append(t) or t.item() != 0)
    reduced(X)
    assert [t for t in asked if t is reduced.reducers["stride16"].fitted] == []
    monkeypatch.undo()
    empty = {key: torch.zeros_like(t) for key, t in reduced.state_dict().items() if key.startswith("reducers")}
    reduced.load_state_dict(empty, strict=False)
    with pytest.raises(ValueError, match="not fitted yet"):
        reduced(X)


# Sizes.


@pytest.mark.parametrize(("h", "w"), [(4, 4), (4, 2), (2, 4), (8, 3), (3, 8), (6, 6)])
def test_maps_are_averaged_to_coarser_and_interpolated_to_finer(h, w):
    """Height and width each by itself, as matrices."""
    m = torch.rand(2, 3, 4, 4, dtype=torch.float64)

    def matrix(n: int) -> torch.Tensor:
        eye = torch.eye(4, dtype=torch.float64)[None]
        if n > 4:
            return F.interpolate(eye, n, mode="linear", align_corners=False)[0].T
        return F.adaptive_avg_pool1d(eye, n)[0].T

    expected = torch.einsum("ia,jb,ncab->ncij", matrix(h), matrix(w), m)
    torch.testing.assert_close(pyramid.at_size(m, (h, w)), expected)


def test_images_keep_their_digits_and_integers_are_taken(both):
    fused = db.fuse(
        Member(TimmModel("test_vit"), input_size=160),
        Member(TimmModel("test_convnext"), input_size=80),
        strides=(16,),
        dtype="float64",
        input_format="uint8",
    )
    pixels = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    torch.testing.assert_close(fused(pixels)[0], fused(pixels.double())[0], rtol=1e-4, atol=1e-5)
    x = pixels.double()
    small = F.interpolate(x, (32, 48), mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    mean, std = (torch.tensor(fused.members[1].pretrained_cfg[key]).double()[:, None, None] for key in ("mean", "std"))
    c = fused.members[0].out_maps[0].channels
    deep = [
        F.adaptive_avg_pool2d(m, (4, 6)) if m.shape[-1] > 6 else F.interpolate(m, (4, 6), mode="bilinear")
        for m in fused.members[1]((small / 255 - mean) / std)
    ]
    torch.testing.assert_close(fused(x)[0][:, c:], F.normalize(torch.cat(deep, 1), dim=1), rtol=1e-9, atol=1e-9)


# transformers.


def test_transformers_builds_what_was_trained():
    sd = db.create_model("tinysd_gdf", pretrained=True)
    conv = extractor(TimmModel("test_convnext"), trainable=True)
    for members in (
        (sd, conv),
        (db.create_model("tinysd_gdf", pretrained=True, trainable=True), extractor(TimmModel("test_vit"))),
    ):
        fused = db.fuse(*members)
        config = DiffusionBackboneConfig.from_backbone(fused)
        data = json.loads(json.dumps(config.to_dict()))
        again = DiffusionBackboneModel(DiffusionBackboneConfig.from_dict(data)).diffusion_backbone
        of = [[name for name, p in net.named_parameters() if p.requires_grad] for net in (fused, again)]
        assert of[0] == of[1]
        assert of[0]
