"""The grammar of activation ids, and looking them up."""

from __future__ import annotations

import pytest

import diffusion_backbones as db
from diffusion_backbones.families import architecture
from diffusion_backbones.spec.activations import Catalogue, parse


def catalogue(name):
    checkpoint = db.get_checkpoint(name)
    return Catalogue(architecture(checkpoint).sites(), name)


@pytest.mark.parametrize(
    ("text", "stage", "level", "repeat", "block", "kind"),
    [
        ("up-level1-repeat2-vit-block0-cross-q", "up", 1, 2, 0, "cross-q"),
        ("down-level0-repeat10-res-increment", "down", 0, 10, None, "res-increment"),
        ("mid-repeat1-res-out", "mid", None, 1, None, "res-out"),
        ("mid-vit-block12-ffn-inner", "mid", None, None, 12, "ffn-inner"),
        ("mid-vit-out", "mid", None, None, None, "vit-out"),
        ("up-level3-repeat2-res-in", "up", 3, 2, None, "res-in"),
        ("up-level2-upsampler-out", "up", 2, None, None, "upsampler-out"),
        ("unet-after-conv-in", "unet", None, None, None, "after-conv-in"),
        ("vit-block30-norm-out", "vit", None, None, 30, "norm-out"),
        ("vit-block3-self-map", "vit", None, None, 3, "self-map"),
        ("down-level2-repeat1-vit-block3-self-out", "down", 2, 1, 3, "self-out"),
        ("up_blocks.1.resnets.2", "module", None, None, None, ""),
    ],
)
def test_ids_are_taken_apart(text, stage, level, repeat, block, kind):
    activation = parse(text)
    assert (
        activation.text,
        activation.stage,
        activation.level,
        activation.repeat,
        activation.block,
        activation.kind,
    ) == (text, stage, level, repeat, block, kind)
    assert activation.in_gdf == (stage != "module" and kind not in ("self-out", "res-in"))


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "unet",
            "upblocks",
            "a..b",
            7,
            None,
            "up-level1",
            "mid-res-out",
            "mid-level0-repeat0-res-out",
            "UP-level0-upsampler-out",
        ),
        *("up-level01-repeat0-res-out", "up-level1-repeat0-vit-blockX-out", "up-level1-repeat0-vit-block0-self"),
    ],
)
def test_what_is_no_id_is_refused_with_examples(text):
    with pytest.raises(ValueError, match="activation id"):
        parse(text)


@pytest.mark.parametrize("kind", ["cross-k", "cross-v"])
def test_the_text_side_is_refused_by_name(kind):
    with pytest.raises(ValueError, match="on the text side"):
        parse(f"mid-vit-block0-{kind}")


# Counts, channels and strides as the reference describes them: two independent ways to the same list.
@pytest.mark.parametrize(
    ("name", "count", "without_maps"),
    [
        ("sd14", 197, 165),
        ("sd15", 197, 165),
        ("sd21", 197, 165),
        ("sdxl", 612, 472),
        ("pgv2", 612, 472),
        ("tinysd", 197, 165),
    ],
)
def test_counts(name, count, without_maps):
    ids = list(catalogue(name))
    assert len(ids) == len(set(ids)) == len(catalogue(name)) == count
    assert sum(not activation.endswith("-map") for activation in ids) == without_maps
    assert all(parse(activation).in_gdf for activation in ids)


@pytest.mark.parametrize(
    ("name", "activation", "path", "channels", "stride"),
    [
        (
            "sd15",
            "up-level1-repeat1-vit-block0-cross-q",
            "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
            1280,
            32,
        ),
        ("sd15", "up-level0-repeat2-res-in", "up_blocks.0.resnets.2.norm1", 2560, 64),
        ("sd15", "up-level1-repeat2-res-in", "up_blocks.1.resnets.2.norm1", 1920, 32),
        ("sd15", "up-level3-repeat2-res-in", "up_blocks.3.resnets.2.norm1", 640, 8),
        ("sd15", "up-level2-upsampler-out", "up_blocks.2.upsamplers.0", 640, 8),
        (
            "sd15",
            "up-level3-repeat0-vit-block0-self-k",
            "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k",
            320,
            8,
        ),
        ("sd15", "mid-vit-block0-self-map", "mid_block.attentions.0.transformer_blocks.0.attn1", 8, 64),
        (
            "sd21",
            "up-level1-repeat0-vit-block0-self-map",
            "up_blocks.1.attentions.0.transformer_blocks.0.attn1",
            20,
            32,
        ),
        ("sd15", "down-level2-downsampler-out", "down_blocks.2.downsamplers.0", 1280, 64),
        ("sdxl", "up-level0-repeat0-vit-block5-out", "up_blocks.0.attentions.0.transformer_blocks.5", 1280, 32),
        (
            "sdxl",
            "up-level1-repeat0-vit-block1-ffn-inner",
            "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0",
            2560,
            16,
        ),
        (
            "ssd_1b",
            "down-level2-repeat1-vit-block3-self-out",
            "down_blocks.2.attentions.1.transformer_blocks.3.attn1",
            1280,
            32,
        ),
    ],
)
def test_sites(name, activation, path, channels, stride):
    site = catalogue(name)[activation]
    assert (site.path, site.channels, site.stride) == (path, channels, stride)


def test_forward_order():
    ids = list(catalogue("sd15"))
    assert ids[:4] == [
        "unet-in",
        "unet-after-conv-in",
        "down-level0-repeat0-res-increment",
        "down-level0-repeat0-res-out",
    ]
    block = ids.index("mid-vit-block0-self-q")
    words = ["self-q", "self-k", "self-v", "self-map", "cross-q", "cross-map", "ffn-inner", "out"]
    assert ids[block : block + 9] == [*(f"mid-vit-block0-{w}" for w in words), "mid-vit-out"]
    assert ids[-1] == "unet-out"


def test_a_module_path_is_accepted_wherever_an_id_is():
    assert catalogue("sd15")["up_blocks.1.resnets.2"].stride == 32
    recipe = ["up_blocks.1.resnets.2", "up_blocks.2.attentions.0.norm", "mid_block.resnets.0.time_emb_proj"]
    backbone = db.create_model("sd15", recipe=recipe[:2], device="meta")
    assert backbone.feature_info.reduction() == [16, 32]
    assert backbone.feature_info.channels() == [640, 1280]
    with pytest.raises(ValueError, match="no feature map"):
        db.create_model("sd15", recipe=recipe[2:], device="meta")
    with pytest.raises(KeyError, match="no module 'up_blocks.9.resnets.0'"):
        db.create_model("sd15", recipe=["up_blocks.9.resnets.0"], device="meta")


def test_an_id_that_the_network_lacks_names_the_closest():
    with pytest.raises(KeyError, match="up-level1-repeat2-vit-block0-cross-q") as error:
        catalogue("sd15")["up-level1-repeat3-vit-block0-cross-q"]
    assert "sd15 has no activation" in str(error.value)


def test_finding_by_pattern():
    found = [site.id for site in catalogue("sd15").find("up-level1-*-cross-q")]
    assert found == [f"up-level1-repeat{r}-vit-block0-cross-q" for r in range(3)]
    assert catalogue("sd15").find("*self-out") == []
    assert len(catalogue("sd15").find("*self-out", extensions=True)) == 16
