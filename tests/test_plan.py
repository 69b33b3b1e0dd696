"""The plan of a recipe, the whole network on request, and a constructor that stores what it is given."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

import diffusion_backbones as db
from diffusion_backbones.backbone.call_arguments import Call
from diffusion_backbones.backbone.module import DiffusionBackbone
from diffusion_backbones.backbone.state import Conditioning
from diffusion_backbones.families import FAMILIES, architecture, meta_trace
from diffusion_backbones.ops.recording import Recorder
from diffusion_backbones.ops.truncation import count_parameters
from diffusion_backbones.spec.activations import Port
from diffusion_backbones.surgery.plan import Plan

X = torch.linspace(-1, 1, 3 * 40 * 64).view(1, 3, 40, 64).cos()


@pytest.mark.parametrize("name", db.list_models())
def test_a_plan_says_without_torch_what_the_backbone_is(name):
    """Levels, and the parameters that are left, are those of the built backbone."""
    plan, backbone = Plan.of(db.get_declaration(name)), db.create_model(name, device="meta")
    assert [(level.channels, level.stride) for level in plan.levels] == list(
        zip(backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True)
    )
    with torch.device("meta"):
        assert set(plan.denoiser().state_dict()) == set(backbone.denoiser.state_dict())
    assert plan.size % plan.architecture.size_divisibility == 0


@pytest.mark.parametrize("name", ["sd15_gdf", "dit_xl_256_ddae"])
def test_the_whole_network_gives_the_same_features_and_any_activation(name, tiny_folder, tmp_path):
    checkpoint = db.get_declaration(name).checkpoint.name
    settings = {"recipe": tiny.recipe(name), "checkpoint_path": tiny_folder(checkpoint)}
    cut = db.create_model(checkpoint, **settings)
    whole = db.create_model(checkpoint, truncate=False, **settings)
    assert all(torch.equal(a, b) for a, b in zip(cut(X), whole(X), strict=True))
    stock = count_parameters(meta_trace.build(whole.architecture))
    kept = count_parameters(whole.denoiser)
    assert count_parameters(cut.denoiser) < kept <= stock
    assert (kept == stock) == (checkpoint == "sd15"), "behind the blocks of a transformer no activation has an id"
    *_, last = whole.architecture.sites()
    assert whole.forward_activations(X, [last.id])[last.id].isfinite().all()
    with pytest.raises(KeyError, match="is cut behind the last activation of its recipe"):
        cut.forward_activations(X, [last.id])
    saved = whole.save_pretrained(tmp_path)
    again = db.create_model(f"local-dir:{saved}", truncate=False)
    assert all(torch.equal(a, b) for a, b in zip(again(X), whole(X), strict=True))
    assert count_parameters(again.denoiser) == kept
    assert count_parameters(db.create_model(f"local-dir:{saved}").denoiser) == count_parameters(cut.denoiser)


def test_truncate_is_a_bool():
    with pytest.raises(TypeError, match="truncate must be True or False, got 'no'"):
        db.create_model("tinysd_gdf", truncate="no")


def test_a_backbone_says_where_and_in_what_it_computes():
    backbone = db.create_model("tinysd_gdf", pretrained=True, dtype="bfloat16")
    assert (backbone.device, backbone.dtype, backbone.encoder_dtype) == (
        torch.device("cpu"),
        torch.bfloat16,
        torch.bfloat16,
    )
    assert db.create_model("tinysd_gdf", device="meta").device.type == "meta"
    assert backbone(X.bfloat16())[0].dtype == backbone.dtype


def test_the_constructor_stores_and_changes_nothing():
    """No adapter, no hook, no ``requires_grad``: the networks are those that it was given, as they were."""
    made = db.create_model("tinysd_gdf")
    denoiser = copy.deepcopy(made.denoiser).requires_grad_(True)
    for module in denoiser.modules():
        module._forward_hooks.clear()
    names = [name for name, _ in denoiser.named_parameters()]
    recorder = Recorder(denoiser, [])
    conditioning = Conditioning(dict(made.conditioning.items()))
    backbone = DiffusionBackbone(
        made.plan, denoiser, made.encoder, conditioning, made.canvas, recorder, made.encoder_recorder, made.prompter
    )
    assert backbone.denoiser is denoiser
    assert backbone.recorder is recorder
    assert backbone.plan is made.plan
    assert [name for name, _ in denoiser.named_parameters()] == names
    assert all(parameter.requires_grad for parameter in denoiser.parameters())
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_a_call_is_parsed_once():
    """What a call leaves out is the recipe's; noise that is not drawn has one draw."""
    recipe = db.get_declaration("tinysd_dift").recipe
    call = Call.parse({"timestep": None, "noise": None}, recipe, 4, "tinysd_dift", folded=False)
    settings = (call.timesteps, call.noise, call.ensemble, call.chunk)
    assert settings == ((recipe.timestep,), "fixed", recipe.ensemble, 4)
    given = torch.zeros(4, 8, 8)
    call = Call.parse({"noise": given, "chunk": 2}, recipe, 4, "tinysd_dift", folded=False)
    assert (call.noise is given, call.ensemble, call.chunk) == (True, 1, 2)
    with pytest.raises(AttributeError):
        call.timesteps = (3,)


@pytest.mark.parametrize(
    "port",
    [
        Port(),
        Port("in"),
        Port("map"),
        Port(index=1),
        Port(tokens="first"),
        Port(tokens="last", part=2),
        Port("in", tokens="last", part=0),
    ],
)
def test_a_port_is_written_and_read(port):
    assert Port.parse(str(port)) == port


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_a_checkpoint_and_a_tiny_network(family):
    """The tiny configs are the declared ones but for widths, and their network has the same activations."""
    checkpoint = next(c for c in map(db.get_checkpoint, db.list_checkpoints()) if c.family == family)
    whole, small = architecture(checkpoint), architecture(checkpoint, tiny.configs(checkpoint.name))
    assert [(s.id, s.path, str(s.port), s.stride) for s in small.sites()] == [
        (s.id, s.path, str(s.port), s.stride) for s in whole.sites()
    ]
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in network.build_denoiser().parameters()) for network in (whole, small)]
    assert sizes[1] < min(sizes[0], 50_000_000)
