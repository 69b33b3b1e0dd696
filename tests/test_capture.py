"""Capture survives what users do to a network: compile, export, checkpointing, threads, DDP and FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

import diffusion_backbones as db
from diffusion_backbones.ops.attention_maps import attention_map


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def x(photo):
    return photo[..., :128, :192].contiguous()


def same(maps, expected, tolerance=0.0):
    for m, e in zip(maps, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=tolerance, atol=tolerance)


def test_compile_gives_one_graph(backbone, x):
    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    same(compiled(x), backbone(x), 1e-5)


def test_a_compiled_denoiser_inside_still_records(x):
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    expected = backbone(x)
    torch._dynamo.reset()
    backbone.denoiser.compile(fullgraph=True, backend="eager")
    same(backbone(x), expected, 1e-5)


def test_an_activation_first_asked_for_after_compiling(x):
    """PyTorch may or may not see the new hook: then the value is right, or the error says what happened."""
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    [expected] = db.create_model("tinysd_gdf", pretrained=True).forward_activations(x, ["mid-vit-out"]).values()
    torch._dynamo.reset()
    backbone.denoiser.compile(backend="eager")
    backbone(x)
    [got] = backbone.forward_activations(x, ["mid-vit-out"]).values()
    torch.testing.assert_close(got, expected)


def test_nothing_recorded_is_an_error_not_silence(x):
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    backbone.denoiser.mid_block._forward_hooks.clear()
    backbone.denoiser.up_blocks[1].resnets[2]._forward_hooks.clear()
    with pytest.raises(RuntimeError, match="up-level1-repeat2-res-out was not recorded.*compiled before"):
        backbone(x)


@pytest.mark.parametrize("strict", [False, True])
def test_export(backbone, x, strict):
    program = torch.export.export(backbone, (x,), strict=strict)
    same(program.module()(x), backbone(x), 1e-5)


def test_export_with_any_height_and_width(backbone, x, photo):
    h, w = (torch.export.Dim(name, min=2, max=16) for name in "hw")
    program = torch.export.export(backbone, (x,), dynamic_shapes={"x": {2: 64 * h, 3: 64 * w}}, strict=False)
    other = photo[..., :256, :128].contiguous()
    same(program.module()(other), backbone(other), 1e-5)


def test_gradient_checkpointing_gives_the_same_features_and_gradients(x):
    backbone = db.create_model("tinysd_legacy", pretrained=True, trainable=True)
    grads = []
    for enable in (False, True):
        backbone.train()
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        sum(m.pow(2).mean() for m in backbone(x)).backward()
        grads.append({n: p.grad.clone() for n, p in backbone.denoiser.named_parameters()})
        assert backbone.recorder._store.acts is None
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_call_that_fails_leaves_nothing_behind(backbone, x):
    expected = backbone(x)
    with pytest.raises(RuntimeError):
        backbone(x, prompt_embeds=torch.randn(77, 96).to("meta"))
    assert backbone.recorder._store.acts is None
    same(backbone(x), expected)


def test_a_direct_call_of_the_denoiser_records_nothing(backbone):
    backbone.denoiser(torch.randn(1, 4, 8, 8), 1, encoder_hidden_states=torch.randn(1, 77, 96))
    assert backbone.recorder._store.acts is None


def test_threads_that_ask_for_different_activations(backbone, x):
    ids = [
        "mid-vit-out",
        "down-level0-repeat0-res-out",
        "up-level1-repeat0-vit-block0-self-map",
        "up-level2-repeat0-vit-out",
    ] * 2
    fresh = db.create_model("tinysd_gdf", pretrained=True)
    expected = {activation: fresh.forward_activations(x, [activation])[activation] for activation in set(ids)}
    results: list[bool] = []

    def work(activation: str) -> None:
        acts = backbone.forward_activations(x, [activation])
        results.append(list(acts) == [activation] and torch.equal(acts[activation], expected[activation]))

    threads = [threading.Thread(target=work, args=(activation,)) for activation in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * len(ids)


def test_attention_maps_are_formed_in_bounded_memory(backbone, x):
    """The chunks may be small; the result is the same, its rows sum to one, and the average is the mean over heads."""
    attention = backbone.denoiser.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn1")
    q, k = torch.randn(2, 2, 50, 64)
    whole = attention_map(attention, q, k)
    assert whole.shape == (2, attention.heads, 50, 50)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, attention.heads, 50))
    torch.testing.assert_close(attention_map(attention, q, k, chunk=7), whole)
    torch.testing.assert_close(attention_map(attention, q, k, average=True, chunk=130), whole.mean(1))
    [mean] = backbone.forward_activations(x, ["mid-vit-block0-self-map"], average_heads=True).values()
    assert mean.shape == (1, 6, 6)


DISTRIBUTED = """
import torch, torch.distributed as dist
import diffusion_backbones as db
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
def ddp(backbone):
    return torch.nn.parallel.DistributedDataParallel(backbone)
def fsdp(backbone):
    unet = backbone.denoiser
    for block in [*unet.down_blocks, unet.mid_block, *unet.up_blocks, unet]:
        fully_shard(block)
    return fully_shard(backbone)
def train(shard):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 128) * 2 - 1
    backbone = db.create_model("tinysd_gdf", pretrained=True, trainable=True)
    expected = [m.detach() for m in backbone(x)]
    model = shard(backbone)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-4)
    for step in range(2):
        maps = model(x)
        if step == 0:
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(maps, expected)), "sharding changed the features"
        sum(m.pow(2).mean() for m in maps).backward()
        optimizer.step()
        optimizer.zero_grad()
dist.init_process_group("gloo")
for shard in (ddp, fsdp):
    train(shard)
    print("trained", shard.__name__, dist.get_rank(), flush=True)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Both kinds in the same two processes, one after the other, since these start for longer than they train."""
    script = tmp_path_factory.mktemp("distributed") / "train.py"
    script.write_text(DISTRIBUTED)
    port = f"--master-port={29500 + os.getpid() % 1000}"
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", port, str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_training_on_two_ranks(kind, trained):
    """DDP stops on a parameter that gets no gradient; FSDP2 shards the inner denoiser too."""
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert sorted(line for line in trained.stdout.splitlines() if kind in line) == [
        f"trained {kind} 0",
        f"trained {kind} 1",
    ], trained.stderr[-3000:]
