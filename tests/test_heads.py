"""One head of a query, key or value: its slice of the channels, in every family."""

from __future__ import annotations

import pickle

import pytest
import tiny
import torch

import diffusion_backbones as db
from diffusion_backbones.families import architecture
from diffusion_backbones.spec.activations import Port
from diffusion_backbones.spec.registry import get_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
EVERY = slice(None)
CASES = [
    ("sd15", "up-level1-repeat1-vit-block0-self-k", "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_k"),
    ("sd15", "mid-vit-block0-cross-q", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"),
    ("pixart_sigma_512", "vit-block3-self-v", "transformer_blocks.3.attn1.to_v"),
    ("sd3_medium", "vit-block2-q", "transformer_blocks.2.attn.to_q"),
    ("flux_dev", "vit-block1-k", "transformer_blocks.1.attn.to_k"),
    ("flux_dev", "vit-block20-v", "single_transformer_blocks.1.attn.to_v"),
    ("lumina_image_2", "vit-block3-q", "layers.1.attn.to_q"),
    ("lumina_image_2", "vit-block3-k", "layers.1.attn.to_k"),  # half as many heads
]


def split(backbone, path: str, raw: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a stock projection gave for the image, (B, tokens, heads, width), by the width of the network's heads."""
    layer = backbone.denoiser.get_submodule(path.rpartition(".")[0])
    width = layer.to_q.out_features // layer.heads
    return raw[:, -tokens:].unflatten(-1, (-1, width))


@pytest.mark.parametrize(("checkpoint", "name", "path"), CASES)
def test_a_head_is_its_slice_of_the_projection(checkpoint, name, path, tiny_folder):
    heads = (1, 0)
    ids = [f"{name}[head={i}]" for i in heads]
    whole = {"checkpoint_path": tiny_folder(checkpoint), "truncate": False}
    backbone, kept = db.create_model(checkpoint, recipe=ids, **whole), []
    backbone.denoiser.get_submodule(path).register_forward_hook(lambda _, __, out: kept.append(out))
    acts = backbone.forward_activations(X, [name, *ids])
    expected = split(backbone, path, kept[0], acts[name].shape[1])
    for i in heads:
        assert torch.equal(acts[ids[1 - i]], expected[:, :, i])
    assert torch.equal(acts[name], expected.flatten(2))
    [level] = backbone(X)
    whole = backbone.forward_activations(X, [name], as_maps=True)[name]
    width = expected.shape[-1]
    assert torch.equal(level, torch.cat([whole[:, width : 2 * width], whole[:, :width]], 1))
    assert backbone.feature_info.channels() == [2 * width]


def test_a_head_of_a_layer_that_gives_all_projections_at_once(tiny_folder):
    """FLUX.2's single blocks: query, key, value and the feed-forward layer behind one another."""
    ids = [f"vit-block9-{qkv}[head=1]" for qkv in "qkv"]
    whole = {"checkpoint_path": tiny_folder("flux2_dev"), "truncate": False}
    backbone, kept = db.create_model("flux2_dev", recipe=ids, **whole), []
    layer = backbone.denoiser.single_transformer_blocks[1].attn
    layer.to_qkv_mlp_proj.register_forward_hook(lambda _, __, out: kept.append(out))
    acts = backbone.forward_activations(X, ids)
    inner = layer.heads * layer.head_dim
    for at, name in enumerate(ids):
        each = kept[0][:, -24:, at * inner : (at + 1) * inner]
        assert torch.equal(acts[name], each[..., layer.head_dim : 2 * layer.head_dim])


def test_it_is_saved_pickled_chunked_and_trained(tiny_folder, tmp_path, costs_not_measured):
    recipe = db.Recipe("heads", [["vit-block2-q[head=1]", "vit-block3-v[head=0]"]], noise="fixed", ensemble=2)
    folder = tiny_folder("sd3_medium")
    backbone = db.create_model("sd3_medium", recipe=recipe, checkpoint_path=folder)
    [level] = backbone(X)
    for other in (
        pickle.loads(pickle.dumps(backbone)),
        db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'saved')}"),
        lambda x: backbone(x, chunk=1),
        db.create_model("sd3_medium", recipe=recipe, checkpoint_path=folder, truncate=False),
    ):
        torch.testing.assert_close(other(X)[0], level, rtol=1e-4, atol=1e-5)
    trained = db.create_model("sd3_medium", recipe=recipe, checkpoint_path=folder, trainable=True)
    trained(X)[0].square().mean().backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize("checkpoint", db.list_checkpoints())
def test_heads_share_all_channels_in_every_checkpoint(checkpoint):
    for configs in (None, tiny.configs(checkpoint)):
        network = architecture(get_checkpoint(checkpoint), configs)
        for site in [site for site in network.sites() if site.id.rpartition("-")[2] in "qkv"]:
            first = network.catalogue[f"{site.id}[head=0]"]
            last = network.catalogue[f"{site.id}[head={site.channels // first.channels - 1}]"]
            assert (first.channels, first.stride, first.path) == (last.channels, site.stride, site.path)
            assert site.channels % first.channels == 0
            with pytest.raises(KeyError, match=f"has {site.channels // first.channels} heads"):
                network.catalogue[f"{site.id}[head={site.channels // first.channels}]"]


@pytest.mark.parametrize("port", [Port(), Port(part=2), Port("in", tokens="last", part=0), Port(tokens="first")])
def test_ports_are_read_as_they_are_written(port):
    assert Port.parse(str(port)) == port


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("vit-block2-q[head=2]", "vit-block2-q has 2 heads, 0 to 1, and no head 2"),
        ("vit-block99-q[head=0]", "no activation 'vit-block99-q'"),
        ("vit-block2-out[head=0]", "only queries, keys and values have heads.*'vit-block2-out' is none of them"),
        ("vit-block2-self-map[head=0]", "only queries, keys and values have heads"),
        ("transformer_blocks.2.attn.to_q[head=0]", "only queries, keys and values have heads"),
        ("vit-block2-q[head=0][head=0]", "only queries, keys and values have heads"),
        ("vit-block2-q[head=-1]", "is not an activation id"),
        ("vit-block2-q[head=01]", "is not an activation id"),
        ("vit-block2-q[head=]", "is not an activation id"),
        ("vit-block2-q[heads=0]", "is not an activation id"),
    ],
)
def test_bad_heads(name, error):
    with pytest.raises((KeyError, ValueError), match=error):
        architecture(get_checkpoint("sd3_medium"), tiny.configs("sd3_medium")).catalogue[name]


def test_a_recipe_with_a_head_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="only queries, keys and values have heads"):
        db.Recipe("x", ["vit-block2-out[head=0]"])
    with pytest.raises(KeyError, match="vit-block2-q has 24 heads, 0 to 23, and no head 24"):
        db.create_model("sd3_medium", recipe=["vit-block2-q[head=24]"], device="meta")
