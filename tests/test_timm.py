"""The bridge into timm's registry, and what is built on it, with the real libraries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
import warm
from torchvision.models.detection.backbone_utils import FeaturePyramidNetwork
from torchvision.transforms.functional import to_pil_image
from transformers import AutoBackbone, TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("costs_not_measured")


def test_every_name_is_in_timm_with_its_description():
    for name in db.list_models():
        assert timm.is_model(name)
        cfg = timm.get_pretrained_cfg(name).to_dict()
        ours = db.get_pretrained_cfg(name)
        assert {
            k: tuple(cfg[k]) if isinstance(cfg[k], (list, tuple)) else cfg[k]
            for k in ("input_size", "mean", "std", "interpolation", "license")
        } == {k: ours[k] for k in ("input_size", "mean", "std", "interpolation", "license")}
    assert set(db.list_models("sd15_*")) <= set(timm.list_models("sd15_*"))


@pytest.mark.parametrize(
    "order", ["import timm; import diffusion_backbones", "import diffusion_backbones; import timm"]
)
def test_either_may_be_imported_first(order):
    code = f"{order}; print(timm.is_model('sd15_gdf'))"
    run = warm.run(code)
    assert run.stdout.strip() == "True", run.stderr


def test_importing_the_package_imports_neither_torch_nor_timm():
    heavy = ["torch", "timm", "diffusers", "transformers", "torchvision"]
    code = f"import sys, json, diffusion_backbones; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == []


def test_a_backbone_runs_without_timm():
    """timm imports torchvision, which is often broken; neither building nor running a backbone may depend on it."""
    code = """
import sys, torch, diffusion_backbones as db
maps = db.create_model('tinysd_gdf', device='meta')(torch.empty(1, 3, 64, 64, device='meta'))
print([tuple(m.shape) for m in maps], 'timm' in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[(1, 48, 8, 8), (1, 96, 4, 4), (1, 224, 2, 2)] False", run.stderr[-2000:]


def test_create_model_levels_and_transform(photo):
    model = timm.create_model("tinysd_gdf", pretrained=True, features_only=True, out_indices=(0, -1))
    assert isinstance(model, db.DiffusionBackbone)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([48, 224], [8, 32])
    assert model.feature_info.module_name()[0] == "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k"
    config = timm.data.resolve_model_data_config(model)
    assert (config["mean"], config["std"], config["input_size"]) == ((0.5,) * 3, (0.5,) * 3, (3, 256, 256))
    image = timm.data.create_transform(**config, is_training=False)(to_pil_image(photo[0] / 2 + 0.5))
    assert image.shape == (3, 256, 256)
    assert -1 <= image.min() < 0 < image.max() <= 1
    assert [tuple(m.shape) for m in model(image[None])] == [(1, 48, 32, 32), (1, 224, 8, 8)]


def test_our_keywords_go_through_timm():
    model = timm.create_model(
        "tinysd_dift", pretrained=True, features_only=True, timestep=51, ensemble=1, out_strides=(8, 16)
    )
    assert model.declaration.recipe.timestep == 51
    assert model.feature_info.reduction() == [8, 16]


def test_an_overlay_with_a_folder_loads_it(tiny_folder):
    overlay = {"file": str(tiny_folder("sd15")), "custom_load": True}
    model = timm.create_model("sd15_gdf", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    assert model.provenance["path"] == str(tiny_folder("sd15"))
    assert model.feature_info.channels() == [16, 32, 128]


def test_an_overlay_with_a_saved_backbone_loads_it(tmp_path, photo):
    saved = db.create_model("tinysd_gdf", pretrained=True, out_strides=(4, 8, 16, 32))
    overlay = {"file": str(saved.save_pretrained(tmp_path)), "custom_load": True}
    model = timm.create_model("tinysd_gdf", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
    x = photo[..., :70, :90]
    assert all(torch.equal(a, b) for a, b in zip(model(x), saved(x), strict=True))


@pytest.mark.parametrize("pretrained", [True, False])
def test_timm_reads_a_saved_folder_by_itself(pretrained, tmp_path, photo):
    """With its weights, strides and normalisation, as ours does: nothing that was saved is lost without a word."""
    saved = db.create_model(
        "tinysd_gdf", pretrained=True, out_strides=(4, 8, 16, 32), timestep=101, input_format="imagenet"
    )
    model = timm.create_model(f"local-dir:{saved.save_pretrained(tmp_path)}", pretrained=pretrained, features_only=True)
    x = photo[..., :70, :90]
    assert all(torch.equal(a, b) for a, b in zip(model(x), saved(x), strict=True))
    assert timm.data.resolve_model_data_config(model) == timm.data.resolve_model_data_config(saved)
    last = timm.create_model(f"local-dir:{tmp_path}", features_only=True, out_strides=(8,))
    assert torch.equal(last(x)[0], saved(x)[1])


@pytest.mark.parametrize(("indices", "channels"), [((1,), [96]), ((-3, -2), [48, 96]), (2, [96, 224])])
def test_out_indices_mean_what_they_mean_in_timm(photo, indices, channels):
    """An integer n is the last n levels; the maps are those of the whole pyramid."""
    x = photo[..., :70, :90]
    whole = db.create_model("tinysd_gdf", pretrained=True)
    model = timm.create_model("tinysd_gdf", pretrained=True, features_only=True, out_indices=indices)
    assert model.feature_info.channels() == channels
    assert all(torch.equal(a, b) for a, b in zip(model(x), whole(x, indices), strict=True))


def test_a_tag_names_other_weights_of_the_same_architecture():
    code = """
import diffusion_backbones as db, timm
db.register_model("tinysd", db.get_declaration("tinysd_gdf").recipe, tag="again")
model = timm.create_model("tinysd_gdf.again", pretrained=True, features_only=True)
print(model.declaration.name, model.feature_info.channels())
"""
    run = warm.run(code)
    assert run.stdout.strip() == "tinysd_gdf.again [48, 96, 224]", run.stderr[-2000:]


def test_an_unknown_tag_is_refused():
    with pytest.raises(KeyError, match="sd15_gdf.*no weights tagged 'nothing'"):
        timm.create_model("sd15_gdf.nothing")


def test_forward_intermediates_and_pruning(photo):
    model = db.create_model("tinysd_vpd", pretrained=True)
    x = photo[..., :70, :100]
    maps = model(x)
    last, chosen = model.forward_intermediates(x, indices=[0, 2])
    assert torch.equal(last, maps[2])
    assert all(torch.equal(a, maps[i]) for a, i in zip(chosen, (0, 2), strict=True))
    rows = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(rows[0].transpose(1, 2).reshape(maps[0].shape), maps[0])
    before = sum(p.numel() for p in model.parameters())
    assert model.prune_intermediate_layers([2, 3]) == [2, 3]
    assert sum(p.numel() for p in model.parameters()) < before
    assert (model.feature_info.reduction(), model.num_features) == ([32, 64], 112)
    assert all(torch.equal(a, b) for a, b in zip(model(x), maps[2:], strict=True))


def test_layer_decay_groups_go_from_input_to_output():
    from timm.optim import param_groups_layer_decay

    model = db.create_model("tinysd_gdf", pretrained=True, trainable=True)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    unet = model.denoiser
    blocks = [unet.down_blocks[0], unet.mid_block, unet.up_blocks[0]]
    order = [unet.conv_in.weight, *(block.resnets[0].conv1.weight for block in blocks)]
    scales = [scale[id(p)] for p in order]
    assert scales == sorted(scales)
    assert len(set(scales)) == 4


def test_transformers_upernet_trains():
    config = TimmBackboneConfig(backbone="tinysd_gdf", out_indices=[0, 1, 2], num_channels=3)
    assert AutoBackbone.from_config(config).channels == [48, 96, 224]
    model = UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=16, num_labels=5, use_auxiliary_head=False)
    )
    loss = model(pixel_values=torch.rand(2, 3, 64, 64) * 2 - 1, labels=torch.zeros(2, 64, 64, dtype=torch.long)).loss
    loss.backward()
    assert loss.isfinite()


def test_torchvision_fpn(photo):
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    fpn = FeaturePyramidNetwork(backbone.feature_info.channels(), 8)
    maps = fpn({str(i): m for i, m in enumerate(backbone(photo[..., :100, :120]))})
    assert [tuple(m.shape) for m in maps.values()] == [(1, 8, 13, 15), (1, 8, 7, 8), (1, 8, 4, 4)]


def test_strides_that_a_decoder_wants(photo):
    backbone = db.create_model("tinysd_gdf", pretrained=True, out_strides=(4, 8, 16, 32, 64))
    x = photo[..., :90, :130]
    native, maps = db.create_model("tinysd_gdf", pretrained=True)(x), backbone(x)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32, 64]
    assert [tuple(m.shape[1:]) for m in maps] == [(48, 23, 33), (48, 12, 17), (96, 6, 9), (224, 3, 5), (224, 2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(maps[1:4], native, strict=True))
