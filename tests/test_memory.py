"""Where memory is short: errors that say what takes less, weights in eight bits, and blocks that are moved."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusion_backbones as db
from diffusion_backbones.backbone import out_of_memory
from diffusion_backbones.families import FAMILIES, architecture
from diffusion_backbones.ops import quantization
from diffusion_backbones.surgery import memory_budget

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def x(photo):
    return photo[..., :128, :192].contiguous()


@pytest.fixture(scope="module")
def rounded():
    return db.create_model("tinysd_gdf", pretrained=True, weight_dtype="int8")


# A device that has no memory left.


def fails(module: nn.Module, error: Exception):
    def hook(module, args):
        raise error

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError("std::bad_alloc"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_an_error_of_the_device_says_what_takes_less(backbone, x, error):
    batch = x.repeat(4, 1, 1, 1)
    expected = backbone(x)
    cases = [
        (
            backbone.encoder.encoder.mid_block,
            {},
            r"its image encoder ran out .* 4 images of 128 x 192 .* in float32.* "
            r"2 images at a time, or with "
            r"dtype='bfloat16', or with images of half the side, 64 x 96",
        ),
        (
            backbone.denoiser.mid_block,
            {"ensemble": 3},
            r"its denoiser ran out .* 3 noise draws of 4 images of 128 x "
            r"192 .* chunk=6, or with dtype=",
        ),
        (
            backbone.denoiser.mid_block,
            {"ensemble": 3, "chunk": 6},
            r"its denoiser ran out .* with 4 images of .* "
            r"chunk=2, or with dtype=",
        ),
    ]
    for module, call, message in cases:
        handle = fails(module, error)
        with pytest.raises(torch.OutOfMemoryError, match=message) as raised:
            backbone(batch, **call)
        handle.remove()
        assert str(error)[:20] in str(raised.value)
        assert raised.value.__cause__ is error
    handle = fails(backbone.denoiser.mid_block, error)
    with pytest.raises(torch.OutOfMemoryError, match="with 1 image of .* Less is needed with dtype"):
        backbone.forward_latents(backbone.encode(x))
    handle.remove()
    for a, b in zip(backbone(x), expected, strict=True):
        assert torch.equal(a, b), "an error changed what comes after it"


def test_the_advice_is_about_what_runs(x):
    half = db.create_model("tinysd_gdf", pretrained=True, dtype="bfloat16", trainable=True).train()
    fails(half.denoiser.mid_block, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(
        torch.OutOfMemoryError, match=r"in bfloat16\. Less is needed with set_grad_checkpointing\(\), or with images"
    ):
        half(x)


def test_other_errors_pass(backbone, x):
    error = RuntimeError("something else")
    handle = fails(backbone.denoiser.mid_block, error)
    with pytest.raises(RuntimeError, match="^something else$") as raised:
        backbone(x)
    handle.remove()
    assert raised.value is error


SHORT = """
import resource, torch, diffusion_backbones as db
torch.set_num_threads(1)
backbone = db.create_model("tinysd_gdf", pretrained=True)
small, large = torch.zeros(1, 3, 64, 64), torch.zeros(8, 3, 768, 768)
expected = backbone(small)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, resource.RLIM_INFINITY))
try:
    backbone(large)
except torch.OutOfMemoryError as error:
    print(error)
assert all(torch.equal(a, b) for a, b in zip(backbone(small), expected))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space of a process, as Linux has")
def test_a_process_that_is_really_out_of_memory():
    process = subprocess.run([sys.executable, "-c", SHORT], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(
        "tinysd_gdf: its image encoder ran out of memory on cpu with 8 images of 768 x 768 (height x width) in "
        "float32. Less is"
    )
    assert "4 images at a time" in process.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_really_out_of_memory():
    """The process may take a quarter of a gigabyte more, and the maps of 64 images take several."""
    backbone, device = db.create_model("tinysd_gdf", pretrained=True, device="cuda"), torch.device("cuda", 0)
    small, large = torch.zeros(1, 3, 64, 64, device=device), torch.zeros(64, 3, 512, 512, device=device)
    expected = backbone(small)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + 2**28) / total, device)
    message = r"its image encoder ran out of memory on cuda.* with 64 images of 512 x 512 .* 32 images at a time"
    try:
        with pytest.raises(torch.OutOfMemoryError, match=message):
            backbone(large)
        assert all(torch.equal(a, b) for a, b in zip(backbone(small), expected, strict=True))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_what_cannot_fit_is_not_tried(monkeypatch, backbone, x):
    """tinysd's widest map has as many values for a pixel as its first level has channels: two of them in float32 for
    192 x 128 pixels.
    """
    image = 2 * 4 * backbone.encoder.config.block_out_channels[0] * 128 * 192
    seen = []
    handle = backbone.encoder.register_forward_pre_hook(lambda module, args: seen.append(1))
    monkeypatch.setattr(out_of_memory, "capacity", lambda device: 3 * image)
    message = (
        r"4 images of 128 x 192 .* need at least .* for two of its widest maps, .*at most 3 images at a time could"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        backbone(x.repeat(4, 1, 1, 1))
    assert not seen
    backbone(x.repeat(3, 1, 1, 1))
    handle.remove()
    monkeypatch.setattr(out_of_memory, "capacity", lambda device: image - 1)
    with pytest.raises(torch.OutOfMemoryError, match="not even one could; give smaller images"):
        backbone(x)


def test_an_ensemble_that_cannot_fit_is_not_tried(monkeypatch, backbone, x):
    """Two arrays of float32 latents of 4 channels at stride 8, noise and noisy latents, and of the draws that run at
    once the largest activation.
    """
    latents = 2 * 4 * 4 * 16 * 24
    act = max(t.nbytes for t in backbone.forward_activations(x, backbone.declaration.recipe.ids).values())
    seen = []
    handle = backbone.denoiser.register_forward_pre_hook(lambda module, args: seen.append(1))
    monkeypatch.setattr(out_of_memory, "free", lambda device: 6 * (latents + act) - 1)
    for noise in ("fixed", "random"):
        with pytest.raises(torch.OutOfMemoryError, match=r"6 noise draws of 1 image of 128 x 192 .* smaller ensemble="):
            backbone(x, ensemble=6, noise=noise)
    assert not seen
    backbone(x, ensemble=6, chunk=5)
    assert len(seen) == 2
    handle.remove()


def test_draws_beyond_those_that_are_kept_are_the_same(backbone, x):
    few = db.create_model("tinysd_gdf", pretrained=True, ensemble=2)
    for a, b in zip(few(x), backbone(x, ensemble=2), strict=True):
        assert torch.equal(a, b)


def test_noise_that_cannot_be_kept_is_not_made():
    """An ensemble of a billion keeps 4 x 256 x 256 float32 values each: a million gigabytes, on no machine."""
    with pytest.raises(MemoryError, match=r"tinysd_gdf with ensemble=1000000000 keeps 1048576\.0 GB of fixed noise"):
        db.create_model("tinysd_gdf", pretrained=True, ensemble=10**9)
    assert db.create_model("tinysd_gdf", device="meta", ensemble=10**6).canvas.shape == (10**6, 4, 256, 256)


def test_the_least_that_is_needed_is_really_needed(backbone, x):
    """The bound against what the encoder computes: the two largest outputs that exist at once are no smaller."""
    outputs = []
    handles = [
        module.register_forward_hook(lambda module, args, out: outputs.append(args[0].nbytes + out.nbytes))
        for module in backbone.encoder.modules()
        if isinstance(module, nn.Conv2d)
    ]
    backbone.encode(x)
    for handle in handles:
        handle.remove()
    assert max(outputs) >= 2 * backbone.widest_map * 128 * 192 * 4


# Eight bits.


def layers(network: nn.Module) -> list[str]:
    """tinysd runs each of its layers as such."""
    return [f"{path}.weight" for path, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def test_eight_bits_are_a_quarter_and_change_little(rounded, backbone, x):
    weights = layers(backbone.denoiser)
    inner = {name: rounded.denoiser.get_parameter(name) for name in weights}
    for name, weight in inner.items():
        whole = backbone.denoiser.get_parameter(name).detach().flatten(1)
        assert weight.qdata.dtype == torch.int8
        step = whole.abs().amax(1, keepdim=True) / 127.5
        assert ((weight.dequantize().flatten(1) - whole).abs() <= 0.51 * step + 1e-7).all(), name
        assert weight.scale.numel() == len(whole)
    held = sum(getattr(w, part).nbytes for w in inner.values() for part in ("qdata", "scale", "zero_point"))
    rest = sum(t.nbytes for name, t in rounded.denoiser.state_dict().items() if name not in weights)
    assert held + rest == memory_budget.weights([(backbone.denoiser, torch.float32)], weights)
    assert held + rest < 0.3 * memory_budget.weights([(backbone.denoiser, torch.float32)])
    for a, b in zip(rounded(x), backbone(x), strict=True):
        assert not torch.equal(a, b)
        assert F.cosine_similarity(a, b, dim=1).mean() > 0.99
        assert a.dtype == torch.float32


def test_eight_bits_compute_what_whole_layers_do_with_their_weights(rounded, x):
    """The oracle: a whole backbone that is given the rounded weights."""
    whole = db.create_model("tinysd_gdf", pretrained=True)
    for name in layers(whole.denoiser):
        whole.denoiser.get_parameter(name).data = rounded.denoiser.get_parameter(name).dequantize()
    for a, b in zip(rounded(x), whole(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_eight_bits_survive_copies_pickles_and_compilation(rounded, x):
    expected = rounded(x)
    for other in (copy.deepcopy(rounded), pickle.loads(pickle.dumps(rounded))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), expected, strict=True))
    short = db.create_model("tinysd", pretrained=True, recipe=["down-level0-repeat0-vit-out"], weight_dtype="int8")
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(short, fullgraph=True, backend="eager")(x), short(x), rtol=1e-4, atol=1e-4)


def test_weights_are_rounded_one_by_one_as_they_are_read(monkeypatch, tmp_path, backbone, rounded, x):
    """What a saved folder gives, and that no more than one tensor is whole at a time."""
    backbone.save_pretrained(tmp_path)
    alive, most = [], []
    original = quantization.int8

    def watch(weight):
        import weakref

        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(weight)]
        most.append(len(alive))
        return original(weight)

    monkeypatch.setattr(quantization, "int8", watch)
    loaded = db.create_model(f"local-dir:{tmp_path}", weight_dtype="int8")
    assert len(most) == len(layers(loaded.denoiser))
    assert max(most) <= 2
    for a, b in zip(loaded(x), rounded(x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["flux_schnell", "sd15", "hunyuan_dit_12"])
def test_other_families_in_eight_bits(name, tiny_folder):
    """In half precision. A pooling layer of Hunyuan-DiT reads the weights of its projections itself, so they stay
    whole.
    """
    recipe = ["mid-vit-out"] if name == "sd15" else ["vit-block8-out"]
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    whole, some = (
        db.create_model(name, recipe=recipe, checkpoint_path=tiny_folder(name), dtype="bfloat16", weight_dtype=dtype)
        for dtype in (None, "int8")
    )
    [a], [b] = whole(x), some(x)
    assert b.dtype == torch.bfloat16
    assert F.cosine_similarity(a.float(), b.float(), dim=1).mean() > 0.97


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_eight_bits(family):
    """At full size, on meta, up to its last block: no network asks of a rounded weight what it cannot do."""
    checkpoint = next(
        checkpoint for checkpoint in map(db.get_checkpoint, db.list_checkpoints()) if checkpoint.family == family
    )
    sites = list(architecture(checkpoint).sites())
    last = [site.id for site in sites if site.layout in ("map", "tokens") and site.id.endswith("-out")][-1]
    backbone = db.create_model(checkpoint.name, recipe=[last], device="meta", weight_dtype="int8")
    d = backbone.size_divisibility
    [level] = backbone(torch.empty(1, 3, 2 * d, 2 * d, device="meta"))
    assert level.shape[1] == backbone.feature_info.channels()[0]
    rounded = [weight for weight in backbone.denoiser.parameters() if hasattr(weight, "qdata")]
    assert sum(weight.numel() for weight in rounded) > 0.9 * sum(
        weight.numel() for weight in backbone.denoiser.parameters()
    )


def test_random_weights_and_meta_in_eight_bits():
    weight = db.create_model("tinysd_gdf", weight_dtype=torch.int8).denoiser.conv_in.weight
    assert weight.qdata.dtype == torch.int8
    assert db.create_model("tinysd_gdf", device="meta", weight_dtype="int8").denoiser.conv_in.weight.is_meta


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"weight_dtype": "int4"}, ValueError, "weight_dtype must be 'int8' or None, which is dtype, got 'int4'"),
        ({"weight_dtype": torch.float16}, ValueError, "weight_dtype must be"),
        (
            {"weight_dtype": "int8", "trainable": True},
            TypeError,
            "weight_dtype='int8' rounds the weights, and trainable=True needs",
        ),
    ],
)
def test_what_eight_bits_cannot(call, error, message):
    with pytest.raises(error, match=message):
        db.create_model("tinysd_gdf", **call)


def test_eight_bits_are_not_saved_and_need_torchao(rounded, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"has rounded weights; a folder holds whole ones\. Save it without, and give weight_dtype='int8' to "
        r"create_model",
    ):
        rounded.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs torchao; install it with pip install 'diffusion-backbones\[int8\]'"):
        db.create_model("tinysd_gdf", weight_dtype="int8")


# Blocks that are moved.


@pytest.mark.parametrize("name", ["flux_schnell", "sd15"])
def test_blocks_come_and_go(name, tiny_folder, tmp_path):
    """docs/memory.md, without a GPU: the weights of a block lie in a file, come for its turn, and are gone when it is
    over.

    What is left of a block in between is overwritten, so that it can only compute with what has come.
    """
    recipe = (
        ["up-level1-repeat1-vit-out", "down-level1-repeat0-res-out"]
        if name == "sd15"
        else ["vit-block8-out", "vit-block20-out"]
    )
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    backbone = db.create_model(name, recipe=recipe, checkpoint_path=tiny_folder(name))
    expected = backbone(x)
    moves = {
        "onload_device": torch.device("cpu"),
        "offload_type": "block_level",
        "num_blocks_per_group": 1,
        "offload_to_disk_path": str(tmp_path),
    }
    backbone.denoiser.enable_group_offload(**moves)
    blocks = (backbone.denoiser.up_blocks if name == "sd15" else backbone.denoiser.transformer_blocks)[:2]
    here = []
    for block in blocks:
        layer = next(module for module in block.modules() if isinstance(module, nn.Linear))
        layer.register_forward_pre_hook(lambda module, args: here.append([whole(other) for other in blocks]))
        block.register_forward_hook(
            lambda module, args, output: [weight.data.fill_(torch.nan) for weight in module.parameters()] and None
        )
    for _ in range(2):
        for weight in (weight for block in blocks for weight in block.parameters()):
            weight.data.fill_(torch.nan)
        here.clear()
        for a, b in zip(backbone(x), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert [True, False] in here
        assert [False, True] in here
        assert [True, True] not in here


def whole(block: nn.Module) -> bool:
    return not any(weight.isnan().any() for weight in block.parameters())
