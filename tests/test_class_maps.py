"""Maps of classes as channels, as VPD reads them, beside the stock network with processors that keep their weights."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention
from transformers import CLIPTokenizerFast

import diffusion_backbones as db

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ("cat", "snowboard", "green grass")
TEMPLATE = "a photo of a {}"
LEVELS = (
    "up-level3-repeat2-vit-out",
    ("up-level2-repeat1-vit-out", "attn[cross@16]"),
    ("up-level1-repeat1-vit-out", "attn[cross@32]"),
    "up-level0-repeat1-res-out",
)
VPD = db.Recipe("maps", LEVELS, timestep=1, noise="none", scaled=False, prompt=TEMPLATE, classes=CLASSES)


class Keeping:
    """An attention processor that forms probabilities as diffusers' own first one does, and keeps those of a text."""

    def __init__(self, path: str, kept: list[tuple[str, torch.Tensor]]):
        self.path, self.kept = path, kept

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        layers = ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        q, k, v = (attn.head_to_batch_dim(layer(x)) for layer, x in layers)
        weights = attn.get_attention_scores(q, k, attention_mask)
        if encoder_hidden_states is not None:
            self.kept.append((self.path, weights.unflatten(0, (-1, attn.heads)).mean(1)))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def stock_tokens(folder, prompts: list[str]) -> torch.Tensor:
    """The state of CLIP at the end of every text, which its own pooling takes."""
    words = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        rows = [tiny.build("sd15")["text_encoder"](words([p], return_tensors="pt").input_ids) for p in prompts]
    return torch.stack([row.pooler_output[0] for row in rows])[None]


def vpd(z: torch.Tensor, text: torch.Tensor) -> dict[int, torch.Tensor]:
    """VPD's steps: means over heads, and over all layers on the way down and up of a size. By stride."""
    unet, kept, (h, w) = tiny.build("sd15")["unet"], [], z.shape[-2:]
    unet.set_attn_processor({path: Keeping(path, kept) for path in unet.attn_processors})
    with torch.no_grad():
        unet(z, 1, encoder_hidden_states=text.expand(len(z), -1, -1))
    maps = {}
    for stride in (8, 16, 32):
        n = (h * 8 // stride) * (w * 8 // stride)
        layers = [
            weights for path, weights in kept if weights.shape[1] == n and path.startswith(("down_blocks", "up_blocks"))
        ]
        assert len(layers) == 5, "two on the way down and three on the way up"
        maps[stride] = torch.stack(layers).mean(0).mT.reshape(len(z), -1, h * 8 // stride, w * 8 // stride)
    return maps


def test_a_class_is_a_token_and_a_channel_as_in_vpd(tiny_folder):
    folder = tiny_folder("sd15")
    backbone = db.create_model("sd15", recipe=VPD, checkpoint_path=folder)
    text = stock_tokens(folder, [TEMPLATE.format(name) for name in CLASSES])
    torch.testing.assert_close(backbone.conditioning.prompt_embeds, text, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    z = torch.randn(2, 4, 16, 24)
    right = vpd(z, text)
    levels = backbone.forward_latents(z)
    assert backbone.feature_info.channels() == [level.shape[1] for level in levels] == [16, 32 + 3, 64 + 3, 64]
    assert backbone.feature_info.reduction() == [8, 16, 32, 64]
    for level, stride in ((levels[1], 16), (levels[2], 32)):
        torch.testing.assert_close(level[:, -3:], right[stride], rtol=1e-4, atol=1e-5)
    whole = db.create_model("sd15", recipe=VPD, checkpoint_path=folder, truncate=False)
    [fine] = whole.forward_activations(None, ["attn[cross@8]"], latents=z).values()
    torch.testing.assert_close(fine, right[8], rtol=1e-4, atol=1e-5)


def test_a_prompt_has_a_channel_for_each_of_its_tokens_as_in_tadp(tiny_folder):
    """Every image has its own caption."""
    folder, captions = tiny_folder("sd15"), ["a cat on a snowboard", "green grass"]
    backbone = db.create_model("sd15", recipe=["attn[cross@16]"], checkpoint_path=folder, noise="none", timestep=1)
    assert backbone.feature_info.channels() == [77]
    z = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(1))
    words = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    ids = words(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        text = tiny.build("sd15")["text_encoder"](ids)[0]
    [level] = backbone.forward_latents(z, prompt=captions)
    torch.testing.assert_close(level, vpd_of_each(z, text), rtol=1e-4, atol=1e-5)


def vpd_of_each(z: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return torch.cat([vpd(image[None], row[None])[16] for image, row in zip(z, text, strict=True)])


def test_a_call_may_have_its_own_classes_or_template(tiny_folder, photo):
    folder = tiny_folder("sd15")
    backbone = db.create_model("sd15", recipe=VPD, checkpoint_path=folder)
    x = torch.cat([photo[..., :90, :130], photo[..., 64:154, 32:162]])
    mine, others = list(CLASSES), ["dog", "sky", "red tree"]
    both = backbone(x, labels=[mine, others])
    assert [tuple(level.shape) for level in both] == [
        (2, 16, 12, 17),
        (2, 35, 6, 9),
        (2, 67, 3, 5),
        (2, 64, 2, 3),
    ]
    asked = db.create_model("sd15", recipe=VPD, checkpoint_path=folder, classes=others)
    for level, first, second in zip(both, backbone(x), asked(x), strict=True):
        torch.testing.assert_close(level, torch.stack([first[0], second[1]]), rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, backbone(x, labels=others), asked(x)))
    text = stock_tokens(folder, [f"some {name}" for name in CLASSES])
    other_words = zip(backbone(x, prompt="some {}"), backbone(x, prompt_embeds=text), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in other_words)


def test_classes_are_saved_folded_trained_and_on_the_card(tiny_folder, photo, tmp_path):
    folder = tiny_folder("sd15")
    backbone = db.create_model("sd15", recipe=VPD, checkpoint_path=folder)
    x = photo[..., :90, :130]
    levels = backbone(x)
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")
    assert saved.declaration.recipe == backbone.declaration.recipe
    assert all(map(torch.equal, saved(x), levels))
    assert "one token for each of 3 classes: cat, snowboard, green grass" in (tmp_path / "README.md").read_text()
    with pytest.raises(FileNotFoundError, match="needs a text encoder, and this backbone has none"):
        saved(x, labels=["dog", "sky", "red tree"])
    folded = db.create_model("sd15", recipe=VPD, checkpoint_path=folder, fold=True)
    for ours, level in zip(folded(x), levels, strict=True):
        torch.testing.assert_close(ours, level, rtol=1e-4, atol=1e-5)
    tuned = db.create_model("sd15", recipe=VPD, checkpoint_path=folder, trainable="prompt")
    tuned(x)[1][:, -3:].square().sum().backward()
    [learned] = [p for p in tuned.parameters() if p.requires_grad]
    assert learned.shape == (1, 3, tiny.CROSS)
    assert learned.grad.abs().amax(-1).gt(0).all()


def test_a_recipe_of_classes_is_written_and_read_and_one_without_is_as_it_was(tmp_path):
    VPD.to_yaml(tmp_path / "maps.yaml")
    assert db.Recipe.from_file(tmp_path / "maps.yaml") == VPD
    assert VPD.digest != VPD.override(classes=CLASSES[:2]).digest
    for recipe in (VPD.override(classes=()), VPD.override(classes=(), timesteps=(1, 50))):
        assert "classes" not in recipe.to_dict()
    network = db.create_model("sd15", recipe=VPD, device="meta")
    assert network.feature_info.channels() == [320, 640 + 3, 1280 + 3, 1280]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": ("cat", " ")}, r"recipe 'maps': classes must be names, and one is empty"),
        ({"classes": ("cat", "cat")}, "the class 'cat' is there twice"),
        ({"prompt": ""}, r"with classes, prompt must have one \{\} where they go, got ''"),
        ({"prompt": "{} and {}"}, r"must have one \{\}"),
        ({"classes": "cat"}, "classes"),
        ({"classes": (7,)}, "classes"),
    ],
)
def test_what_are_no_classes_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        VPD.override(**settings)


def test_labels_that_do_not_fit_are_refused(tiny_folder):
    backbone, x = db.create_model("sd15", recipe=VPD, checkpoint_path=tiny_folder("sd15")), torch.zeros(2, 3, 64, 64)
    with pytest.raises(ValueError, match="labels must be 3 strings, one per class, or 2 lists of them, .* got 2"):
        backbone(x, labels=["cat", "dog"])
    with pytest.raises(ValueError, match="got 3 and 3 and 3"):
        backbone(x, labels=[list(CLASSES)] * 3)
    with pytest.raises(TypeError, match="labels must be 3 strings, or a list of as many for each image, got 'cat'"):
        backbone(x, labels="cat")
    with pytest.raises(ValueError, match=r"prompt='a cat' must have one \{\}"):
        backbone(x, prompt="a cat")
    with pytest.raises(ValueError, match="has a channel for each of 3 tokens"):
        backbone(x, prompt_embeds=torch.zeros(4, tiny.CROSS))
    with pytest.raises(ValueError, match="reads no prompt but its classes, whose maps are levels"):
        backbone.concepts(x, "cat")


@pytest.mark.parametrize(
    "name", ["sdxl", "deepfloyd_if_xl", "flux_schnell", "pixart_sigma_1024", "dit_xl_256", "ddpm_cifar10_32"]
)
def test_networks_whose_text_is_no_single_clip_say_so(name):
    last = "unet-out" if name in ("sdxl", "deepfloyd_if_xl", "ddpm_cifar10_32") else "vit-block0-out"
    classes = db.Recipe("maps", (last,), prompt="{}", classes=("cat",))
    with pytest.raises(ValueError, match=f"{name} takes no classes, which are tokens of one CLIP"):
        db.create_model(name, recipe=classes, device="meta")


def test_transformers_have_the_map_of_all_their_blocks():
    backbone = db.create_model("sd3_medium", recipe=["attn[cross@16]"], device="meta")
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([77 + 256], [16])
