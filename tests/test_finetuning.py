"""Training a backbone: all of its denoiser, adapters, or the prompt; and heads on latents that are kept."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from snippets import blocks, printed, promised
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

import diffusion_backbones as db
from diffusion_backbones.ops.truncation import AttentionTap
from diffusion_backbones.surgery import trainable

pytestmark = pytest.mark.usefixtures("costs_not_measured")

PAGE = (Path(__file__).parent.parent / "docs" / "finetuning.md").read_text()
WAYS = (True, "lora", "prompt")
every_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(scope="module")
def x():
    torch.manual_seed(0)
    return torch.rand(2, 3, 40, 60) * 2 - 1


@pytest.fixture(scope="module")
def frozen(x):
    return db.create_model("tinysd_gdf", pretrained=True)(x)


@functools.cache
def built(way, **kwargs):
    torch.manual_seed(1)
    return db.create_model("tinysd_gdf", pretrained=True, trainable=way, **kwargs)


def build(way, **kwargs):
    """A fresh one, without finding out again what a gradient reaches."""
    return copy.deepcopy(built(way, **kwargs))


def trained(backbone):
    return {n: p for n, p in backbone.named_parameters() if p.requires_grad}


def loss_of(maps):
    return sum(m.float().pow(2).mean() for m in maps)


def step(backbone, optimizer, x):
    optimizer.zero_grad()
    loss = loss_of(backbone(x))
    loss.backward()
    optimizer.step()
    return loss.item()


def same(maps, others):
    return all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


@every_way
def test_training_starts_from_the_frozen_features_and_moves_only_its_own_parameters(way, x, frozen):
    backbone = build(way)
    assert same(backbone(x), frozen)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    optimizer = torch.optim.Adam(trained(backbone).values(), 1e-3)
    backbone.train()
    assert (backbone.training, backbone.denoiser.training, backbone.encoder.training) == (True, way != "prompt", False)
    losses = [step(backbone, optimizer, x) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert {n for n, p in trained(backbone).items() if p.grad is None} == set(), "DDP would stop on these"
    moved = {n for n, t in backbone.state_dict().items() if not torch.equal(t, before[n])}
    assert moved <= set(trained(backbone))
    assert moved
    assert all(trainable.trains(way, n) for n in moved)


@pytest.mark.parametrize("way", ["lora", "prompt"])
def test_copies_saved_folders_and_shorter_networks_are_what_was_trained(way, x, tmp_path):
    backbone = build(way)
    optimizer = torch.optim.Adam(trained(backbone).values(), 1e-3)
    for _ in range(3):
        step(backbone, optimizer, x)
    maps = backbone(x)
    again = build(way)
    torch.nn.utils.vector_to_parameters(
        torch.zeros(sum(p.numel() for p in trained(again).values())), trained(again).values()
    )
    again.load_state_dict({n: p.detach() for n, p in trained(backbone).items()}, strict=False)
    for other in (again, copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert same(other(x), maps)

    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}", trainable=way)
    for a, b in zip(saved(x), maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert list(trained(saved)) == list(trained(backbone))
    assert load_file(tmp_path / "model.safetensors").keys() == build(False).state_dict().keys() - {"canvas"}, (
        "adapters are merged"
    )

    backbone.prune_intermediate_layers([1, 2])
    backbone.zero_grad()
    assert same(backbone(x), maps[1:])
    loss_of(backbone(x)).backward()
    assert [n for n, p in trained(backbone).items() if p.grad is None] == []


@every_way
def test_training_resumes_as_if_it_had_not_stopped(way, x, tmp_path):
    backbone = build(way)
    optimizer = torch.optim.AdamW(trained(backbone).values(), 1e-3)
    for _ in range(2):
        step(backbone, optimizer, x)
    torch.save({"model": backbone.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    expected = [step(backbone, optimizer, x) for _ in range(2)]
    resumed = build(way)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["model"])
    optimizer = torch.optim.AdamW(trained(resumed).values(), 1e-3)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [step(resumed, optimizer, x) for _ in range(2)] == expected
    assert same(resumed(x), backbone(x))


@every_way
def test_checkpointing_gives_the_same_gradients(way, x):
    backbone = build(way).train()
    if way == "lora":  # with B at zero, A has no gradient that could differ
        for name, parameter in trained(backbone).items():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, 0, 0.02)
    grads = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        loss_of(backbone(x)).backward()
        grads.append({n: p.grad.clone() for n, p in trained(backbone).items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@every_way
def test_bfloat16_trains(way, x):
    """Under autocast with weights in float32, and with weights in bfloat16."""
    backbone = build(way)
    optimizer = torch.optim.Adam(trained(backbone).values(), 1e-3)
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(loss_of(backbone(x)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert {p.dtype for p in trained(backbone).values()} == {torch.float32}
    half = build(way).to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    loss_of(half(x)).backward()
    assert all(p.grad.isfinite().all() for p in trained(half).values())


DISTRIBUTED = """
import torch, torch.distributed as dist
import diffusion_backbones as db
dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(dist.get_rank())
x = torch.rand(1, 3, 64, 64) * 2 - 1
for way in (True, "lora", "prompt"):
    backbone = db.create_model("tinysd_gdf", pretrained=True, trainable=way)
    model = torch.nn.parallel.DistributedDataParallel(backbone)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(2):
        sum(m.pow(2).mean() for m in model(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in backbone.named_parameters():
        others = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(others, p.detach())
        assert torch.equal(*others), f"{way}: {name} differs between ranks"
    if dist.get_rank() == 0:
        print(f"trained {way}", flush=True)
dist.destroy_process_group()
"""


def test_two_ranks_need_no_search_for_unused_parameters(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [f"trained {way}" for way in WAYS]


@every_way
def test_timm_groups_by_depth_and_spares_the_prompt(way):
    backbone = build(way)
    groups = param_groups_layer_decay(backbone, layer_decay=0.5, no_weight_decay_list=backbone.no_weight_decay())
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in trained(backbone).values()}
    decay = {
        id(p): g["weight_decay"]
        for g in param_groups_weight_decay(backbone, 0.1, no_weight_decay_list=backbone.no_weight_decay())
        for p in g["params"]
    }
    assert ({decay[id(p)] for p in trained(backbone).values()} == {0.0}) == (way == "prompt")
    if way == "lora":
        scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
        stages = ("down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.3")
        scales = [scale[id(next(p for n, p in trained(backbone).items() if stage in n))] for stage in stages]
        assert scales == sorted(scales)
        assert len(set(scales)) == 4


# Adapters.


@pytest.mark.parametrize(("checkpoint", "recipe"), [("sd15", "sd15_gdf"), ("dit_xl_256", ["vit-block3-out"])])
def test_adapters_are_on_the_projections_that_are_left(checkpoint, recipe, tiny_folder, x):
    name, recipe = (recipe, None) if isinstance(recipe, str) else (checkpoint, recipe)
    backbone = db.create_model(
        name, recipe=recipe, checkpoint_path=tiny_folder(checkpoint), trainable="lora", lora_rank=2
    )
    plain = db.create_model(name, recipe=recipe, checkpoint_path=tiny_folder(checkpoint))
    assert same(backbone(x), plain(x))
    linear = {
        n
        for n, m in plain.denoiser.named_modules()
        if isinstance(m, torch.nn.Linear) and n.endswith(trainable.PROJECTIONS)
    }
    adapted = {n.removeprefix("denoiser.").partition(".lora_")[0] for n in trained(backbone)}
    assert adapted == linear
    assert {min(p.shape) for p in trained(backbone).values()} == {2}
    loss_of(backbone(x)).backward()
    assert [n for n, p in trained(backbone).items() if p.grad is None] == []


def test_what_an_adapter_adds_is_in_the_activation(x, frozen):
    """The finest level is a projection itself, in what truncation left of its attention."""
    backbone = build("lora")
    path = "up_blocks.3.attentions.0.transformer_blocks.0.attn1"
    attention = backbone.denoiser.get_submodule(path)
    assert isinstance(attention, AttentionTap)
    torch.nn.init.ones_(attention.to_k.lora_B["default"].weight)
    inputs = []
    handle = attention.to_k.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
    maps = backbone(x)
    handle.remove()
    assert same(maps[1:], frozen[1:])
    added = attention.to_k.lora_A["default"](inputs[0]).sum(-1).unflatten(1, (8, 8))[:, None, :5]
    assert not torch.equal(maps[0], frozen[0])
    torch.testing.assert_close(maps[0], frozen[0] + added, rtol=1e-4, atol=1e-4)
    [keys] = backbone.forward_activations(x, [f"{path}.to_k"], as_maps=True).values()
    assert torch.equal(keys, maps[0])


def test_a_text_that_ends_unread_gets_no_adapter(tiny_folder):
    """The attention map of SD3's block 9 needs queries and keys there, and no values."""
    backbone = db.create_model("sd3_medium_seg4diff", checkpoint_path=tiny_folder("sd3_medium"), trainable="lora")
    last = [n for n in trained(backbone) if ".9.attn." in n]
    assert {n.split(".attn.")[1].split(".")[0] for n in last} == {"to_q", "to_k"}


# Prompts.


def test_the_prompt_is_learned_in_every_form_the_network_takes_it(tiny_folder, x):
    backbone = db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl"), trainable="prompt")
    plain = db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl"))
    assert list(trained(backbone)) == ["conditioning.prompt_embeds", "conditioning.pooled_prompt_embeds"]
    assert list(backbone.state_dict()) == list(plain.state_dict())
    assert same(backbone(x), plain(x))
    loss_of(backbone(x)).backward()
    assert all(p.grad.any() for p in trained(backbone).values())
    assert all(p.grad is None for p in backbone.denoiser.parameters())


def test_some_tokens_can_be_learned_and_a_call_may_bring_its_own(x, frozen, tmp_path):
    backbone = build("prompt", prompt_tokens=5)
    prompt = backbone.conditioning.prompt_embeds
    assert prompt.shape == (1, 5, 96)
    assert torch.equal(prompt, build(False).conditioning.prompt_embeds[:, :5])
    loss_of(backbone(x)).backward()
    assert prompt.grad.abs().sum(-1).all(), "every learned token is attended"
    assert not same(backbone(x), frozen)
    assert same(backbone(x, prompt=""), frozen)
    with torch.no_grad():
        prompt.add_(1)
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}", trainable="prompt")
    assert torch.equal(saved.conditioning.prompt_embeds, prompt)
    assert same(saved(x), backbone(x))


def test_learned_tokens_are_not_masked(tiny_folder):
    """The empty prompt of PixArt has one token, and its others are masked; of learned ones none is."""
    kwargs = dict(
        recipe=["vit-block6-out"], checkpoint_path=tiny_folder("pixart_alpha_256"), trainable="prompt", noise="none"
    )
    torch.manual_seed(0)
    z = torch.randn(1, 4, 8, 8)
    reached = []
    for tokens in (None, 4):
        backbone = db.create_model("pixart_alpha_256", prompt_tokens=tokens, **kwargs)
        loss_of(backbone.forward_latents(z)).backward()
        reached.append(int(backbone.conditioning.prompt_embeds.grad.abs().sum(-1).count_nonzero()))
    assert reached[0] < 4
    assert reached[1] == 4


# Latents.


def test_a_head_on_kept_latents_learns_what_it_learns_on_images(x):
    backbone = build(False)
    losses = []
    for kept in (False, True):
        torch.manual_seed(2)
        head = torch.nn.Conv2d(backbone.num_features, 3, 1)
        optimizer = torch.optim.SGD(head.parameters(), 1e-3)
        z = backbone.encode(x)
        if kept:
            backbone.encoder.to("meta")
        losses.append([])
        for _ in range(3):
            maps = backbone.forward_latents(z, (40, 60)) if kept else backbone(x)
            loss = torch.nn.functional.cross_entropy(head(maps[-1]), torch.zeros(2, 2, 2, dtype=torch.long))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


# What cannot be.


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(trainable="all"), ValueError, "trainable must be one of False, True, 'lora', 'prompt', got 'all'"),
        (dict(trainable=1), ValueError, "trainable must be one of .*, got 1"),
        (dict(lora_rank=4), TypeError, "lora_rank=4 is for trainable='lora', and trainable is False"),
        (
            dict(trainable="lora", prompt_tokens=4),
            TypeError,
            "prompt_tokens=4 is for trainable='prompt', and trainable is 'lora'",
        ),
        (dict(trainable="lora", lora_rank=0), ValueError, "lora_rank must be an integer from 1 up, got 0"),
        (
            dict(trainable="prompt", prompt_tokens=78),
            ValueError,
            "prompt_tokens=78 is more than the 77 tokens of the recipe's prompt",
        ),
        (
            dict(trainable="prompt", recipe=["down-level0-repeat0-res-out"]),
            ValueError,
            "no activation of tinysd_custom depends on the prompt.*trainable=True",
        ),
        (
            dict(trainable="lora", recipe=["down-level0-repeat0-res-out"]),
            ValueError,
            "depends on a projection of attention .*trainable=True",
        ),
    ],
)
def test_settings_that_do_not_go_together(kwargs, error, message):
    name = "tinysd" if "recipe" in kwargs else "tinysd_gdf"
    with pytest.raises(error, match=message):
        db.create_model(name, **kwargs)


@pytest.mark.parametrize(("name", "what"), [("dit_xl_256_ddae", "class_labels"), ("ddpm_cifar10_32", "nothing")])
def test_a_network_without_text_has_no_prompt(name, what):
    recipe = None if db.is_model(name) else ["mid-repeat0-res-out"]
    with pytest.raises(ValueError, match=f"is conditioned on {what} and not on text, so it has no prompt to train"):
        db.create_model(name, recipe=recipe, device="meta", trainable="prompt")


def test_the_length_of_a_text_that_is_read_is_fixed():
    with pytest.raises(ValueError, match="sd3_medium_seg4diff cannot: its recipe reads one channel per token"):
        db.create_model("sd3_medium_seg4diff", device="meta", trainable="prompt", prompt_tokens=8)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'diffusion-backbones\[lora\]'"):
        db.create_model("tinysd_gdf", trainable="lora")


def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(PAGE):
        assert printed(block, names) == promised(block)
