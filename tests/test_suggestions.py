"""What was probably meant by a name that nobody knows, and what stands for the keywords of other libraries."""

from __future__ import annotations

import inspect

import pytest

import diffusion_backbones as db
from diffusion_backbones.factory import options
from diffusion_backbones.families import architecture
from diffusion_backbones.spec.foreign_keywords import COUNTERPARTS
from diffusion_backbones.spec.suggestions import edits, nearest


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("kitten", "sitting", 3),
        ("saturday", "sunday", 3),
        ("ab", "ba", 1),
        ("ca", "abc", 3),
        ("", "abc", 3),
        ("x", "x", 0),
    ],
)
def test_edits_are_those_of_optimal_string_alignment(a, b, distance):
    assert edits(a, b) == edits(b, a) == distance


def test_the_nearest_name_comes_first_and_none_that_is_far_beside_it():
    assert nearest("timestp", ["timesteps_of_all", "timestep", "time"]) == ["timestep"]
    assert nearest("SD15_GDF", ["sd15_gdf", "sdxl_gdf"]) == ["sd15_gdf"]
    assert nearest("qqqq", ["timestep"]) == []


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("pretrain", "pretrained"),
        ("Pretrained", "pretrained"),
        ("checkpont_path", "checkpoint_path"),
        ("cachedir", "cache_dir"),
        ("out_indexes", "out_indices"),
        ("dtyp", "dtype"),
        ("receipe", "recipe"),
        ("weigth_dtype", "weight_dtype"),
    ],
)
def test_a_mistyped_keyword_is_told_the_nearest_one(given, meant):
    with pytest.raises(TypeError, match=rf"create_model has no keyword '{given}'\. Did you mean {meant}\?"):
        db.create_model("sd15_gdf", **{given: 1})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("mid-vit-blok0-out", "mid-vit-block0-out"),
        ("up-level1-repeat1-vit-block0-croos-q", "up-level1-repeat1-vit-block0-cross-q"),
        ("up_level1_repeat1_vit_block0_cross_q", "up-level1-repeat1-vit-block0-cross-q"),
        ("up-level1-repeat1-vit-block0-cross-Q", "up-level1-repeat1-vit-block0-cross-q"),
        ("up-level1-repeat2-res-outt", "up-level1-repeat2-res-out"),
        ("unet-otu", "unet-out"),
        ("up_blocks.1.resnet.2", "up_blocks.1.resnets.2"),
    ],
)
def test_a_mistyped_activation_is_told_the_nearest_one(given, meant):
    catalogue = architecture(db.get_checkpoint("sd15")).catalogue
    with pytest.raises((KeyError, ValueError)) as error:
        catalogue[given]
    assert f"Did you mean {meant}" in str(error.value)


@pytest.mark.parametrize("keyword", COUNTERPARTS)
def test_a_keyword_of_another_library_is_answered_with_what_stands_for_it(keyword):
    with pytest.raises(TypeError) as error:
        db.create_model("sd15_gdf", **{keyword: "x"})
    assert str(error.value) == f"create_model has no keyword {keyword!r}: {COUNTERPARTS[keyword]}."


def test_no_keyword_of_ours_is_called_foreign():
    own = {*inspect.signature(db.create_model).parameters, *options.OVERRIDES, *options.FOREIGN_KEYWORDS}
    assert not own & set(COUNTERPARTS)
    for word in (
        "torch_dtype",
        "variant",
        "subfolder",
        "revision",
        "use_safetensors",
        "local_files_only",
        "vae",
        "token",
    ):
        assert word in COUNTERPARTS
    for word in ("device_map", "low_cpu_mem_usage", "safety_checker"):
        assert word in COUNTERPARTS
