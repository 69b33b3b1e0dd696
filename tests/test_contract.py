"""What every registered backbone promises, at full size on the ``meta`` device and at tiny width with real weights.

There is no list of exceptions: whatever is registered is tested.
"""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import tiny
import torch

import diffusion_backbones as db
from diffusion_backbones.families import architecture, meta_trace
from diffusion_backbones.ops import recording, safetensors_io
from diffusion_backbones.ops.truncation import AttentionTap, Bypass, StandIn

MODELS = db.list_models()
every = pytest.mark.parametrize("name", MODELS)


@every
def test_full_size_shapes_are_what_feature_info_says_and_only_what_runs_is_kept(name):
    backbone = db.create_model(name, device="meta")
    ran: set[str] = set()
    for path, module in backbone.denoiser.named_modules():
        module.register_forward_hook(lambda m, a, o, path=path: ran.add(path))
    h, w = 3 * backbone.size_divisibility - 5, 2 * backbone.size_divisibility - 3
    maps = backbone(torch.empty(2, 3, h, w, device="meta"))
    info = backbone.feature_info
    assert [tuple(m.shape) for m in maps] == [
        (2, c, -(-h // s), -(-w // s)) for c, s in zip(info.channels(), info.reduction(), strict=True)
    ]
    assert backbone.num_features == info.channels()[-1]
    assert info.reduction() == sorted(info.reduction())

    idle = [p for p, m in backbone.denoiser.named_modules() if p not in ran and list(m.parameters(recurse=False))]
    assert idle == []
    whole = safetensors_io.shapes(meta_trace.build(backbone.architecture))
    kept = safetensors_io.shapes(backbone.denoiser)
    assert kept.items() <= whole.items(), "a kept tensor has another name or shape than in the stock network"
    assert len(kept) < len(whole)


@pytest.mark.parametrize("name", db.list_checkpoints())
def test_every_activation_of_the_full_network_has_the_shape_that_is_listed(name):
    """But for attention maps, which are computed from two that are."""
    checkpoint = db.get_checkpoint(name)
    sites = list(architecture(checkpoint).sites())
    listed = {site.id: site for site in sites if site.layout != "attention"}
    backbone = db.create_model(name, recipe=[list(listed)[-1]], device="meta")
    assert all(recording.available(backbone.denoiser, site) for site in sites)
    h, w = 2 * backbone.size_divisibility - 5, 3 * backbone.size_divisibility - 3
    acts = backbone.forward_activations(torch.empty(2, 3, h, w, device="meta"), list(listed), as_maps=True)
    for activation, act in acts.items():
        assert tuple(act.shape) == (
            2,
            listed[activation].channels,
            -(-h // listed[activation].stride),
            -(-w // listed[activation].stride),
        ), activation


def modulations_of_text(name):
    """A block of which only the image's projections are read still modulates the text, which nothing stands in for."""
    last = "transformer_blocks.25.norm1_context.linear"
    return [f"{last}.weight", f"{last}.bias"] if name == "sd35_large_fuse2match" else []


@every
def test_nothing_that_a_call_cannot_reach_is_kept(name, tiny_folder):
    """Every parameter of the trainable network gets a gradient, as DDP demands."""
    backbone = _tiny(name, tiny_folder, trainable=True)
    torch.manual_seed(0)
    embeds = {k: torch.randn_like(t) if t.is_floating_point() else t for k, t in backbone.conditioning.items()}
    sum(m.float().pow(2).sum() for m in backbone(torch.randn(1, 3, 64, 64), **embeds)).backward()
    unreached = {n: p for n, p in backbone.denoiser.named_parameters() if p.grad is None}
    for n in modulations_of_text(name):
        assert not unreached.pop(n).requires_grad
    assert not unreached
    assert not any(p.requires_grad for p in backbone.encoder.parameters())


def _tiny(name, tiny_folder, **kwargs):
    """A backbone with random weights of the real topology, loaded from the real format."""
    checkpoint = db.get_declaration(name).checkpoint
    if not checkpoint.hub_id:
        return db.create_model(name, pretrained=True, **kwargs)
    recipe = tiny.recipe(name)
    return db.create_model(checkpoint.name, recipe=recipe, checkpoint_path=tiny_folder(checkpoint.name), **kwargs)


@pytest.mark.usefixtures("costs_not_measured")
@every
def test_behaviour(name, tiny_folder, photo, tmp_path):
    backbone = _tiny(name, tiny_folder)
    assert not backbone.training
    assert not any(p.requires_grad for p in backbone.parameters())
    x = torch.cat([photo[..., :75, :110], photo[..., 100:175, 200:310]])
    maps = backbone(x)
    assert all(m.isfinite().all() for m in maps)

    again = backbone(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=True)), "the same call twice gives other features"
    for i in (0, 1):
        for m, alone in zip(maps, backbone(x[i : i + 1]), strict=True):
            torch.testing.assert_close(m[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    swapped = backbone(x.flip(0))
    for m, s in zip(maps, swapped, strict=True):
        torch.testing.assert_close(m, s.flip(0), rtol=1e-4, atol=1e-4)

    z = backbone.encode(x)
    denoised = [i for i, level in enumerate(backbone.levels) if not any(site.encoder for site in level.sites)]
    for i, m in zip(denoised, backbone.forward_latents(z, (75, 110), indices=denoised), strict=True):
        assert torch.equal(m, maps[i])

    backbone.train()
    assert not any(m.training for m in backbone.modules())
    for other in (
        copy.deepcopy(backbone),
        pickle.loads(pickle.dumps(backbone)),
        db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}"),
    ):
        assert all(torch.equal(a, b) for a, b in zip(maps, other(x), strict=True))
        assert list(other.state_dict()) == list(backbone.state_dict())

    half = _tiny(name, tiny_folder, dtype=torch.bfloat16)
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in half(x))


@pytest.mark.parametrize("name", ["tinysd_gdf", "tinysd_dift"])
def test_eight_threads_give_what_one_gives(name, photo):
    backbone = db.create_model(name, pretrained=True)
    inputs = [photo[..., 10 * i : 10 * i + 64, 20 * i : 20 * i + 96] for i in range(8)]
    expected = [backbone(x) for x in inputs]
    results: dict[int, list[list[torch.Tensor]]] = {}
    start = threading.Barrier(8)

    def work(i: int) -> None:
        start.wait()
        results[i] = [backbone(inputs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        for maps in results[i]:
            assert all(torch.equal(a, b) for a, b in zip(maps, expected[i], strict=True))


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (63, 65), (512, 64)])
def test_any_size(size):
    backbone = db.create_model("tinysd_vpd", pretrained=True)
    maps = backbone(torch.rand(1, 3, *size) * 2 - 1)
    assert [tuple(m.shape[-2:]) for m in maps] == [(-(-size[0] // s), -(-size[1] // s)) for s in (8, 16, 32, 64)]


def test_latents_larger_than_the_canvas():
    """The noise is the canvas, repeated: the network receives the same noise in row 256 as in row 0."""
    backbone = db.create_model("tinysd", recipe=["unet-in"], pretrained=True)
    [noisy] = backbone.forward_latents(torch.zeros(1, 4, 264, 8))
    assert noisy.shape == (1, 4, 264, 8)
    assert torch.equal(noisy[..., 256:, :], noisy[..., :8, :])
    assert not torch.equal(noisy[..., 248:256, :], noisy[..., :8, :])
    assert torch.equal(noisy[..., :16, :], backbone.forward_latents(torch.zeros(1, 4, 16, 8))[0])


def test_random_weights_need_no_network_and_no_files():
    first, second = db.create_model("tinysd_gdf"), db.create_model("tinysd_gdf")
    assert first.provenance == {}
    assert not torch.equal(first.denoiser.conv_in.weight, second.denoiser.conv_in.weight)


def test_stand_ins_have_no_parameters():
    linear = torch.nn.Linear(2, 2)
    attention = type(
        "A",
        (),
        {
            "to_q": linear,
            "heads": 1,
            "scale": 1.0,
            "upcast_attention": False,
            "upcast_softmax": False,
            "norm_q": None,
            "norm_k": None,
        },
    )()
    assert [len(list(m.parameters())) for m in (Bypass(), StandIn(3, 1), AttentionTap(attention, {"to_q"}))] == [
        0,
        0,
        2,
    ]


IDS = [site.id for site in tiny.denoiser_catalogue("sd15", tiny.configs("sd15")).all()]


KINDS = (
    "unet",
    "down-level0-repeat1",
    "down-level1-down",
    "down-level3",
    "mid",
    "up-level0-repeat2",
    "up-level1-repeat1",
    "up-level3-repeat2",
)


@pytest.fixture(scope="module")
def whole(tiny_folder):
    return db.create_model("sd15", recipe=["unet-out"], checkpoint_path=tiny_folder("sd15"), noise="none")


@pytest.mark.parametrize("activation", [i for i in IDS if i.startswith(KINDS)])
def test_a_network_cut_at_any_id_gives_that_id(activation, tiny_folder, whole):
    """Cut right behind each kind of activation: the same value as uncut, no idle parameter, and it can still be pruned
    to itself.
    """
    torch.manual_seed(3)
    z = torch.randn(1, 4, 16, 8)
    [expected] = whole.forward_activations(None, [activation], latents=z).values()
    if activation.endswith("-map"):
        reads = (
            [f"{whole.catalogue[activation].path}.to_q", f"{whole.catalogue[activation].path}.to_k"]
            if "self" in activation
            else [activation.replace("-map", "-q")]
        )
    else:
        reads = [activation]
    cut = db.create_model("sd15", recipe=reads, checkpoint_path=tiny_folder("sd15"), noise="none", trainable=True)
    if not activation.endswith("-map"):
        [got] = cut.forward_activations(None, [activation], latents=z).values()
        assert torch.equal(got, expected)
    if activation != "unet-in":  # the input has no gradient
        sum(m.pow(2).sum() for m in cut.forward_latents(z, prompt_embeds=torch.randn(77, tiny.CROSS))).backward()
        assert [n for n, p in cut.denoiser.named_parameters() if p.grad is None] == []
    before = [m.detach() for m in cut.forward_latents(z)]
    cut.prune_intermediate_layers([0])
    assert torch.equal(cut.forward_latents(z)[0], before[0])
