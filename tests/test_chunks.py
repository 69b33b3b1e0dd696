"""Noise draws and images in chunks, and several timesteps of one image: the same features, one encode, less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from snippets import blocks, printed, promised

import diffusion_backbones as db

IDS = ["up-level1-repeat1-vit-block0-cross-map", "up-level1-repeat2-res-out"]


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def x(photo):
    return torch.cat([photo[..., i : i + 64, 2 * i : 2 * i + 96] for i in (0, 40, 80)])


def close(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def seen(backbone):
    """How many noisy latents each pass of the denoiser was given."""
    batches = []
    handle = backbone.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    yield batches
    handle.remove()


@pytest.mark.parametrize(
    ("ensemble", "chunk", "passes"),
    [
        (4, 12, [12]),
        (4, 100, [12]),
        (4, 6, [6, 6]),
        (4, 7, [6, 6]),
        (4, 3, [3] * 4),
        (4, 2, [2] * 4 + [2, 2]),
        (5, 1, [1] * 15),
        (1, 2, [2, 1]),
        (1, 1, [1] * 3),
    ],
)
def test_chunks_give_the_same_features(backbone, x, seen, ensemble, chunk, passes):
    expected = backbone(x, ensemble=ensemble)
    seen.clear()
    close(backbone(x, ensemble=ensemble, chunk=chunk), expected)
    assert seen == passes


def test_the_mean_is_that_of_single_draws(backbone, x):
    """Against an oracle that knows nothing of ensembles: one call for each draw."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, *backbone.encode(x).shape, generator=generator)
    single = [backbone(x, noise=draw) for draw in noise]
    mean = [sum(maps) / 3 for maps in zip(*single, strict=True)]
    for chunk in (None, 4, 2):
        close(backbone(x, noise="random", ensemble=3, generator=torch.Generator().manual_seed(3), chunk=chunk), mean)


def test_what_goes_with_an_image_stays_with_it(backbone, x):
    call = {"timestep": [51, 300, 700], "prompt": ["a cat", "a dog", ""], "ensemble": 2}
    expected = backbone(x, **call)
    for chunk in (1, 2, 4):
        close(backbone(x, chunk=chunk, **call), expected)


def test_activations_and_attention_maps_in_chunks(backbone, x):
    expected = backbone.forward_activations(x, IDS, ensemble=3)
    for chunk in (2, 3):
        got = backbone.forward_activations(x, IDS, ensemble=3, chunk=chunk)
        assert list(got) == list(expected)
        close(got.values(), expected.values())


def test_a_visitor_comes_once_for_each_chunk(backbone, x):
    def visits(**call):
        out = []
        backbone.visit_activations(x, IDS[1:], lambda site, act: out.append(act.clone()), ensemble=2, **call)
        return out

    [whole] = visits()
    close([torch.cat(visits(chunk=3))], [whole])
    by_image = whole.view(2, 3, *whole.shape[1:]).transpose(0, 1)
    close([torch.cat(visits(chunk=1))], [by_image.flatten(0, 1)])


def test_gradients_in_chunks(x):
    backbone = db.create_model("tinysd_gdf", pretrained=True, trainable=True)
    weight = backbone.denoiser.conv_in.weight

    def gradient(**call):
        backbone.zero_grad()
        backbone(x[:2], ensemble=2, **call)[-1].square().mean().backward()
        return weight.grad.clone()

    expected = gradient()
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(chunk=1), expected, rtol=1e-3, atol=1e-6)


def test_half_precision_is_summed_in_single():
    """64 draws of about 1000 overflow a sum in float16."""
    from diffusion_backbones.ops.micro_batching import RunningMean

    draws = torch.full((64, 2, 3), 1001.0, dtype=torch.float16)
    mean = RunningMean(64)
    for some in draws.split(4):
        mean.add({"a": some.flatten(0, 1)}, 2)
    assert torch.equal(mean.take()["a"], draws[0])


def test_a_default_for_frameworks_that_pass_no_keywords(x, seen, backbone):
    assert db.create_model("tinysd_gdf").chunk is None
    backbone.chunk = 2
    try:
        backbone(x)
        backbone(x, chunk=3)
    finally:
        backbone.chunk = None
    assert seen == [2, 1, 3]
    assert db.create_model("tinysd_gdf", chunk=2).chunk == 2
    for build in (lambda: db.create_model("tinysd_gdf", chunk=0), lambda: backbone(x, chunk=2.5)):
        with pytest.raises(ValueError, match="chunk must be an integer from 1 up, got"):
            build()


@pytest.mark.newer
def test_chunks_compile_to_one_graph(x):
    backbone = db.create_model("tinysd_gdf", pretrained=True, ensemble=2, chunk=2)
    torch._dynamo.reset()
    close(torch.compile(backbone, fullgraph=True, backend="eager")(x), backbone(x, chunk=6))


def test_what_is_kept_does_not_grow_with_the_ensemble(backbone, x):
    """The sum of what a pass leaves behind: with chunks one activation of each kind, whatever the ensemble."""
    from diffusion_backbones.ops import micro_batching

    sizes = []
    add = micro_batching.RunningMean.add

    def watch(self, acts, images):
        add(self, acts, images)
        sizes.append(sum(t.numel() for t in (*acts.values(), *self._sums.values())))

    micro_batching.RunningMean.add = watch
    try:
        for ensemble in (2, 8):
            backbone(x[:1], ensemble=ensemble, chunk=1)
    finally:
        micro_batching.RunningMean.add = add
    assert len(set(sizes)) == 1
    assert len(sizes) == 2 + 8 + 2  # draws, and the one timestep of each call


def test_one_image_at_several_timesteps_is_encoded_once(backbone, x):
    encodes = []
    handle = backbone.encoder.encoder.register_forward_hook(lambda *args: encodes.append(1))
    z = backbone.encode(x[:1])
    maps = backbone.forward_latents(z.repeat(3, 1, 1, 1), (64, 96), timestep=[51, 261, 501], chunk=2)
    handle.remove()
    assert encodes == [1]
    for i, timestep in enumerate((51, 261, 501)):
        close([level[i : i + 1] for level in maps], backbone(x[:1], timestep=timestep))


def test_the_example_of_the_page_runs_and_prints_what_it_says():
    block = blocks((Path(__file__).parent.parent / "docs" / "memory.md").read_text())[0]
    assert printed(block, {}) == promised(block)
    assert len(promised(block)) == 2
