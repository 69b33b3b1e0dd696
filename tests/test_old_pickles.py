"""A backbone that was pickled before modules moved is the backbone that the same call makes now."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys

import diffusers
import golden
import old_pickles
import pytest
import torch

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("one_thread", "costs_not_measured")
WRITTEN = json.loads(old_pickles.FEATURES.read_text())


@pytest.fixture(scope="module", params=old_pickles.CASES)
def pair(request, tiny_folder):
    """(the backbone of an old pickle, the same made now), with the same weights."""
    version = WRITTEN["diffusers"].rpartition(".")[0]
    if not diffusers.__version__.startswith(version + "."):
        pytest.skip(f"the pickles also hold modules of diffusers {version}, and this is {diffusers.__version__}")
    case = old_pickles.CASES[request.param]
    old, new = old_pickles.load(request.param), old_pickles.build(case, tiny_folder(case.checkpoint))
    for backbone in (old, new):
        old_pickles.fill(backbone, new.canvas)
    return old, new


def equal(maps, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


def test_it_is_the_same_backbone(pair):
    old, new = pair
    assert isinstance(old, db.DiffusionBackbone)
    assert {n: t.shape for n, t in old.state_dict().items()} == {n: t.shape for n, t in new.state_dict().items()}
    assert list(old.state_dict()) == list(new.state_dict())
    for info in ("channels", "reduction", "module_name"):
        assert getattr(old.feature_info, info)() == getattr(new.feature_info, info)()
    trained = [{n for n, p in backbone.named_parameters() if p.requires_grad} for backbone in pair]
    assert trained[0] == trained[1]
    for name in (*golden.VALUES, "training"):
        assert getattr(old, name) == getattr(new, name), name
    assert old.extra_repr() == new.extra_repr()


def test_it_is_loaded_where_nothing_was_imported():
    code = "import lzma, pickle, sys; print(type(pickle.loads(lzma.decompress(sys.stdin.buffer.read()))).__name__)"
    data = (old_pickles.FOLDER / "sd15_gdf.pkl.xz").read_bytes()
    run = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True)
    assert run.stdout.decode().strip() == "DiffusionBackbone", run.stderr.decode()[-2000:]


def test_it_has_the_same_features(pair, request):
    """Those that a backbone made now has, bit by bit, and those that were computed when it was pickled."""
    old, new = pair
    x = old_pickles.image()
    maps = old(x)
    assert equal(maps, new(x))
    assert all(m.isfinite().all() and m.std() > 0 for m in maps)
    written = WRITTEN["features"][request.node.callspec.params["pair"]]
    assert list(golden.differences(written, golden.summary(maps), "features")) == []


def test_its_activations_latents_and_call_keywords_are_the_same(pair):
    old, new = pair
    x, name = old_pickles.image(), old.declaration.recipe.ids[0]
    assert torch.equal(old.encode(x), new.encode(x))
    assert torch.equal(old.forward_activations(x, [name])[name], new.forward_activations(x, [name])[name])
    assert equal(old(x, noise="none", chunk=1), new(x, noise="none", chunk=1))
    assert equal(old(x, indices=1), new(x, indices=1))


def test_it_can_be_saved_again(pair, tmp_path):
    old, new = pair
    x, file = old_pickles.image(), io.BytesIO()
    maps = new(x)
    torch.save(old, file)
    file.seek(0)
    folder = old.save_pretrained(tmp_path)
    for other in (torch.load(file, weights_only=False), db.create_model(f"local-dir:{folder}")):
        assert equal(maps, other(x))
        assert list(other.state_dict()) == list(new.state_dict())


def test_it_can_be_cut_further(pair):
    shorter = copy.deepcopy(pair[0])
    assert shorter.prune_intermediate_layers([0]) == [0]
    assert equal(shorter(old_pickles.image()), pair[1](old_pickles.image(), indices=[0]))


@pytest.mark.parametrize("pair", ["sd15_paths"], indirect=True)
def test_it_can_be_trained(pair):
    x = old_pickles.image()
    for backbone in pair:
        backbone.train()
        sum(m.pow(2).sum() for m in backbone(x)).backward()
        backbone.eval()
    old, new = ({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None} for backbone in pair)
    assert old.keys() == new.keys() != set()
    assert equal(old.values(), new.values())


@pytest.mark.parametrize("pair", ["sd15_gdf"], indirect=True)
def test_it_encodes_prompts(pair, tiny_folder, tmp_path, monkeypatch):
    """With the text encoder of the folder that it was made from, which it names."""
    (tmp_path / "sd15").symlink_to(tiny_folder("sd15"))
    monkeypatch.chdir(tmp_path)
    old, new = pair
    x = old_pickles.image()
    maps = old(x, prompt="a cat")
    assert equal(maps, new(x, prompt="a cat"))
    assert not equal(maps, new(x))
