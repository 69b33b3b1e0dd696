"""Each error names what was given, what was expected, and what to do."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import diffusion_backbones as db
from diffusion_backbones import Checkpoint, License, Recipe
from diffusion_backbones.spec.input_format import InputFormat


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True)


IMAGE = torch.zeros(1, 3, 64, 64)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "uint8.*x / 127.5 - 1"),
        (torch.zeros(1, 1, 64, 64), ValueError, r"\(1, 1, 64, 64\).*repeat"),
        (torch.zeros(3, 64, 64), ValueError, r"\(3, 64, 64\).*batch axis"),
        (torch.zeros(0, 3, 64, 64), ValueError, "empty"),
        (torch.zeros(1, 3, 0, 64), ValueError, "empty"),
        (torch.full((1, 3, 8, 8), float("nan")), ValueError, "NaN"),
        (torch.full((1, 3, 8, 8), float("inf")), ValueError, "infinite"),
        ("cat.jpg", TypeError, "str"),
        (torch.nested.nested_tensor([torch.zeros(3, 64, 64)] * 2), TypeError, "nested; give a dense one"),
        (torch.zeros(1, 3, 64, 64).to_sparse(), TypeError, "sparse_coo; give a dense one"),
        (
            [torch.zeros(3, 64, 64), torch.zeros(3, 32, 64)],
            TypeError,
            "list; a batch is one tensor: .*several sizes one by one, or resized or padded",
        ),
        (None, TypeError, "images x, or latents|either images"),
    ],
)
def test_images(backbone, x, error, words):
    with pytest.raises(error, match=words):
        backbone(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"timestp": 3}, TypeError, "timestp.*Did you mean timestep"),
        ({"noise": "gaussian"}, ValueError, "'fixed', 'random', 'none'.*'gaussian'"),
        ({"noise": torch.zeros(4, 9, 8)}, ValueError, r"\(4, 8, 8\)"),
        ({"noise": "none", "ensemble": 2}, ValueError, "noise='none'"),
        ({"ensemble": 0}, ValueError, "ensemble must be"),
        ({"timestep": 1000}, ValueError, "0 to 999.*1000"),
        ({"timestep": -1}, ValueError, "noise='none'"),
        ({"timestep": [1, 2, 3]}, ValueError, "one number or 1"),
        ({"timestep": [1000]}, ValueError, "0 to 999"),
        ({"generator": torch.Generator()}, ValueError, "noise='random'"),
        ({"prompt": ["a", "b"]}, ValueError, "one string or 1"),
        ({"prompt": 3}, TypeError, "prompt"),
        ({"prompt": "a \udcff cat"}, ValueError, r"prompt='a \\udcff cat' holds halves of characters"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(77, 96)}, TypeError, "not both"),
        ({"prompt_embeds": torch.zeros(77, 31)}, ValueError, r"\(77, 96\).*\(77, 31\)"),
        (
            {"pooled_prompt_embeds": torch.zeros(1, 32)},
            TypeError,
            "not conditioned on pooled_prompt_embeds.*prompt_embeds",
        ),
        ({"class_labels": torch.zeros(1)}, TypeError, "not conditioned on class_labels"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, TypeError, "either images x or latents"),
        ({"indices": [5]}, ValueError, "-3 to 2"),
        ({"indices": 4}, ValueError, "last 4"),
    ],
)
def test_calls(backbone, call, error, words):
    with pytest.raises(error, match=words):
        backbone(IMAGE, **call)


@pytest.mark.parametrize(
    "z", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 9, 8), torch.zeros(4, 8, 8), torch.zeros(1, 4, 0, 8)]
)
def test_latents(backbone, z):
    with pytest.raises(ValueError, match=r"\(B, 4, h, w\) with h and w multiples of 8"):
        backbone.forward_latents(z)


@pytest.mark.parametrize("size", [(65, 64), (0, 64), (64, 128)])
def test_a_size_that_cannot_belong_to_the_latents(backbone, size):
    with pytest.raises(ValueError, match="not the size of an image"):
        backbone.forward_latents(torch.zeros(1, 4, 8, 8), size)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        (["sd15_gfd"], {}, KeyError, "Did you mean sd15_gdf"),
        (["sd15"], {}, KeyError, "recipe too.*sd15_gdf"),
        (["sd14"], {}, KeyError, "no published recipe"),
        (["sd15_gdf.ema"], {}, KeyError, "no weights tagged 'ema'"),
        (["stabilityai/sd-turbo"], {}, KeyError, "hf-hub:stabilityai/sd-turbo"),
        (["http:x"], {}, ValueError, "hf-hub:owner/repo"),
        (["sd16"], {"recipe": ["mid-vit-out"]}, KeyError, "no checkpoint is called 'sd16'.*Did you mean.*sd15"),
        (["sd15_gdf"], {"recipe": ["mid-vit-out"]}, TypeError, r"create_model\('sd15', recipe"),
        (["sd15"], {"recipe": []}, TypeError, "list of activation ids"),
        (["sd15"], {"recipe": 3}, TypeError, "list of activation ids"),
        (["sd15"], {"recipe": "nothing.yaml"}, FileNotFoundError, "nothing.yaml"),
        (["sd15"], {"recipe": ["mid-vit-blok0-out"]}, ValueError, "not an activation id"),
        (["sd15"], {"recipe": ["up-level7-upsampler-out"]}, KeyError, "up-level0-upsampler-out"),
        (["sd15"], {"recipe": ["mid-vit-block0-self-map"]}, ValueError, "attention map.*forward_activations"),
        (["sd15_gdf"], {"timestp": 3}, TypeError, "Did you mean timestep"),
        (["sd15_gdf"], {"timestep": 1001}, ValueError, "timestep: expected int <= 999, got 1001"),
        (["sd15_gdf"], {"timestep": "51"}, ValueError, "timestep: expected int or float, got '51'"),
        (["sd15_gdf"], {"scaled": "False"}, ValueError, "scaled: expected bool, got 'False'"),
        (["sd15_gdf"], {"ensemble": 1.5}, ValueError, "ensemble: expected int, got 1.5"),
        (["sd15_gdf"], {"timestep": -1}, ValueError, "noise='none'"),
        (["sd15_gdf"], {"noise": "fixd"}, ValueError, "Did you mean fixed"),
        (["sd15_gdf"], {"ensemble": 0}, ValueError, "ensemble"),
        (["sd15_gdf"], {"prompt": ["a"]}, ValueError, r"prompt: expected str, got \['a'\]"),
        (["sd15_gdf"], {"out_indices": (0, 3)}, ValueError, "-3 to 2"),
        (["sd15_gdf"], {"out_indices": (0, 0)}, ValueError, "different positions"),
        (["sd15_gdf"], {"out_strides": (8, 4)}, ValueError, r"\(8, 4\)"),
        (["sd15_gdf"], {"out_strides": ()}, ValueError, "growing positive"),
        (["sd15_gdf"], {"num_classes": 10}, ValueError, "no classifier"),
        (["sd15_gdf"], {"in_chans": 1}, ValueError, "RGB"),
        (["sd15_gdf"], {"features_only": False}, ValueError, "asks for a classifier"),
        (["sd15_gdf"], {"output_stride": 8}, ValueError, "out_strides"),
        (["sd15_gdf"], {"feature_cls": "fx"}, ValueError, "wrappers"),
        (["sd15_gdf"], {"dtype": "float31"}, ValueError, "'float31'"),
        (["sd15_gdf"], {"dtype": torch.int8}, ValueError, "int8"),
        (["sd15_gdf"], {"checkpoint_path": "/nowhere/at/all"}, FileNotFoundError, "/nowhere/at/all"),
        ([3], {}, TypeError, "named by a text such as 'sd15_gdf', got 3"),
        (["sd15_gdf", "False"], {}, TypeError, "pretrained must be True or False, got 'False'"),
        (
            ["sd15_gdf"],
            {"checkpoint_path": 3},
            TypeError,
            "checkpoint_path must be the path of a folder.*, got 3",
        ),
        (["sd15_gdf"], {"cache_dir": []}, TypeError, r"cache_dir must be a path, got \[\]"),
        (["sd15_gdf"], {"dtype": "float8_e4m3fn"}, ValueError, "dtype must be .* compute in.*'float8_e4m3fn'"),
        (["sd15_gdf"], {"dtype": []}, ValueError, r"dtype must be .*got \[\]"),
        (["sd15_gdf"], {"out_strides": 4}, ValueError, "growing positive integers.*got 4"),
        (["sd15_gdf"], {"out_strides": [True]}, ValueError, r"growing positive integers.*got \[True\]"),
        (["sd15_gdf"], {"out_strides": "48"}, ValueError, "growing positive integers.*got '48'"),
        (["sd15_gdf"], {"out_indices": True}, ValueError, "positions from -3 to 2, got True"),
        (["sd15_gdf"], {"out_indices": ["0"]}, ValueError, r"positions from -3 to 2, got \['0'\]"),
        (["sd15_gdf"], {"img_size": "foo"}, ValueError, "img_size must be an integer.*got 'foo'"),
        (["sd15_gdf"], {"seed": 2**65}, ValueError, "seed: expected int <= 9223372036854775807"),
        (["sd15_gdf"], {"chunk": 2.0}, ValueError, "chunk must be an integer from 1 up, got 2.0"),
        (["sd15_gdf"], {"fold": "no"}, TypeError, "fold must be True or False, got 'no'"),
        (["sd15_gdf"], {"encoder_levels": 1}, TypeError, "encoder_levels must be True or False, got 1"),
        (["sd15_gdf"], {"input_format": ["unit"]}, ValueError, r"input_format=\['unit'\] is none of"),
        (["sd15_gdf"], {"input_format": InputFormat(std=(0.5, 0.0, 0.5))}, ValueError, "std finite and above 0"),
        (["sd15_gdf"], {"input_format": InputFormat(mean=(float("nan"),) * 3)}, ValueError, "mean must be finite"),
        (["sd15_gdf"], {"pretrained_cfg": {"file": "x"}}, ValueError, "checkpoint_path="),
        (["sd15_gdf"], {"pretrained_cfg_overlay": {"hf_hub_id": "a/b"}}, TypeError, "takes file.*not hf_hub_id"),
        (["sd15_gdf"], {"pretrained_cfg_overlay": "x"}, TypeError, "must be a mapping with file, got 'x'"),
    ],
)
def test_create_model(args, kwargs, error, words):
    with pytest.raises(error, match=words):
        db.create_model(*args, device="meta", **kwargs)


@pytest.mark.parametrize("device", ["foo", "cuda:99", -3, [], "cpu:x"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=r"device=.* cannot be used here; it must be a torch.device or its name"):
        db.create_model("tinysd_gdf", device=device)


def test_scalars_of_numpy_are_settings():
    backbone = db.create_model(
        "tinysd_gdf",
        device="meta",
        out_strides=np.array([8, 16]),
        out_indices=np.int64(2),
        timestep=np.int32(51),
        scaled=np.bool_(True),
        chunk=np.int8(2),
    )
    assert (backbone.out_strides, backbone.declaration.recipe.timestep, backbone.chunk) == ((8, 16), 51, 2)


def test_what_none_means_in_timm():
    nothing = {"num_classes": None, "timestep": None, "out_indices": None, "checkpoint_path": ""}
    backbone = db.create_model("tinysd_gdf", device="meta", output_stride=32, img_size=512, in_chans=3, **nothing)
    assert backbone.declaration.recipe.timestep == 51


def test_an_id_behind_the_cut():
    backbone = db.create_model("tinysd_dift", pretrained=True)
    with pytest.raises(KeyError, match=re.escape("create_model('tinysd', recipe=['up-level3-repeat2-vit-out'])")):
        backbone.forward_activations(IMAGE, ["up-level3-repeat2-vit-out"])
    with pytest.raises(KeyError, match="no activation"):
        backbone.forward_activations(IMAGE, ["up-level9-upsampler-out"])


def test_a_prompt_without_a_text_encoder():
    with pytest.raises(FileNotFoundError, match="needs a text encoder.*prompt_embeds"):
        db.create_model("tinysd_gdf")(IMAGE, prompt="a cat")
    with pytest.raises(FileNotFoundError, match="needs a text encoder"):
        db.create_model("tinysd_gdf", prompt="a cat")


def test_heads_and_classifiers(backbone):
    with pytest.raises(TypeError, match="no classifier head"):
        backbone.forward_head(IMAGE)
    with pytest.raises(ValueError, match="5 classes"):
        backbone.reset_classifier(5)
    with pytest.raises(ValueError, match="norm"):
        backbone.forward_intermediates(IMAGE, norm=True)
    with pytest.raises(ValueError, match="'NHWC'"):
        backbone.forward_intermediates(IMAGE, output_fmt="NHWC")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"levels": ()}, "non-empty"),
        ({"levels": "mid-vit-out"}, "sequence"),
        ({"levels": ([],)}, "at least one"),
        ({"levels": ("mid-vit-out", "nonsense")}, r"recipe 'mine': levels\[1\]: 'nonsense' is not an activation id"),
        ({"levels": (("mid-vit-out", 3),)}, r"levels\[0\]\[1\]: expected str, got 3"),
        ({"levels": (3,)}, r"levels\[0\]: expected list, got 3"),
        ({"prompt_padding": "left"}, "prompt_padding: expected one of max_length, longest, got 'left'"),
        ({"noise": "fixd"}, "noise: expected one of fixed, random, none, got 'fixd'. Did you mean fixed"),
        ({"normalize": "layr"}, "normalize: .*'layr'. Did you mean layer"),
        ({"ensemble": 4, "noise": "none"}, "an ensemble of 4 averages over noise"),
        ({"ensemble": True}, "ensemble: expected int, got True"),
        ({"ensemble": 0}, "ensemble: expected int >= 1, got 0"),
        ({"timestep": float("nan")}, "timestep: expected float >= -1.0, got nan"),
        ({"discard": (1.0,)}, r"discard\[0\]: expected int, got 1.0"),
        ({"discard": (3, -1)}, r"discard\[1\]: expected int >= 0, got -1"),
        ({"notes": "one sentence"}, "notes: expected list, got 'one sentence'"),
        ({"scaled": 1}, "scaled: expected bool, got 1"),
        ({"input_size": 0}, "input_size: expected int >= 1, got 0"),
        ({"name": None}, "name: expected str, got None"),
    ],
)
def test_recipes(settings, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**{"name": "mine", "levels": ("mid-vit-out",), **settings})


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("levels: [[mid-vit-out]]\ntimestp: 3", TypeError, "recipe.yaml.*Did you mean timestep"),
        ("timestep: 3", ValueError, "recipe.yaml: recipe: it needs levels"),
        (
            "levels: [[mid-vit-out], [mid-vit-out, x]]",
            ValueError,
            r"recipe.yaml: recipe 'recipe': levels\[1\]: 'x' is not",
        ),
        (
            "levels: [mid-vit-out]\nscaled: 'no'",
            ValueError,
            "recipe.yaml: recipe 'recipe': scaled: expected bool, got 'no'",
        ),
        ("levels: [mid-vit-out]\npaper: {titel: x}", TypeError, "paper has no setting 'titel'. Did you mean title"),
        ("levels: [mid-vit-out]\npaper: {title: x}", ValueError, "paper: lacks the field 'key'"),
        ("levels: [mid-vit-out]\nnormalise: layer\nnormalize: layer", ValueError, "two spellings of one setting"),
        ("- mid-vit-out", ValueError, "must hold a mapping"),
        ("{", ValueError, "not a YAML or JSON"),
        ("[" * 5000, ValueError, "not a YAML or JSON file: it is nested too deeply"),
        ("levels: [mid-vit-out]\nlevels: [unet-out]", ValueError, "recipe.yaml, line 2: 'levels' is given twice"),
        ('{"levels": ["mid-vit-out"], "seed": 1, "seed": 2}', ValueError, "line 1: 'seed' is given twice"),
        ("levels: [mid-vit-out]\npaper: {title: a, title: b}", ValueError, "line 2: 'title' is given twice"),
        ("levels: [mid-vit-out]\ntimestep: 010", ValueError, "line 2: 010 is read as different numbers"),
        ("levels: [mid-vit-out]\nseed: 1_000", ValueError, "1_000 is read as different numbers"),
        ("levels: [mid-vit-out]\nensemble: 1:30", ValueError, "1:30 is read as different numbers"),
        ("levels: [mid-vit-out]\nseed: 99999999999999999999", ValueError, "seed: expected int <= 9223372036854775807"),
    ],
)
def test_recipe_files(tmp_path, text, error, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(error, match=words):
        db.create_model("sd15", recipe=path, device="meta")


def test_levels_that_do_not_fit():
    with pytest.raises(ValueError, match="one level has one stride.*8.*32"):
        db.create_model(
            "sd15",
            recipe=Recipe("r", levels=(("up-level3-repeat2-vit-out", "up-level1-repeat2-res-out"),)),
            device="meta",
        )
    with pytest.raises(ValueError, match=r"fine to coarse, got strides \[32, 8\]"):
        db.create_model(
            "sd15", recipe=Recipe("r", levels=("up-level1-repeat2-res-out", "up-level3-repeat2-vit-out")), device="meta"
        )


def test_declarations():
    with pytest.raises(ValueError, match="already registered"):
        db.register_model("sd15", db.get_declaration("sd15_gdf").recipe)
    with pytest.raises(ValueError, match="lower-case"):
        db.register_checkpoint(Checkpoint("SD-1.5", "x", "a/b", License("mit"), None, 512))
    with pytest.raises(ValueError, match="name="):
        License("other")
    with pytest.raises(KeyError, match="Did you mean sdxl"):
        db.register_model("sdxxl", Recipe("r", levels=("mid-vit-out",)))


MINE = Recipe("r", levels=("mid-vit-out",))


@pytest.mark.parametrize(
    ("args", "name", "error", "words"),
    [
        (["tinysd", ["mid-vit-out"]], "mine", TypeError, "recipe must be a Recipe"),
        ([3, MINE], "mine", TypeError, "checkpoint must be a Checkpoint or the name of one, got 3"),
        (["tinysd", MINE], "sd15", ValueError, "'sd15' is already registered"),
        (["tinysd", MINE], "resnet50", ValueError, "'resnet50' is a model of timm"),
        (["tinysd", MINE], "mine.x", ValueError, "lower-case"),
        (["tinysd", Recipe("r", levels=("up-level7-upsampler-out",))], "mine", KeyError, "up-level7-upsampler-out"),
        (["tinysd", Recipe("r", levels=("mid-vit-out", "unet-out"))], "mine", ValueError, "fine to coarse"),
        (
            [Checkpoint("mine", "x", "a/b", License("mit"), None, 512), MINE],
            "x",
            ValueError,
            "no architecture for mine",
        ),
        (
            [Checkpoint("mine", "x", "a/b", License("mit"), None, 512, family="unett", configs="sd15"), MINE],
            "x",
            ValueError,
            "family 'unett'. Did you mean unet",
        ),
    ],
)
def test_what_is_refused_is_not_registered(args, name, error, words):
    import timm

    resnet, before = timm.model_entrypoint("resnet50"), db.list_models(pretrained=True)
    with pytest.raises(error, match=words):
        db.register_model(*args, name=name)
    assert db.list_models(pretrained=True) == before
    assert timm.model_entrypoint("resnet50") is resnet
