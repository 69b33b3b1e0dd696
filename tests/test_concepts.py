"""Concepts: where words are in images, beside stock networks whose own attention tells its weights."""

from __future__ import annotations

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diffusers.models.attention_processor import Attention
from PIL import Image
from transformers import AutoTokenizer

import diffusion_backbones as db
from diffusion_backbones.cli import main
from diffusion_backbones.families import architecture
from diffusion_backbones.loading.prompts import Prompter
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.spec.concepts import filled, placed

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["cat", "snowboard"]


def whole(name, folder, **settings):
    return db.create_model(name, checkpoint_path=folder, truncate=False, **settings)


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
            self.kept.append((self.path, weights.unflatten(0, (-1, attn.heads))))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def daam(kept, tokens: list[list[int]], height: int, width: int) -> torch.Tensor:
    """DAAM's steps: of every head on the way down and up a map for each token, enlarged to the latents bicubically and
    without undershoots; their mean, and the mean over the tokens of a word.
    """
    maps = []
    for path, weights in kept:
        stride = round((height * width / weights.shape[2]) ** 0.5)
        if not path.startswith("mid_block") and stride != 8:
            for head in weights.unbind(1):
                small = head.mT.reshape(len(head), -1, height // stride, width // stride)
                maps.append(F.interpolate(small, (height, width), mode="bicubic").clamp(min=0))
    mean = torch.stack(maps).mean(0)
    return torch.stack([mean[:, some].mean(1) for some in tokens], 1)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_unet_is_read_as_daam_reads_it(name, tiny_folder):
    backbone = whole(name, tiny_folder(name), recipe=["unet-out"], noise="none", timestep=50)
    words = CLIP(tiny_folder(name) / "tokenizer")
    prompt = "A Cat on a snowboard beside a cat"
    pieces = words.tokenize(prompt.lower())
    tokens = [
        [1 + i + j for i in range(len(pieces)) if pieces[i : i + len(own)] == own for j in range(len(own))]
        for own in (words.tokenize(word) for word in WORDS)
    ]
    assert all(len(some) >= 2 for some in tokens), "the cat is there twice, and the board is in pieces"
    networks, (h, w) = tiny.build(name), (16, 24)
    torch.manual_seed(1)
    z, kept = torch.randn(2, 4, h, w), []
    given = backbone.prompter([prompt])
    text, added = given["prompt_embeds"].expand(2, -1, -1), {}
    if name == "sd15":
        ids = words([prompt], padding="max_length", max_length=77, return_tensors="pt").input_ids
        torch.testing.assert_close(networks["text_encoder"](ids)[0].expand(2, -1, -1), text, rtol=1e-4, atol=1e-4)
    else:
        size = torch.tensor([[8.0 * h, 8 * w, 0, 0, 8 * h, 8 * w]] * 2)
        added = {"added_cond_kwargs": {"text_embeds": given["pooled_prompt_embeds"].expand(2, -1), "time_ids": size}}
    networks["unet"].set_attn_processor({path: Keeping(path, kept) for path in networks["unet"].attn_processors})
    with torch.no_grad():
        networks["unet"](z, 50, encoder_hidden_states=text, **added)
    right = daam(kept, tokens, h, w)
    raw = backbone.concepts(None, WORDS, prompt=prompt, raw=True, latents=z)
    assert raw.shape == (2, 2, h, w)
    torch.testing.assert_close(raw, right, rtol=1e-4, atol=1e-6)
    low, high = right.amin((2, 3), keepdim=True), right.amax((2, 3), keepdim=True)
    found = backbone.concepts(None, WORDS, prompt=prompt, latents=z)
    torch.testing.assert_close(found, (right - low) / (high - low), rtol=1e-3, atol=1e-3)
    one_by_one = backbone.concepts(None, WORDS, prompt=prompt, raw=True, latents=z, chunk=1)
    torch.testing.assert_close(one_by_one, right, rtol=1e-4, atol=1e-6)


def CLIP(folder):  # noqa: N802
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder)


def stock_weights(monkeypatch, run) -> list[torch.Tensor]:
    """Mean over heads of the attention of every layer that a network runs."""
    kept: list[torch.Tensor] = []

    def attend(query, key, value, attn_mask=None, *_, **__):
        assert attn_mask is None
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        kept.append(weights.mean(1))
        return weights @ value

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(F, "scaled_dot_product_attention", attend)
        run()
    return kept


def seg4diff(layers, lengths: list[int], begin: int, h: int, w: int) -> torch.Tensor:
    """Seg4Diff's steps: the mean over layers of the attention from image to text, and over the tokens of every name in
    a prompt of names.
    """
    mean, maps = torch.stack(layers).mean(0), []
    for length in lengths:
        maps.append(mean[..., begin : begin + length].mean(-1).reshape(len(mean), h, w))
        begin += length
    return torch.stack(maps, 1)


def test_sd3_is_read_as_seg4diff_reads_it(tiny_folder, monkeypatch):
    folder = tiny_folder("sd3_medium")
    backbone = whole("sd3_medium", folder, recipe=["vit-block23-out"], noise="none", timestep=515)
    words = CLIP(folder / "tokenizer")
    network, (h, w) = tiny.build("sd3_medium")["transformer"], (8, 12)
    torch.manual_seed(1)
    z, n = torch.randn(2, 16, 2 * h, 2 * w), h * w
    given = {key: value.expand(2, *value.shape[1:]) for key, value in backbone.prompter([" ".join(WORDS)]).items()}
    run = lambda: network(  # noqa: E731
        z, given["prompt_embeds"], given["pooled_prompt_embeds"], torch.full((2,), 515.0), return_dict=False
    )
    layers = [weights[:, :n, n:] for weights in stock_weights(monkeypatch, run)]
    assert len(layers) == 24
    lengths = [len(words(word).input_ids) - 2 for word in WORDS]
    raw = backbone.concepts(None, WORDS, raw=True, latents=z)
    torch.testing.assert_close(raw, seg4diff(layers, lengths, 1, h, w), rtol=1e-4, atol=1e-6)
    ninth = backbone.concepts(None, WORDS, raw=True, latents=z, layers=["vit-block9-cross-map"])
    torch.testing.assert_close(ninth, seg4diff(layers[9:10], lengths, 1, h, w), rtol=1e-4, atol=1e-6)


def test_flux_is_read_as_seg4diff_reads_it(tiny_folder, monkeypatch):
    folder = tiny_folder("flux_schnell")
    backbone = whole("flux_schnell", folder, recipe=["vit-block3-out"], noise="none", timestep=500)
    names = ["cat", "house", "red tree"]
    words = AutoTokenizer.from_pretrained(folder / "tokenizer_2")
    network, (h, w) = tiny.build("flux_schnell")["transformer"], (4, 6)
    torch.manual_seed(1)
    z, n = torch.randn(1, 16, 2 * h, 2 * w), h * w
    given = backbone.prompter([" ".join(names)])
    run = lambda: network(  # noqa: E731
        diffusers.FluxPipeline._pack_latents(z, 1, 16, 2 * h, 2 * w),
        encoder_hidden_states=given["prompt_embeds"],
        pooled_projections=given["pooled_prompt_embeds"],
        timestep=torch.tensor([0.5]),
        img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32),
        txt_ids=torch.zeros(256, 3),
        return_dict=False,
    )
    layers = [weights[:, -n:, :-n] for weights in stock_weights(monkeypatch, run)]
    lengths = [len(words(name).input_ids) - 1 for name in names]
    raw = backbone.concepts(None, names, raw=True, latents=z)
    torch.testing.assert_close(raw, seg4diff(layers, lengths, 0, h, w), rtol=1e-4, atol=1e-6)


def test_a_recipe_that_reads_a_text_is_asked_at_its_own_layer(tiny_folder, photo):
    """At any size, and without the blocks behind it."""
    cut = db.create_model("sd3_medium_seg4diff", checkpoint_path=tiny_folder("sd3_medium"))
    x = photo[..., :90, :130]
    found = cut.concepts(x, WORDS, prompt="a photo of a {}")
    assert found.shape == (1, 2, 6, 9)
    assert (found.amin((2, 3)) == 0).all()
    torch.testing.assert_close(found.amax((2, 3)), torch.ones(1, 2))
    raw = cut.concepts(x, "cat", prompt="a photo of a cat", raw=True)
    tokens = CLIP(tiny_folder("sd3_medium") / "tokenizer").tokenize("a photo of a cat")
    length = len(CLIP(tiny_folder("sd3_medium") / "tokenizer").tokenize("cat"))
    [level] = cut(x, prompt="a photo of a cat")
    torch.testing.assert_close(raw[:, 0], level[:, 1 + len(tokens) - length : 1 + len(tokens)].mean(1))
    with pytest.raises(ValueError, match=r"is cut behind .*truncate=False, or give layers= that it has"):
        cut.concepts(x, "cat", layers=["vit-block20-cross-map"])


def test_labels_fill_the_template_of_a_prompt(tiny_folder):
    backbone = db.create_model("sd15_legacy", checkpoint_path=tiny_folder("sd15"), prompt="a photo of a {}")
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    right = backbone(x, prompt=["a photo of a cat", "a photo of a dog"])
    for labels, prompt in ((["cat", "dog"], None), (["cat", "dog"], "a photo of a {}")):
        assert all(map(torch.equal, backbone(x, labels=labels, prompt=prompt), right))
    assert all(map(torch.equal, backbone(x, labels="cat"), backbone(x, prompt="a photo of a cat")))
    for unfilled in ({}, {"prompt": ["a cat", "a photo of a {}"]}):
        with pytest.raises(ValueError, match="prompt='a photo of a {}' has a place for a label; give labels="):
            backbone(x, **unfilled)
    with pytest.raises(ValueError, match="labels must be one string or 2, one per image; got 3"):
        backbone(x, labels=["cat", "dog", "cow"])
    with pytest.raises(TypeError, match="labels must be a string or a list of strings, got 7"):
        backbone(x, labels=7)
    with pytest.raises(TypeError, match="with labels, prompt must be one string"):
        backbone(x, labels="cat", prompt=["a {}", "the {}"])
    with pytest.raises(ValueError, match=r"prompt='a photo' must have one \{\}"):
        backbone(x, labels="cat", prompt="a photo")
    with pytest.raises(TypeError, match="give either labels= or prompt_embeds, not both"):
        backbone(x, labels="cat", prompt_embeds=torch.zeros(77, tiny.CROSS))


@pytest.mark.parametrize(
    ("words", "prompt", "error", "said"),
    [
        ([], None, ValueError, r"at least one word, and none empty, got \[\]"),
        ("", None, ValueError, "at least one word, and none empty, got ''"),
        (["cat", " "], None, ValueError, "none empty"),
        ([7], None, TypeError, r"concepts must be strings.*got \[7\]"),
        (None, None, TypeError, "concepts must be strings.*got None"),
        (["cat", "cat"], None, ValueError, "the concept 'cat' is there twice"),
        (["cat", "sky"], "a cat", ValueError, "the concept 'sky' is not in prompt='a cat'; put it there, or a {}"),
        (["cat"], "concatenate", ValueError, "the concept 'cat' is not in"),
        (["cat"], "{} and {}", ValueError, "must have one {}"),
        (["cat"], ["a cat"], TypeError, "prompt must be one string"),
        (
            [f"cat {i}" for i in range(60)],
            None,
            ValueError,
            r"the concept 'cat \d+' is cut off: the text has \d+ tokens",
        ),
        (["cat"], "dog " * 80 + "cat", ValueError, r"the concept 'cat' is cut off: .* and the network takes 77"),
    ],
)
def test_what_are_no_concepts_is_refused(words, prompt, error, said, tiny_folder):
    backbone = db.create_model("sd3_medium_seg4diff", checkpoint_path=tiny_folder("sd3_medium"))
    with pytest.raises(error, match=said):
        backbone.concepts(torch.zeros(1, 3, 64, 64), words, prompt=prompt)


def test_networks_without_a_text_or_a_text_encoder_say_so(tiny_folder, tmp_path):
    x = torch.zeros(1, 3, 64, 64)
    classes = db.create_model("dit_xl_256_ddae", checkpoint_path=tiny_folder("dit_xl_256"))
    with pytest.raises(ValueError, match="does not look at a text, so it has no concepts; .*such as those of sd15"):
        classes.concepts(x, "cat")
    backbone = db.create_model("sd15_gdf", checkpoint_path=tiny_folder("sd15"))
    with pytest.raises(ValueError, match=r"sd15_gdf is cut behind .*; build it with truncate=False"):
        backbone.concepts(x, "cat")
    with pytest.raises(ValueError, match="is no attention to the text; name ids that end in cross-map"):
        backbone.concepts(x, "cat", layers=["up-level1-repeat2-res-out"])
    recipe = ["up-level1-repeat1-vit-block0-cross-map"]
    alone = db.create_model("sd15", recipe=recipe, checkpoint_path=tiny_folder("sd15"))
    assert alone.concepts(x, "cat").shape == (1, 1, 8, 8)
    saved = db.create_model(f"local-dir:{alone.save_pretrained(tmp_path)}")
    with pytest.raises(FileNotFoundError, match="needs a text encoder, and this backbone has none"):
        saved.concepts(x, "cat")
    folded = db.create_model("sd15", recipe=recipe, checkpoint_path=tiny_folder("sd15"), fold=True)
    with pytest.raises(TypeError, match="fold=True.*a call cannot change prompt"):
        folded.concepts(x, "cat")


def test_places_in_a_prompt():
    assert placed(["cat", "green grass"], None) == ("cat green grass", {"cat": [(0, 3)], "green grass": [(4, 15)]})
    assert placed(["cat"], " a photo of a {}. ") == ("a photo of a cat.", {"cat": [(13, 16)]})
    assert placed(["cat"], "Cat, cats and a CAT") == ("Cat, cats and a CAT", {"cat": [(0, 3), (16, 19)]})
    assert filled("a {}", ["cat", "dog"], 2) == ["a cat", "a dog"]


def test_the_command_line_draws_them(tiny_folder, tmp_path, photo):
    image, out = tmp_path / "photo.png", tmp_path / "out.png"
    Image.fromarray((photo[0, :, :90, :130] * 127.5 + 127.5).byte().permute(1, 2, 0).numpy()).save(image)
    given = ["concepts", "sd15_gdf", str(image), "cat", "green grass", "-o", str(out)]
    result = CliRunner().invoke(main, [*given, "--checkpoint-path", str(tiny_folder("sd15")), "--prompt", "a {}"])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["cat", "green grass", str(out)]
    assert Image.open(out).width > 3 * 300
    wrong = CliRunner().invoke(main, [*given[:-1], str(tmp_path / "out.txt")])
    assert wrong.exit_code == 2
    assert "must end in one of" in wrong.stderr


@pytest.mark.parametrize("name", ["sd15", "qwen_image", "z_image_turbo", "lumina_image_2"])
def test_a_word_is_where_another_word_first_changes_the_text(name, tiny_folder):
    """In encoders that read from left to right, whatever stands around the prompt."""
    network = architecture(db.get_checkpoint(name), tiny.configs(name))
    prompter = Prompter(network, Folder(tiny_folder(name)), "max_length")
    cat, dog = (prompter([f"a photo of a {noun} here"])["prompt_embeds"][0] for noun in ("cat", "dog"))
    [rows] = prompter.rows("a photo of a cat here", {"cat": [(13, 16)]})
    changed = (cat - dog).abs().amax(1).gt(1e-5).nonzero()
    assert rows[0] == changed[0]
    assert rows == tuple(range(rows[0], rows[-1] + 1))


@pytest.mark.parametrize("name", ["flux2_dev", "sana_1600m_1024"])
def test_networks_that_are_given_an_instruction_say_so(name):
    backbone = db.create_model(name, recipe=["vit-block0-out"], device="meta")
    with pytest.raises(ValueError, match="is given an instruction before the words, so it has no concepts"):
        backbone.concepts(torch.empty(1, 3, 64, 64, device="meta"), "cat")
