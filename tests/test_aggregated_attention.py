"""``attn[up_cross]`` and its relatives: GDF's aggregated attention, beside stock networks that keep their weights."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from diffusers.models.attention_processor import Attention

import diffusion_backbones as db
from diffusion_backbones.cli import main
from diffusion_backbones.families import architecture
from diffusion_backbones.ops.truncation import count_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


class Keeping:
    """An attention processor that forms the probabilities as diffusers' own first one does, and keeps them."""

    def __init__(self, path: str, kept: list[tuple[str, torch.Tensor]]):
        self.path, self.kept = path, kept

    def __call__(self, attn: Attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            attn.head_to_batch_dim(to(x))
            for to, x in zip((attn.to_q, attn.to_k, attn.to_v), (hidden_states, text, text), strict=True)
        )
        mask = None if attention_mask is None else attention_mask.repeat_interleave(attn.heads, 0)
        weights = attn.get_attention_scores(q, k, mask)
        kind = "self" if encoder_hidden_states is None else "cross"
        self.kept.append((f"{self.path.partition('_')[0]}_{kind}", weights.unflatten(0, (-1, attn.heads)).mean(1)))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ v))


def reference(network, run, category, height, width, finest=16):
    """The steps that the reference describes: mean over heads, sizes of an image's 32nd to its ``finest``, mean over
    layers of a size, nearest enlargement to its 8th, one size behind another.
    """
    kept: list[tuple[str, torch.Tensor]] = []
    network.set_attn_processor({path: Keeping(path, kept) for path in network.attn_processors})
    with torch.no_grad():
        run(network)
    found: dict[int, list[torch.Tensor]] = {}
    for where, weights in kept:
        tokens = weights.shape[1]
        if where == category and height * width / 32**2 <= tokens <= height * width / finest**2:
            found.setdefault(tokens, []).append(weights)
    maps = []
    for tokens, layers in found.items():
        stride = round((height * width / tokens) ** 0.5)
        mean = torch.stack(layers).mean(0).mT.reshape(len(layers[0]), -1, height // stride, width // stride)
        maps.append(F.interpolate(mean, (height // 8, width // 8), mode="nearest"))
    return torch.cat(maps, 1)


CATEGORIES = {
    "sd15": ["down_cross", "up_cross", "down_self", "up_self"],
    "sdxl": ["down_cross", "mid_cross", "up_cross", "mid_self"],
}


@pytest.mark.parametrize("name", CATEGORIES)
def test_it_is_what_the_reference_describes_on_the_stock_network(name, tiny_folder):
    height, width = 128, 192
    ids = [f"attn[{category}]" for category in CATEGORIES[name]]
    backbone = db.create_model(name, recipe=["unet-out"], checkpoint_path=tiny_folder(name), noise="none")
    torch.manual_seed(1)
    z, text = torch.randn(2, 4, height // 8, width // 8), torch.randn(2, 77, tiny.CROSS)
    ours, added = {"prompt_embeds": text}, {}
    if name == "sdxl":
        ours["pooled_prompt_embeds"] = torch.randn(2, tiny.POOLED)
        size = torch.tensor([[height, width, 0, 0, height, width]] * 2, dtype=torch.float32)
        added = {"added_cond_kwargs": {"text_embeds": ours["pooled_prompt_embeds"], "time_ids": size}}
    acts = backbone.forward_activations(None, ids, latents=z, timestep=50, **ours)
    unet = tiny.build(name)["unet"]
    for activation, category in zip(ids, CATEGORIES[name], strict=True):
        right = reference(unet, lambda net: net(z, 50, encoder_hidden_states=text, **added), category, height, width)
        assert acts[activation].shape == right.shape
        torch.testing.assert_close(acts[activation], right, rtol=1e-4, atol=1e-4)
    assert acts["attn[up_cross]"].shape == (2, 154, 16, 24), "two sizes with 77 tokens each"


def test_a_transformer_is_one_direction_and_the_padding_of_its_text_is_masked(tiny_folder):
    backbone = db.create_model(
        "pixart_sigma_1024", recipe=["attn[up_cross]"], checkpoint_path=tiny_folder("pixart_sigma_1024")
    )
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == ([300], [8])
    torch.manual_seed(1)
    z, text = torch.randn(1, 4, 16, 24), torch.randn(1, 300, tiny.T5["d_model"])
    mask = (torch.arange(300) < 9).float()[None]
    [level] = backbone.forward_latents(z, noise="none", timestep=50, prompt_embeds=text, prompt_attention_mask=mask)
    network = tiny.build("pixart_sigma_1024")["transformer"]
    run = lambda net: net(  # noqa: E731
        z,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        timestep=torch.tensor([50]),
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    )
    kept: list[tuple[str, torch.Tensor]] = []
    network.set_attn_processor({path: Keeping("up", kept) for path in network.attn_processors})
    with torch.no_grad():
        run(network)
    right = torch.stack([weights for where, weights in kept if weights.shape[-1] == 300]).mean(0)
    right = F.interpolate(right.mT.reshape(1, 300, 8, 12), (16, 24), mode="nearest")
    torch.testing.assert_close(level, right, rtol=1e-4, atol=1e-4)
    assert (level[:, 9:] == 0).all()


def test_it_is_a_level_of_any_recipe(tiny_folder, tmp_path, photo):
    """At any size, beside other activations, saved, folded, in bfloat16, in parts, with a card."""
    recipe = db.Recipe(
        "mine", (("up-level3-repeat0-vit-block0-self-k", "attn[up_cross]"), "up-level1-repeat1-vit-block0-cross-q")
    )
    backbone = db.create_model("sd15", recipe=recipe, checkpoint_path=tiny_folder("sd15"))
    x = photo[..., :90, :130]
    fine, coarse = backbone(x)
    assert (fine.shape, coarse.shape) == ((1, 16 + 154, 12, 17), (1, 64, 3, 5))
    weights = fine[:, 16:].unflatten(1, (2, 77)).sum(2)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    [alone] = backbone.forward_activations(x, ["attn[up_cross]"], as_maps=True).values()
    assert torch.equal(alone, fine[:, 16:])
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")
    assert all(torch.equal(a, b) for a, b in zip(saved(x), (fine, coarse), strict=True))
    assert "attn[up_cross]" in (tmp_path / "README.md").read_text()
    folded = db.create_model("sd15", recipe=recipe, checkpoint_path=tiny_folder("sd15"), fold=True)
    torch.testing.assert_close(folded(x)[0], fine, rtol=1e-5, atol=1e-5)
    one_by_one = backbone(torch.cat([x, x]), chunk=1)
    torch.testing.assert_close(one_by_one[0][1:], fine, rtol=1e-4, atol=1e-5)
    half = db.create_model("sd15", recipe=recipe, checkpoint_path=tiny_folder("sd15"), dtype="bfloat16")(x)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[:, 16:].float(), fine[:, 16:], rtol=0.1, atol=0.02)


def test_it_is_exported_for_any_height_and_width(photo):
    backbone = db.create_model("tinysd", pretrained=True, recipe=["attn[up_cross]"])
    h, w = (torch.export.Dim(name, min=2, max=16) for name in "hw")
    shapes = {"x": {2: 64 * h, 3: 64 * w}}
    program = torch.export.export(backbone, (photo[..., :128, :192].contiguous(),), dynamic_shapes=shapes, strict=False)
    other = photo[..., :256, :128].contiguous()
    torch.testing.assert_close(program.module()(other)[0], backbone(other)[0], rtol=1e-5, atol=1e-5)


def test_the_network_is_cut_behind_the_last_layer_that_takes_part():
    """Nothing finer than stride 16 takes part, so that the last level of SD 1.5 is left out, and with it VPD's."""
    kept = db.create_model("sd15", recipe=["attn[up_cross]"], device="meta").denoiser
    last = db.create_model("sd15", recipe=["up-level2-repeat2-vit-block0-cross-map"], device="meta").denoiser
    assert count_parameters(kept) == count_parameters(last)
    down = db.create_model("sd15", recipe=["attn[down_cross]"], device="meta")
    assert count_parameters(down.denoiser) < count_parameters(kept)
    with pytest.raises(KeyError, match=r"sd15 has 'attn\[up_cross\]', but .* is cut behind"):
        down.forward_activations(torch.empty(1, 3, 64, 64, device="meta"), ["attn[up_cross]"])


@pytest.mark.parametrize(
    ("name", "category", "error", "said"),
    [
        ("sd15", "mid_cross", KeyError, r"sd15 has no activation 'attn\[mid_cross\]'. The closest it has: .*attn\["),
        ("sd15", "up", ValueError, r"'attn\[up\]' is not an activation id.*attn\[up_cross\]"),
        ("sd15", "up_self", ValueError, r"attn\[up_self\] is an attention map .* whose keys are places"),
        ("ddpm_cifar10_32", "up_cross", KeyError, "has no activation"),
        ("dit_xl_256", "up_cross", KeyError, "has no activation"),
    ],
)
def test_what_is_no_level_is_refused(name, category, error, said):
    with pytest.raises(error, match=said):
        db.create_model(name, recipe=[f"attn[{category}]"], device="meta")


def test_a_prompt_of_another_length_is_refused_where_tokens_are_channels(tiny_folder):
    backbone = db.create_model("sd15", recipe=["attn[up_cross]"], checkpoint_path=tiny_folder("sd15"))
    with pytest.raises(ValueError, match="has a channel for each of 77 tokens"):
        backbone(torch.zeros(1, 3, 64, 64), prompt_embeds=torch.zeros(5, tiny.CROSS))


def test_ids_are_found_and_listed_beyond_the_others():
    catalogue = architecture(db.get_checkpoint("sdxl")).catalogue
    assert "attn[up_cross]" in catalogue
    assert "attn[up_cross]" not in list(catalogue)
    assert [site.id for site in catalogue.find("attn[up_cross]", extensions=True)] == ["attn[up_cross]"]
    listed = CliRunner().invoke(main, ["activations", "sdxl", "attn*", "--all", "--size", "1024", "--json"])
    shapes = {row["id"]: row["shape"] for row in json.loads(listed.stdout)}
    assert shapes["attn[up_cross]"] == [154, 128, 128]
    assert shapes["attn[mid_self]"] == [1024, 128, 128]
