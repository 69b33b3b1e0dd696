"""Folding: the features of a network that was not folded, at any size and batch, without the weights of what does not
depend on the image.
"""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import timm
import tiny
import torch
from safetensors.torch import load_file
from transformer_oracle import CASES, Case
from transformers import AutoBackbone

import diffusion_backbones as db
from diffusion_backbones.integrations.transformers import DiffusionBackboneConfig, DiffusionBackboneModel
from diffusion_backbones.ops import recording, safetensors_io
from diffusion_backbones.ops.truncation import count_parameters
from diffusion_backbones.surgery import constant_folding

pytestmark = pytest.mark.usefixtures("costs_not_measured")

LATENT = {"square": (8, 8), "wide": (8, 12)}
BACKBONES = ["flux_dev_ditf", "sd3_medium_seg4diff", "dit_xl_256_ddae", "sd15_gdf"]
UNETS = ["sdxl", "deepfloyd_if_xl", "ddpm_cifar10_32"]


def close(maps, others, names=None):
    """To rounding: within 1e-5 of the largest value."""
    assert len(maps) == len(others) > 0
    for name, a, b in zip(names or range(len(maps)), maps, others, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5 * max(1, float(b.abs().max())), msg=lambda text, name=name: f"{name}: {text}"
        )


def equal(maps, others):
    assert len(maps) == len(others) > 0
    assert all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


def leaves(network):
    """Path -> module, of those that are a matrix and no more."""
    return {
        path: module
        for path, module in network.named_modules()
        if not list(module.children()) and any(p.ndim > 1 for p in module.parameters())
    }


# Against the gradient: what an image's gradient does not reach does not depend on the image.


def case_of(name, latent):
    case = Case(name, latent, 50)
    case.conditioning = {
        key: tensor[:1].repeat(2, *[1] * (tensor.ndim - 1)) for key, tensor in case.conditioning.items()
    }
    return case


def outputs(case):
    """Of every leaf that runs, what it gave; with a graph to the latents."""
    seen, z = {}, case.z.clone().requires_grad_()
    hooks = [
        module.register_forward_hook(lambda m, a, out, path=path: seen.setdefault(path, out))
        for path, module in leaves(case.cut).items()
    ]
    case.family.call(case.cut.requires_grad_(False), z, case.timestep, case.conditioning, case.size)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", CASES)
def test_what_is_gone_is_what_neither_the_image_nor_its_size_reaches_and_every_activation_stays(name):
    cases = {shape: case_of(name, latent) for shape, latent in LATENT.items()}
    cases["square"].conditioning = cases["wide"].conditioning
    one, other = (outputs(case) for case in cases.values())
    constant = {
        path
        for path, out in one.items()
        if not out.requires_grad and out.shape == other[path].shape and torch.equal(out, other[path])
    }
    assert constant
    case = cases["wide"]
    folded = copy.deepcopy(case.cut)
    conditioning = {key: tensor[:1] for key, tensor in case.conditioning.items()}
    constant_folding.fold(folded, case.family, conditioning, 50, case.catalogue.all())
    assert set(one) - set(leaves(folded)) == constant
    assert all(recording.available(folded, site) for site in case.catalogue.all())
    for case in cases.values():
        ids = [site.id for site in case.catalogue.all()]
        close(list(case.ours(folded, ids).values()), list(case.ours(case.cut, ids).values()), ids)


@pytest.mark.parametrize("name", UNETS)
def test_every_activation_of_a_unet_stays(name, tiny_folder):
    plain, folded = (
        db.create_model(name, recipe=["unet-out"], checkpoint_path=tiny_folder(name), fold=fold)
        for fold in (False, True)
    )
    assert count_parameters(folded.denoiser) < count_parameters(plain.denoiser)
    ids = [site.id for site in plain.catalogue.all() if not site.encoder]
    d = plain.size_divisibility
    x = torch.rand(2, 3, 2 * d - 3, 3 * d - 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    acts, expected = (list(backbone.forward_activations(x, ids, ensemble=2).values()) for backbone in (folded, plain))
    close(acts, expected, ids)


def test_what_depends_on_the_size_of_the_image_is_kept(tiny_folder):
    """SDXL is told the size, in the same sum as the timestep."""
    folded = db.create_model("sdxl_gdf", checkpoint_path=tiny_folder("sdxl"), fold=True)
    gone = set(constant_folding.constants(folded.denoiser))
    assert "time_embedding" in gone
    assert {path.rpartition(".")[2] for path in gone} == {"time_embedding", "to_k", "to_v"}
    assert any(name.endswith("time_emb_proj.weight") for name, _ in folded.denoiser.named_parameters())
    assert "add_embedding.linear_1.weight" in dict(folded.denoiser.named_parameters())


# As a backbone.


def tiny_backbone(name, tiny_folder, **keywords):
    checkpoint = db.get_declaration(name).checkpoint.name
    return db.create_model(checkpoint, recipe=tiny.recipe(name), checkpoint_path=tiny_folder(checkpoint), **keywords)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_folded_backbone_gives_the_same_and_is_saved_without_what_it_dropped(
    name, tiny_folder, photo, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    plain, folded = tiny_backbone(name, tiny_folder), tiny_backbone(name, tiny_folder, fold=True)
    x = torch.cat([photo[..., :75, :170], photo[..., 100:175, 200:370]])
    maps = folded(x)
    close(maps, plain(x))
    close(folded(x[:1], ensemble=2, noise="fixed"), plain(x[:1], ensemble=2, noise="fixed"))

    gone = constant_folding.constants(folded.denoiser)
    assert count_parameters(plain.denoiser) - count_parameters(folded.denoiser) == sum(
        count_parameters(plain.denoiser.get_submodule(path)) for path in gone
    )
    assert count_parameters(folded.denoiser) < count_parameters(plain.denoiser)

    folder = folded.save_pretrained(tmp_path / "saved")
    names = set(load_file(folder / "model.safetensors"))
    dropped = {
        f"denoiser.{path}.{key}" for path in gone for key in safetensors_io.shapes(plain.denoiser.get_submodule(path))
    }
    assert dropped
    assert not names & dropped
    read = []
    monkeypatch.setattr(
        safetensors_io,
        "fill",
        lambda module, some, fill=safetensors_io.fill: fill(module, (read.append(n) or (n, t) for n, t in some)),
    )
    again = db.create_model(f"local-dir:{folder}")
    assert not {f"denoiser.{n}" for n in read} & dropped
    assert again.folded
    assert json.loads((folder / "config.json").read_text())["folded"].keys() == gone.keys()
    equal(list(again.state_dict().values()), list(folded.state_dict().values()))
    equal(again(x), maps)
    skeleton = db.create_model(f"local-dir:{folder}", device="meta")
    assert [tuple(m.shape) for m in skeleton(torch.empty(2, 3, 75, 170, device="meta"))] == [
        tuple(m.shape) for m in maps
    ]


def test_half_precision(tiny_folder, photo, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    name, x, half = "sd3_medium_seg4diff", photo[..., :75, :170], {"dtype": torch.bfloat16}
    full, folded = tiny_backbone(name, tiny_folder, fold=True), tiny_backbone(name, tiny_folder, fold=True, **half)
    assert set(constant_folding.constants(folded.denoiser)) == set(constant_folding.constants(full.denoiser))
    expected = tiny_backbone(name, tiny_folder, **half)(x)
    for maps in (folded(x), db.create_model(f"local-dir:{full.save_pretrained(tmp_path)}", **half)(x)):
        for m, e in zip(maps, expected, strict=True):
            assert m.dtype == torch.bfloat16
            torch.testing.assert_close(m, e, rtol=0, atol=0.03 * float(e.abs().max()))


@pytest.fixture(scope="module")
def plain():
    return db.create_model("tinysd_gdf", pretrained=True)


@pytest.fixture(scope="module")
def folded():
    return db.create_model("tinysd_gdf", pretrained=True, fold=True)


@pytest.fixture
def x(photo):
    return photo[..., :64, :96]


def test_copies_pickles_threads_and_timm(plain, folded, x):
    maps = folded(x)
    close(maps, plain(x))
    for other in (
        copy.deepcopy(folded),
        pickle.loads(pickle.dumps(folded)),
        timm.create_model("tinysd_gdf", pretrained=True, features_only=True, fold=True),
    ):
        assert other.folded
        equal(other(x), maps)
    results = []
    threads = [threading.Thread(target=lambda: results.append(folded(x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        equal(result, maps)


def test_a_saved_folder_is_folded_when_it_is_read_and_a_folded_one_stays_so(plain, folded, x, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    for i, backbone in enumerate((plain, folded)):
        again = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / str(i))}", fold=True)
        assert set(constant_folding.constants(again.denoiser)) == set(constant_folding.constants(folded.denoiser))
        equal(again(x), folded(x))


def test_compile_gives_one_graph(folded, x):
    torch._dynamo.reset()
    close(torch.compile(folded, fullgraph=True, backend="eager")(x), folded(x))


def test_a_gradient_reaches_the_image(plain, folded, x):
    gradients = []
    for backbone in (plain, folded):
        image = x.clone().requires_grad_()
        sum(m.sum() for m in backbone(image)).backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(("name", "level"), [("sd15_gdf", 2), ("flux_dev_ditf", 0)])
def test_it_may_be_cut_afterwards(name, level, tiny_folder, x, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    backbone = tiny_backbone(name, tiny_folder, fold=True)
    [expected] = backbone(x, indices=[level])
    folder = backbone.save_pretrained(tmp_path / "whole")
    cut = db.create_model(f"local-dir:{folder}", out_indices=[level])
    backbone.prune_intermediate_layers([level])
    assert cut.state_dict().keys() == backbone.state_dict().keys()
    for other in (backbone, cut, db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'cut')}")):
        equal(other(x), [expected])


def test_a_deepfloyd_may_be_cut_afterwards(tiny_folder):
    """What the text goes through is in no parameter any more, and still runs."""
    recipe = ["down-level2-repeat0-vit-out", "mid-vit-out"]
    backbone = db.create_model(
        "deepfloyd_if_xl", recipe=recipe, checkpoint_path=tiny_folder("deepfloyd_if_xl"), fold=True
    )
    x = torch.rand(1, 3, 64, 64)
    [expected, _] = backbone(x)
    backbone.prune_intermediate_layers([0])
    equal(backbone(x), [expected])


def test_under_transformers_it_is_saved_and_loaded(tiny_folder, x, tmp_path):
    backbone = tiny_backbone("sd15_gdf", tiny_folder, fold=True)
    AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone)).save_pretrained(tmp_path)
    again = DiffusionBackboneModel.from_pretrained(tmp_path)
    assert again.diffusion_backbone.folded
    equal(again(x).feature_maps, backbone(x))


def test_what_a_constant_gives_may_be_written_to():
    constant = constant_folding.Constant(
        [torch.ones(1, 2), None, torch.ones(3)], [0, None, None], (0, 1, 5), as_tuple=True
    )
    two, none, same = constant(torch.empty(7, 10))
    assert (tuple(two.shape), none, tuple(same.shape)) == ((2, 2), None, (3,))
    two.zero_(), same.zero_()
    assert all(output is None or bool((output == 1).all()) for output in constant.outputs)


# What is refused.


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt_embeds": torch.zeros(77, 64)}, "prompt_embeds"),
        ({"timestep": 50}, "timestep"),
        ({"timestep": 3, "prompt": "a cat"}, "timestep, prompt"),
        ({"class_labels": torch.zeros(1)}, "class_labels"),
        ({"guidance": torch.zeros(1)}, "guidance"),
    ],
)
def test_another_prompt_or_timestep_is_refused(call, named, folded, x):
    said = (
        rf"tinysd_gdf was built with fold=True, .*so a call cannot change {named}; build it without fold=True, or "
        r"with the prompt= and timestep="
    )
    with pytest.raises(TypeError, match=said):
        folded(x, **call)
    with pytest.raises(TypeError, match=said):
        folded.forward_latents(folded.encode(x), **call)
    with pytest.raises(TypeError, match=said):
        folded.forward_activations(x, ["mid-vit-out"], **call)


def test_none_and_other_keywords_are_taken(plain, folded, x):
    assert not plain.folded
    close(folded(x, prompt=None, timestep=None, noise="none"), plain(x, noise="none"))


def test_a_recipe_of_another_timestep_is_folded(x):
    other, same = (db.create_model("tinysd_gdf", pretrained=True, timestep=300, fold=fold) for fold in (True, False))
    close(other(x), same(x))


def test_nothing_is_trained(folded, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    folder = folded.save_pretrained(tmp_path / "saved")
    for way in (True, "prompt"):
        with pytest.raises(
            TypeError,
            match=rf"tinysd_gdf: trainable={way!r} needs the weights that fold=True drops; train it without fold=True",
        ):
            db.create_model("tinysd_gdf", pretrained=True, fold=True, trainable=way)
        with pytest.raises(TypeError, match=rf"trainable={way!r} needs the weights that fold=True drops"):
            db.create_model(f"local-dir:{folder}", trainable=way)


def test_random_weights_are_folded(x):
    backbone = db.create_model("tinysd_gdf", fold=True)
    assert backbone.folded
    assert all(m.isfinite().all() for m in backbone(x))


def test_on_meta_there_is_nothing_to_fold():
    with pytest.raises(
        ValueError,
        match="tinysd_gdf: fold=True keeps values, and on the meta device there are none; build it on another",
    ):
        db.create_model("tinysd_gdf", device="meta", fold=True)
    with pytest.raises(TypeError, match="fold must be True or False, got 'yes'"):
        db.create_model("tinysd_gdf", fold="yes")


def test_what_is_constant_is_no_activation_folded_or_not(folded, plain, x):
    for path in ("time_embedding.linear_2", "up_blocks.2.attentions.0.transformer_blocks.0.attn2.to_k"):
        for backbone in (folded, plain):
            with pytest.raises(ValueError, match=f"'{path}' gives no feature map"):
                backbone.forward_activations(x, [path])


def test_a_folder_that_does_not_fit_is_refused(folded, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_backbones.reports.backbone_card.card", lambda *_: "a card")
    folder = folded.save_pretrained(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    for path, what in (("nose.1", config["folded"]["time_embedding"]), ("time_embedding", {"outputs": [[1, 2]]})):
        (folder / "config.json").write_text(json.dumps(config | {"folded": {path: what}}))
        with pytest.raises(ValueError, match=f"cannot be restored: '{path}' is not described as a module of it"):
            db.create_model(f"local-dir:{folder}")
