"""A backbone as transformers' own, under its decoders, saved and loaded with them."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from snippets import blocks, printed, promised
from transformers import (
    AutoBackbone,
    AutoConfig,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    RTDetrConfig,
    RTDetrForObjectDetection,
    SegformerImageProcessor,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

import diffusion_backbones as db
from diffusion_backbones.integrations.transformers import PROCESSOR, DiffusionBackboneConfig, DiffusionBackboneModel

pytestmark = pytest.mark.usefixtures("costs_not_measured")

PAGE = Path(__file__).parent.parent / "docs" / "decoders" / "transformers.md"
BACKBONES = {
    "sd15_gdf": ("sd15_gdf", {}),
    "sdxl_gdf": ("sdxl_gdf", {}),
    "one level": ("sd15", {"recipe": ["up-level1-repeat2-res-out"]}),
    "resampled": ("sd15_gdf", {"out_strides": (4, 8, 16, 32)}),
    "positions in no file": ("pixart_sigma_512", {"recipe": ["vit-block3-out"]}),
}
SMALL = dict(
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
)


@pytest.fixture
def make(tiny_folder):
    def create(kind="sd15_gdf", **more):
        name, keywords = BACKBONES[kind]
        checkpoint = next(c for c in sorted(db.list_checkpoints(), key=len, reverse=True) if name.startswith(c))
        return db.create_model(name, checkpoint_path=tiny_folder(checkpoint), **keywords, **more)

    return create


def images(height=77, width=101, n=2):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def equal(maps, others):
    return all(torch.equal(a, b) for a, b in zip(maps, others, strict=True))


def tensors_of(module):
    return [*module.named_parameters(), *module.named_buffers()]


def upernet(config):
    return UperNetForSemanticSegmentation(
        UperNetConfig(backbone_config=config, hidden_size=16, num_labels=5, use_auxiliary_head=False)
    )


def mask2former(config):
    sizes = dict(
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        num_queries=5,
        num_labels=3,
    )
    depth = dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, train_num_points=64)
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config, **sizes, **depth))


def detr(config):
    return DetrForObjectDetection(DetrConfig(backbone_config=config, num_queries=5, num_labels=3, **SMALL))


def rt_detr(config):
    sizes = dict(
        encoder_hidden_dim=32,
        d_model=32,
        decoder_in_channels=[32] * 3,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        num_labels=3,
    )
    depth = dict(encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    backbone = AutoBackbone.from_config(config)
    return RTDetrForObjectDetection(
        RTDetrConfig(backbone_config=config, encoder_in_channels=backbone.channels, **sizes, **depth)
    )


def inner(model):
    return next(m for m in model.modules() if isinstance(m, DiffusionBackboneModel))


def check_frozen(model):
    backbone = inner(model).diffusion_backbone
    assert not backbone.training
    assert not any(p.requires_grad or p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
def test_saved_and_loaded_it_is_the_same_to_the_bit_without_the_weights_it_came_from(kind, make, tmp_path, monkeypatch):
    backbone, x = make(kind), images()
    maps = backbone(x)
    model = AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone))
    assert model.diffusion_backbone is backbone
    assert equal(model(x).feature_maps, maps)
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} == {path.name for path in tmp_path.iterdir()}
    expected = {name: tensor.clone() for name, tensor in tensors_of(backbone)}
    for _, tensor in tensors_of(backbone):
        tensor.data.zero_()  # nothing is shared with what is loaded
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = DiffusionBackboneModel.from_pretrained(tmp_path)
    loaded = dict(tensors_of(again.diffusion_backbone))
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected), (
        "weights, buffers in the file, and positions in no file"
    )
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values()), (
        "kernels round differently where a mapped file happens to put weights"
    )
    assert equal(again(x).feature_maps, maps)
    assert again.channels == backbone.feature_info.channels()
    assert again.diffusion_backbone.feature_info.reduction() == backbone.feature_info.reduction()
    assert again.diffusion_backbone.provenance == {"path": "local"}
    assert (again.stage_names, again.out_indices) == ([f"level{i}" for i in range(len(maps))], list(range(len(maps))))
    check_frozen(again)


def test_transformers_own_switch_checkpoints_the_denoiser(make):
    """Gradients are those without it, and fewer activations are kept for them."""

    def gradients(model):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = sum(m.square().mean() for m in model(images()).feature_maps)
        loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found, sum(kept)

    model = DiffusionBackboneModel(DiffusionBackboneConfig.from_backbone(make("sd15_gdf", trainable=True))).train()
    expected, all_kept = gradients(model)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found, some_kept = gradients(model)
    assert some_kept < 0.7 * all_kept
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
    model.gradient_checkpointing_disable()
    assert gradients(model)[1] == all_kept


def test_an_encoder_that_overflows_stays_in_float32_when_it_is_read_in_float16(make, tmp_path):
    model = DiffusionBackboneModel(DiffusionBackboneConfig.from_backbone(make("sdxl_gdf")))
    model.save_pretrained(tmp_path)
    again = DiffusionBackboneModel.from_pretrained(tmp_path, dtype=torch.float16).diffusion_backbone
    assert (again.dtype, again.encoder_dtype) == (torch.float16, torch.float32)
    assert torch.equal(again.encode(images()), model.diffusion_backbone.encode(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype, make, tmp_path):
    backbone, x = make("sdxl_gdf", dtype=dtype), images()  # whose encoder overflows in float16 and stays in float32
    maps = backbone(x)
    AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone)).save_pretrained(tmp_path)
    again = DiffusionBackboneModel.from_pretrained(tmp_path)
    kinds = {name: t.dtype for name, t in backbone.state_dict().items()}
    assert {name: t.dtype for name, t in again.diffusion_backbone.state_dict().items()} == kinds
    assert equal(again(x).feature_maps, maps)


def test_a_folder_around_it_is_whole_and_the_head_keeps_its_gradients(make, tmp_path):
    backbone, x = make("resampled"), images()
    model = upernet(DiffusionBackboneConfig.from_backbone(backbone)).eval()
    model.save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert equal(again.state_dict().values(), model.state_dict().values())
    assert equal(again.backbone(x).feature_maps, backbone(x))
    assert torch.allclose(again(pixel_values=x).logits, model(pixel_values=x).logits, atol=1e-6)
    assert all(p.requires_grad for p in again.decode_head.parameters())
    check_frozen(again.train())


def test_trainable_is_remembered(make, tmp_path):
    backbone = make(trainable=True)
    model = AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone))
    model.save_pretrained(tmp_path)
    again = DiffusionBackboneModel.from_pretrained(tmp_path)
    trained = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert {name for name, p in again.diffusion_backbone.named_parameters() if p.requires_grad} == trained != set()
    assert again.train().diffusion_backbone.training
    again(images()).feature_maps[0].mean().backward()
    assert any(p.grad is not None for p in again.diffusion_backbone.denoiser.parameters())


def test_levels_are_chosen_by_index_or_name(make, tmp_path):
    backbone, x = make(), images()
    maps, channels = backbone(x), backbone.feature_info.channels()
    for chosen in ({"out_indices": (1, -1)}, {"out_features": ["level1", "level2"]}):
        model = AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone, **chosen))
        assert (model.channels, model.out_features) == (channels[1:], ["level1", "level2"])
        output = model(x, output_hidden_states=True)
        assert equal(output.feature_maps, maps[1:])
        assert equal(output.hidden_states, maps)
        assert equal(model(x, return_dict=False)[0], maps[1:])
    model.save_pretrained(tmp_path)
    assert DiffusionBackboneModel.from_pretrained(tmp_path).out_indices == [1, 2]
    other = DiffusionBackboneModel.from_pretrained(tmp_path, out_indices=[0])
    assert equal(other(x).feature_maps, maps[:1])
    assert not equal(model(x, timestep=400).feature_maps, maps[1:])


def test_mask2former_trains_and_segments(make):
    model = mask2former(DiffusionBackboneConfig.from_backbone(make("resampled")))
    masks = torch.zeros(2, 64, 96)
    masks[0, :32], masks[1, 32:] = 1, 1
    model.train()(
        pixel_values=images(64, 96), mask_labels=[masks] * 2, class_labels=[torch.tensor([0, 2])] * 2
    ).loss.backward()
    check_frozen(model)
    assert model.class_predictor.weight.grad is not None
    assert model.eval()(pixel_values=images(61, 83)).masks_queries_logits.shape[:2] == (2, 5)


@pytest.mark.parametrize("kind", ["sd15_gdf", "one level"])
def test_detr_trains_and_detects(kind, make, tmp_path):
    backbone, x = make(kind), images(61, 83)
    model = detr(DiffusionBackboneConfig.from_backbone(backbone))
    boxes = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}] * 2
    model.train()(pixel_values=images(), labels=boxes).loss.backward()
    check_frozen(model)
    assert model.class_labels_classifier.weight.grad is not None
    assert model.eval()(pixel_values=x).pred_boxes.shape == (2, 5, 4)
    model.save_pretrained(tmp_path)
    assert equal(inner(DetrForObjectDetection.from_pretrained(tmp_path))(x).feature_maps, backbone(x))


def test_rt_detr_trains_and_detects_at_strides_8_16_32(make):
    model = rt_detr(DiffusionBackboneConfig.from_backbone(make()))
    boxes = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])}] * 2
    model.train()(pixel_values=images(96, 128), labels=boxes).loss.backward()
    check_frozen(model)
    assert model.model.encoder_input_proj[0][0].weight.grad.any()
    assert model.eval()(pixel_values=images(96, 128)).pred_boxes.shape == (2, 10, 4)


def test_an_image_processor_gives_what_the_backbone_expects(make):
    backbone = make()
    image = torch.randint(0, 256, (3, 61, 83), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = SegformerImageProcessor(do_resize=False, **PROCESSOR)([image], return_tensors="pt")["pixel_values"]
    ours = (image.float() / 255)[None] * 2 - 1
    assert (pixels - ours).abs().max() < 1e-6
    model = AutoBackbone.from_config(DiffusionBackboneConfig.from_backbone(backbone))
    assert equal(model(pixels).feature_maps, backbone(pixels))


def test_a_config_is_json_and_its_copies_share_the_backbone(make, tmp_path):
    backbone = make()
    config = DiffusionBackboneConfig.from_backbone(backbone)
    read = AutoConfig.for_model(**json.loads(config.to_json_string()))
    assert isinstance(read, DiffusionBackboneConfig)
    assert read.to_dict() == config.to_dict()
    assert "held" not in config.to_dict()
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).backbone == config.backbone
    assert AutoBackbone.from_config(copy.deepcopy(config)).diffusion_backbone is backbone
    assert pickle.loads(pickle.dumps(config)).held.backbone is None
    random = AutoBackbone.from_config(read)
    assert random.diffusion_backbone is not backbone
    assert (random.diffusion_backbone.provenance, random.channels) == ({}, backbone.feature_info.channels())
    check_frozen(random)


def test_adapters_are_no_part_of_a_config(make):
    with pytest.raises(ValueError, match=r"trainable=True or False, and this backbone has trainable='lora'; save it"):
        DiffusionBackboneConfig.from_backbone(make(trainable="lora"))


def test_bad_configs_are_refused(make):
    with pytest.raises(TypeError, match=r"from_backbone\(create_model\(...\)\), got backbone='sd15_gdf'"):
        DiffusionBackboneConfig("sd15_gdf")
    backbone = make()
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        DiffusionBackboneConfig.from_backbone(backbone, out_features=["stride8"])
    with pytest.raises(ValueError, match="out_indices must be valid indices"):
        DiffusionBackboneConfig.from_backbone(backbone, out_indices=[0, 3])
    config = DiffusionBackboneConfig.from_backbone(backbone)
    with pytest.raises(ValueError, match="format 7 and this version reads 1"):
        DiffusionBackboneConfig({**config.backbone, "format": 7})
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\).*got .*\(1, 4, 64, 64\)"):
        AutoBackbone.from_config(config)(torch.zeros(1, 4, 64, 64))


def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(PAGE.read_text()):
        assert printed(block, names) == promised(block) != []
    shutil.rmtree("segmenter")
