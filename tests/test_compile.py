"""Compiled backbones: the same features, one graph for each network, and no new graph for another batch or size."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import tiny
import torch
from torch._dynamo.utils import counters

import diffusion_backbones as db
from diffusion_backbones.surgery import compilation

pytestmark = pytest.mark.usefixtures("costs_not_measured")


def images(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape[0], 3, *shape[1:], generator=generator) * 2 - 1


def same(maps, expected, tolerance=1e-5):
    for m, e in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=tolerance, atol=tolerance * float(e.detach().abs().max()))


def traced(backbone, backend="eager"):
    """The backbone, compiled without code being generated, and the counters at zero."""
    torch._dynamo.reset()
    counters.clear()
    compilation.compile_in_place(backbone, True, backend=backend)
    return backbone


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


def small(**settings):
    """So small that generating code for it takes seconds."""
    torch.manual_seed(0)
    return db.create_model("ddpm_cifar10_32", recipe=["down-level0-repeat0-res-out"], **settings)


def test_generated_code_gives_the_same_features_and_serves_other_batches_and_sizes():
    torch._dynamo.reset()
    counters.clear()
    expected, compiled = small(), small(compile=True)
    with torch.no_grad():
        same(compiled(images(2, 32, 64)), expected(images(2, 32, 64)), 1e-4)
        with torch.compiler.set_stance("fail_on_recompile"):
            for x in (images(3, 64, 32), images(5, 32, 32), images(2, 30, 50)):
                same(compiled(x), expected(x), 1e-4)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_frozen_weights_are_packed_and_stay_as_they_are():
    torch._dynamo.reset()
    counters.clear()
    expected, frozen, x = small(), small(compile="freeze"), images(2, 32, 32)
    same(frozen(x), expected(x), 1e-4)
    assert counters["inductor"]["mkldnn_conv_weight_pack_matcher_count"] >= 3
    with torch.compiler.set_stance("fail_on_recompile"):
        same(frozen(x), expected(x), 1e-4)
        same(frozen(x.contiguous(memory_format=torch.channels_last)), expected(x), 1e-4)
    with pytest.raises(
        ValueError, match="the weights of this UNet2DModel are constants of compiled code.*create it without compile="
    ):
        frozen.denoiser.load_state_dict(expected.denoiser.state_dict())
    with pytest.raises(
        ValueError, match="compile='freeze' makes constants of the weights, and trainable='lora' changes them"
    ):
        small(compile="freeze", trainable="lora")


def test_keywords_of_a_call_need_no_other_graph(backbone):
    compiled, x = traced(db.create_model("tinysd_gdf", pretrained=True)), images(2, 64, 128)
    with torch.no_grad():
        same(compiled(x), backbone(x))
        assert counters["stats"]["unique_graphs"] == 2  # the image encoder, the denoiser
        own = torch.randn(2, 77, 96, generator=torch.Generator().manual_seed(0))
        with torch.compiler.set_stance("fail_on_recompile"):
            for call in (
                {"timestep": 300, "noise": "none"},
                {"ensemble": 2},
                {"prompt_embeds": own},
                {"timestep": [1, 900]},
            ):
                same(compiled(x, **call), backbone(x, **call))
            same(compiled(latents=backbone.encode(x)), backbone(x))


def test_a_batch_of_one_is_the_only_other_graph():
    expected, compiled = small(), traced(small())
    with torch.no_grad():
        for shape in ((1, 32, 32), (1, 32, 64), (2, 32, 32), (3, 64, 32), (1, 50, 30), (4, 32, 32)):
            same(compiled(images(*shape)), expected(images(*shape)))
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["sd3_medium", "flux_schnell", "sana_1600m_1024"])
def test_transformers_are_one_graph(name, tiny_folder):
    ids = [
        site.id
        for site in tiny.denoiser_catalogue(name, tiny.configs(name)).all()
        if site.layout in ("map", "tokens") and site.port.part is None
    ]
    settings = {"recipe": [ids[len(ids) // 6]], "checkpoint_path": tiny_folder(name)}
    expected, compiled = db.create_model(name, **settings), traced(db.create_model(name, **settings))
    side = max(128, expected.size_divisibility) // expected.latent_stride
    with torch.no_grad():
        for shape in ((2, side, 3 * side), (3, 3 * side, side), (4, 3 * side, 5 * side)):
            z = torch.randn(shape[0], expected.latent_channels, *shape[1:], generator=torch.Generator().manual_seed(0))
            same(compiled(latents=z), expected(latents=z))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_network_that_is_no_single_graph_says_so():
    with pytest.raises(ValueError, match=r"lumina_image_2_custom cannot be compiled: .* reads the lengths of texts"):
        db.create_model("lumina_image_2", recipe=["vit-block2-out"], device="meta", compile=True)


def test_any_activation_may_be_asked_for_later():
    ids = ["unet-after-conv-in", "down-level0-repeat0-res-increment"]
    original, compiled, x, seen = small(), traced(small()), images(2, 32, 32), {}
    with torch.no_grad():
        expected = original(x)
        same(compiled(x), expected)
        acts, expected_acts = compiled.forward_activations(x, ids), original.forward_activations(x, ids)
        compiled.visit_activations(x, ids, lambda site, act: seen.setdefault(site.id, act))
        same([acts[activation] for activation in ids], [expected_acts[activation] for activation in ids])
        same(seen.values(), [expected_acts[activation] for activation in seen])
        same(compiled(x), expected)
    assert sorted(seen) == sorted(ids)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_backbone_is_saved_and_copied_like_any_other(tmp_path):
    original, compiled, x = small(), traced(small()), images(2, 32, 32)
    assert list(compiled.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        expected = original(x)
        same(compiled(x), expected)
        for other in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
            assert other.compiled is True
            assert other.denoiser._compiled_call_impl is not None
            same(traced(other)(x), expected)
        same(db.create_model(f"local-dir:{compiled.save_pretrained(tmp_path / 'saved')}")(x), expected)


def test_gradients_are_the_same():
    expected, compiled = small(trainable=True), traced(small(trainable=True), backend="aot_eager")
    for one in (expected, compiled):
        one.train()
        sum(m.pow(2).mean() for m in one(images(2, 32, 32))).backward()
    for (name, p), q in zip(expected.named_parameters(), compiled.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()), msg=name)
    assert counters["stats"]["unique_graphs"] == 1


def test_what_is_pruned_is_compiled_anew():
    recipe = ["down-level0-repeat0-res-out", "down-level1-repeat0-res-out"]
    torch.manual_seed(0)
    compiled, x = traced(db.create_model("ddpm_cifar10_32", recipe=recipe)), images(2, 32, 32)
    with torch.no_grad():
        [fine, _] = compiled(x)
        before = compiled.denoiser._compiled_call_impl
        compiled.prune_intermediate_layers([0])
        assert compiled.denoiser._compiled_call_impl is not before
        same(traced(compiled)(x), [fine])


def test_timm_passes_it_on_and_meta_compiles_nothing():
    through_timm = timm.create_model("tinysd_gdf", features_only=True, compile="reduce-overhead")
    assert through_timm.compiled == "reduce-overhead"
    assert through_timm.denoiser._compiled_call_impl is not None
    shapes = db.create_model("sd15_gdf", device="meta", compile=True)(torch.empty(1, 3, 64, 64, device="meta"))
    assert [tuple(m.shape) for m in shapes] == [(1, 320, 8, 8), (1, 640, 4, 4), (1, 2560, 2, 2)]


def test_maps_of_a_cuda_graph_are_copies(backbone):
    """Its next run would write over them."""
    compiled = traced(db.create_model("tinysd_gdf", pretrained=True))
    compiled.compiled = "reduce-overhead"
    z = backbone.encode(images(2, 64, 64))
    kept = []
    compiled.denoiser.up_blocks[1].resnets[2].register_forward_hook(
        lambda module, args, output: kept.append(output.data_ptr())
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        maps = compiled(latents=z)
    assert kept
    assert not {m.data_ptr() for m in maps} & set(kept)


def test_what_a_cuda_graph_gave_of_an_image_is_copied():
    """Latents, and activations in the image encoder, whose next run would write over them."""
    compiled = db.create_model("tinysd_odise", pretrained=True)
    compiled.compiled = "max"
    kept = []
    hook = lambda module, args, output: kept.append(output.data_ptr())  # noqa: E731
    for site in (site for level in compiled.levels for site in level.sites if site.encoder):
        compiled.encoder.get_submodule(site.path).register_forward_hook(hook)
    compiled.encoder.quant_conv.register_forward_hook(hook)
    x = images(1, 64, 64)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        maps, z = compiled(x), compiled.encode(x)
    assert len(kept) >= 3
    assert not {m.data_ptr() for m in (*maps, z)} & set(kept)


def ours(caplog):
    """What this package logged; the compiler's own traces are there too if another test has opened them."""
    return [record.message for record in caplog.records if record.name.startswith("diffusion_backbones")]


def test_a_network_says_what_it_is_compiled_anew_for(caplog):
    compiled = traced(small())
    with torch.no_grad():
        compiled(images(2, 32, 32))
        compiled(images(3, 64, 32))
        assert not ours(caplog)
        compiled(images(1, 32, 32))  # a graph of its own
    [told] = ours(caplog)
    assert "its UNet2DModel was compiled anew for an input of (1, 3, 32, 32), beside (2, 3, 32, 32);" in told


def test_the_most_is_frozen_weights_on_a_cpu_and_static_cuda_graphs_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (compilation.resolve("max", cpu), compilation.resolve("max", gpu)) == ("freeze", "max")
    assert compilation.resolve("default", cpu) == "default"
    assert compilation.settings("max", gpu)["triton.cudagraphs"]
    assert "layout_optimization" not in compilation.settings("max", gpu)  # inductor's own default: channels innermost
    assert small(compile="max").compiled == "freeze"
    with pytest.raises(ValueError, match="compile='max' on a CPU makes constants of the weights, and trainable=True"):
        small(compile="max", trainable=True)


def test_sizes_are_constants_of_the_most(caplog):
    torch._dynamo.reset()
    expected, compiled = small(), small()
    compiled.denoiser.compile(fullgraph=True, backend="eager", dynamic=False)
    compiled.compiled = "max"
    with torch.no_grad():
        for shape in ((2, 32, 32), (3, 32, 32), (2, 32, 32)):
            same(compiled(images(*shape)), expected(images(*shape)))
    [told] = ours(caplog)
    assert "anew for an input of (3, 3, 32, 32), beside (2, 3, 32, 32)" in told


@pytest.mark.parametrize("mode", ["fast", 1.5, "reduce_overhead"])
def test_unknown_modes(mode):
    with pytest.raises(
        ValueError, match="compile must be True, False or one of 'freeze', 'default', 'reduce-overhead'.*got"
    ):
        db.create_model("tinysd_gdf", compile=mode)


def test_no_compiler():
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(FileNotFoundError, match="needs a C\\+\\+ compiler.*or leave compile out"):
        db.create_model("sd15_gdf", pretrained=True, compile=True)  # before anything is fetched


def test_gradient_checkpointing_of_a_compiled_backbone():
    backbone = db.create_model("tinysd_gdf", trainable=True, compile=True)
    with pytest.raises(ValueError, match="tinysd_gdf is compiled.*create it without compile="):
        backbone.set_grad_checkpointing()
    backbone.set_grad_checkpointing(False)
