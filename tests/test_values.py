"""Values of a call: what cannot be right is refused by name, what is likely wrong is told, and a device is waited for
once.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import diffusion_backbones as db
from diffusion_backbones.backbone.conditioning import merge_conditioning
from diffusion_backbones.factory.entry_points import RandomWeightsWarning
from diffusion_backbones.ops.tensor_checks import ValueChecks

IMAGE = torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64).sin()
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def backbone():
    return db.create_model("tinysd_gdf", pretrained=True, out_indices=[2])


def with_value(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros, and one other value somewhere in the middle."""
    x = torch.zeros(shape, dtype=dtype)
    x.view(-1)[x.numel() // 2] = value
    return x


# Not a number, and other kinds of number.


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(("key", "shape"), [("noise", (4, 8, 8)), ("prompt_embeds", (1, 77, 96)), ("timestep", (1,))])
def test_what_is_not_finite_is_refused_by_name(backbone, key, shape, value):
    for noise in ({}, {"noise": "none"} if key != "noise" else {}):
        with pytest.raises(ValueError, match=f"{key} must be|timestep must be from 0 to"):
            backbone(IMAGE, **{key: with_value(value, *shape)}, **noise)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_images_and_latents_that_are_not_finite_are_refused(backbone, value, dtype):
    with pytest.raises(ValueError, match="NaN or infinite"):
        backbone(with_value(value, 2, 3, 64, 72, dtype=dtype))
    for call in (backbone.forward_latents, lambda z: backbone(latents=z)):
        with pytest.raises(ValueError, match="latents must be finite"):
            call(with_value(value, 2, 4, 8, 16, dtype=dtype))


def test_what_the_dtype_of_the_network_cannot_hold_is_refused():
    backbone = db.create_model("tinysd_gdf", pretrained=True, dtype="float16", out_indices=[2])
    for key, shape in (("noise", (4, 8, 8)), ("prompt_embeds", (77, 96))):
        with pytest.raises(ValueError, match=f"{key} must be finite.*torch.float16 cannot hold"):
            backbone(IMAGE, **{key: with_value(1e5, *shape)})
    with pytest.raises(ValueError, match="latents must be finite"):
        backbone.forward_latents(with_value(1e5, 1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"got values from 0 to 1e\+05, too large for torch.float16"):
        backbone(with_value(1e5, 1, 3, 64, 64))
    whole = db.create_model("tinysd_gdf", pretrained=True, out_indices=[2])
    with pytest.raises(ValueError, match=r"got values from -1e\+300 to 0, too large for torch.float32"):
        whole(with_value(-1e300, 1, 3, 64, 64, dtype=torch.float64))


def test_what_overflows_in_the_network_is_refused(backbone):
    """The square of 1e38 is beyond float32, which holds 3.4e38: features were NaN."""
    for key, shape in (("noise", (4, 8, 8)), ("prompt_embeds", (77, 96))):
        with pytest.raises(ValueError, match=rf"{key} must be finite.* or more than 1e\+12"):
            backbone(IMAGE, **{key: with_value(1e38, *shape)})
    with pytest.raises(ValueError, match=r"latents must be finite.* or more than 1e\+12"):
        backbone.forward_latents(with_value(-1e38, 1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"got values from 0 to 1e\+38, too large"):
        backbone(with_value(1e38, 1, 3, 64, 64))
    for values in (
        backbone(IMAGE, noise=with_value(1e12, 4, 8, 8)),
        backbone.forward_latents(torch.full((1, 4, 8, 8), 1e12)),
    ):
        assert all(bool(torch.isfinite(level).all()) for level in values)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_other_kinds_of_number_are_refused_by_name(backbone, dtype):
    for key, shape in (("noise", (4, 8, 8)), ("prompt_embeds", (1, 77, 96))):
        with pytest.raises(TypeError, match=f"{key} must be .*floating point.*{dtype}"):
            backbone(IMAGE, **{key: torch.zeros(shape).to(dtype)})
    with pytest.raises(TypeError, match=f"latents must be .*floating point.*{dtype}"):
        backbone.forward_latents(torch.zeros(1, 4, 8, 8).to(dtype))
    with pytest.raises(TypeError, match=f"floating point.*{dtype}"):
        backbone(torch.zeros(1, 3, 64, 64).to(dtype))


@pytest.mark.parametrize("timestep", [True, "51", 1j, [True], ["a"], {}, torch.tensor([True])])
def test_a_timestep_is_a_real_number(backbone, timestep):
    with pytest.raises(TypeError, match="timestep must be a real number"):
        backbone(IMAGE, timestep=timestep)


@pytest.mark.parametrize("timestep", [NAN, INF, 2**70, [NAN]])
@pytest.mark.parametrize("noise", ["fixed", "none"])
def test_a_timestep_is_finite(backbone, timestep, noise):
    with pytest.raises(ValueError, match="timestep must be finite"):
        backbone(IMAGE, timestep=timestep, noise=noise)


def test_scalars_of_numpy_are_numbers(backbone):
    import numpy as np

    expected = backbone(IMAGE, timestep=51, ensemble=2)[0]
    assert torch.equal(backbone(IMAGE, timestep=np.int64(51), ensemble=np.int32(2))[0], expected)
    for one_per_image in (np.array([51]), torch.tensor([51], dtype=torch.int16), [51], (np.int64(51),)):
        found = backbone(IMAGE, timestep=one_per_image, ensemble=2)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("key", ["ensemble", "chunk"])
@pytest.mark.parametrize("value", [True, 1.5, "2", 0, -1, 2**63])
def test_counts(backbone, key, value):
    with pytest.raises(ValueError, match=f"{key} must be an integer from 1 up"):
        backbone(IMAGE, **{key: value})


def test_other_settings_of_a_call(backbone):
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator, got int"):
        backbone(IMAGE, noise="random", generator=3)
    with pytest.raises(ValueError, match="noise must be 'fixed', 'random', 'none' or a tensor"):
        backbone(IMAGE, noise=[0.5])
    for indices in (True, ["0"], [0.5], "0", 1.0):
        with pytest.raises(ValueError, match="indices must be different positions from -1 to 0"):
            backbone(IMAGE, indices=indices)
    for size in (64, (64,), (64.5, 64), ("64", "64")):
        with pytest.raises(ValueError, match="size must be height and width in pixels, two integers"):
            backbone.forward_latents(torch.zeros(1, 4, 8, 8), size)


# Conditioning.


def merged(own: dict[str, Tensor], b: int = 1, tokens: int | None = None, **given: object) -> dict[str, Tensor]:
    values = ValueChecks()
    out = merge_conditioning(own, given, b, "net", values, tokens)
    values.read()
    return out


TEXT = {"prompt_embeds": torch.zeros(1, 5, 3), "prompt_attention_mask": torch.ones(1, 5)}


def test_embeddings_have_tokens(backbone):
    with pytest.raises(ValueError, match=r"prompt_embeds must have at least one token, got .*\(1, 0, 96\)"):
        backbone(IMAGE, prompt_embeds=torch.zeros(1, 0, 96))


@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.zeros(1, 5), ValueError, "must keep a token of every text"),
        (torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]), ValueError, "must keep a token of every text"),
        (torch.full((1, 5), 0.5), ValueError, "must be 1 for text and 0 for padding"),
        (torch.full((1, 5), -10000.0), ValueError, "must be 1 for text and 0 for padding"),
        (with_value(NAN, 1, 5), ValueError, "must be finite"),
        (torch.ones(1, 4), ValueError, "prompt_embeds has 5 tokens and prompt_attention_mask 4"),
        (torch.ones(1, 5, dtype=torch.complex64), TypeError, "of 0 and 1, got torch.complex64"),
        ("11111", TypeError, "must be a tensor, got str"),
    ],
)
def test_masks_are_of_0_and_1_and_keep_a_token(mask, error, words):
    with pytest.raises(error, match=words):
        merged(TEXT, 2 if getattr(mask, "shape", [1])[0] == 2 else 1, prompt_attention_mask=mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16])
def test_masks_of_every_kind_that_pipelines_give_are_taken(dtype):
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    assert torch.equal(merged(TEXT, prompt_attention_mask=mask.to(dtype))["prompt_attention_mask"], mask.float())


def test_longer_embeddings_bring_their_mask():
    longer = torch.zeros(1, 7, 3)
    with pytest.raises(ValueError, match="prompt_embeds has 7 tokens and prompt_attention_mask 5"):
        merged(TEXT, prompt_embeds=longer)
    assert merged(TEXT, prompt_embeds=longer, prompt_attention_mask=torch.ones(1, 7))["prompt_embeds"].shape == (
        1,
        7,
        3,
    )


def test_classes_are_integers_and_a_guidance_is_a_number():
    own = {"class_labels": torch.tensor([1000]), "guidance": torch.tensor([3.5])}
    for labels in (torch.tensor([3.7]), [True], torch.tensor([1 + 1j])):
        with pytest.raises(TypeError, match="class_labels must be a dense tensor of integers"):
            merged(own, class_labels=labels)
    taken = merged(own, guidance=4, class_labels=[3])
    assert (taken["class_labels"].tolist(), taken["guidance"].tolist()) == ([3], [4.0])
    with pytest.raises(ValueError, match="guidance must be finite"):
        merged(own, guidance=NAN)


def test_a_level_with_a_channel_for_each_token_takes_as_many():
    with pytest.raises(ValueError, match="has a channel for each of 5 tokens of the text.*got 4"):
        merged({"prompt_embeds": torch.zeros(1, 5, 3)}, tokens=5, prompt_embeds=torch.zeros(1, 4, 3))


# Devices.


def test_a_tensor_on_another_device_says_so(backbone):
    with pytest.raises(
        ValueError, match=r"images are on meta and tinysd_gdf is on cpu; bring them there with \.to\(\)"
    ):
        backbone(IMAGE.to("meta"))
    with pytest.raises(ValueError, match="latents are on meta and tinysd_gdf is on cpu"):
        backbone.forward_latents(torch.zeros(1, 4, 8, 8, device="meta"))
    empty = db.create_model("tinysd_gdf", device="meta")
    with pytest.raises(ValueError, match="images are on cpu and tinysd_gdf is on meta"):
        empty(IMAGE)
    assert empty(IMAGE.to("meta"))[0].is_meta


@pytest.mark.parametrize(
    ("call", "most"),
    [
        ({}, 1),
        ({"noise": torch.zeros(4, 8, 8), "prompt_embeds": torch.zeros(1, 77, 96)}, 2),
        ({"timestep": torch.tensor([51])}, 5),
    ],
)
def test_a_device_is_waited_for_no_more_than_before(backbone, call, most, monkeypatch):
    """It was three times for an image, and two more for timesteps: whatever reads a value of a tensor on a GPU."""
    read = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, original=original, name=name: read.append(name) or original(self)
        )
    backbone(IMAGE, **call)
    assert len(read) <= most, read


# Likely wrong, and told.


@pytest.mark.parametrize("name", ["symmetric", "imagenet", "uint8", "detectron2-bgr"])
def test_images_in_0_to_1_are_told(name):
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format=name, out_indices=[2])
    with pytest.warns(UserWarning, match="none of these is below 0 or above 1.*input_format='unit'"):
        backbone((IMAGE + 1) / 2)


@pytest.mark.parametrize(
    "x",
    [
        IMAGE,
        torch.zeros_like(IMAGE),  # a constant, as of padding
        torch.ones_like(IMAGE),  # white
        IMAGE * 0.25 + 0.7,  # bright: no pixel darker than 0.45
        torch.linspace(-0.02, 1, IMAGE.numel()).view_as(IMAGE),  # one of mid-grey to white
    ],
)
def test_ordinary_images_are_not(backbone, x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(x)


def test_pixels_of_0_and_1_as_integers_are_not():
    backbone = db.create_model("tinysd_gdf", pretrained=True, input_format="uint8", out_indices=[2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone(torch.arange(2, dtype=torch.uint8).repeat(1, 3, 64, 32))


def test_random_weights_are_told():
    with pytest.warns(RandomWeightsWarning, match="tinysd_gdf has random weights.*pretrained=True") as told:
        db.create_model("tinysd_gdf")
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        db.create_model("tinysd_gdf", pretrained=True)
        db.create_model("tinysd_gdf", device="meta")
        db.create_model("tinysd_gdf", trainable=True)
