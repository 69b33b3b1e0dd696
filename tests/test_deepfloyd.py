"""DeepFloyd IF: a U-Net on pixels whose attention runs over T5's keys and the image's at once."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DDPMScheduler, IFPipeline
from oracle import Oracle
from torch import nn

import diffusion_backbones as db
from diffusion_backbones import Recipe
from diffusion_backbones.families import FAMILIES, architecture, meta_trace, upstream
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import safetensors_io
from diffusion_backbones.ops.truncation import Bypass, count_parameters
from diffusion_backbones.spec.configs import package_configs
from diffusion_backbones.spec.recipe import Level

pytestmark = pytest.mark.usefixtures("costs_not_measured")

NAME = "deepfloyd_if_xl"
RESIDUAL, SAMPLERS, ATTENDED = 2 * (3 * 4 + 2 + 4 * 4), 2 * 3, 3 * 3 + 1 + 3 * 4


class Stock(Oracle):
    """The stock network, whose attention has no transformer around it and text keys before the image's."""

    def __init__(self, unet):
        super().__init__(unet, plain=True)

    def __getitem__(self, activation):
        return (
            super().__getitem__(activation.replace("-cross-map", "-self-map"))[..., self.keys(activation)]
            if activation.endswith("-map")
            else super().__getitem__(activation)
        )

    def keys(self, activation):
        return slice(0, 77) if activation.endswith("cross-map") else slice(77, None)

    def heads(self, where, *names):
        """(B, heads, keys, d): what the projections of a layer give, one after another."""
        heads = self.unet.get_submodule(where).heads
        return torch.cat(
            [self.outputs[f"{where}.{name}"].unflatten(-1, (heads, -1)).transpose(1, 2) for name in names], 2
        )

    def _map(self, where):
        q, k = self.heads(where, "to_q"), self.heads(where, "add_k_proj", "to_k")
        return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint with norms and biases that are not one and zero, which would hide mistakes."""
    path = tiny.folder(NAME, tmp_path_factory.mktemp(NAME))
    unet = stock(None)
    unet.save_pretrained(path / "unet")
    return path


def stock(path):
    unet = tiny.build(NAME)["unet"]
    torch.manual_seed(5)
    for p in unet.parameters():
        if p.ndim < 2:
            nn.init.normal_(p, mean=0.3, std=0.3)
    return unet


def noisy(backbone, x, timestep):
    scheduler = DDPMScheduler.from_config(package_configs(db.get_checkpoint(NAME))["scheduler"])
    return scheduler.add_noise(x, backbone.canvas[:, :, : x.shape[2], : x.shape[3]], torch.tensor(timestep))


@pytest.mark.parametrize("size", [(32, 32), (32, 48)], ids=["square", "wide"])
@pytest.mark.parametrize("timestep", [50, 261])
def test_every_activation_is_that_of_the_stock_network(timestep, size, folder):
    backbone = db.create_model(NAME, recipe=["unet-out"], checkpoint_path=folder, timestep=timestep)
    sites = backbone.catalogue.all()
    extensions = [site.id for site in sites if site.id not in list(backbone.catalogue)]
    assert len(sites) - len(extensions) == 3 + RESIDUAL + SAMPLERS + 6 * ATTENDED
    assert all(activation.endswith("res-in") for activation in extensions)
    assert len(extensions) == sum(
        activation.startswith("up") and activation.endswith("res-out") for activation in backbone.catalogue
    )
    torch.manual_seed(1)
    x, text = torch.rand(2, 3, *size) * 2 - 1, torch.randn(2, 77, tiny.T5["d_model"])
    oracle = Stock(stock(folder))
    oracle(noisy(backbone, x, timestep), timestep, encoder_hidden_states=text)
    acts = backbone.forward_activations(x, [site.id for site in sites], prompt_embeds=text)
    maps = backbone.forward_activations(
        x, [site.id for site in sites if site.layout != "attention"], prompt_embeds=text, as_maps=True
    )
    for site in sites:
        torch.testing.assert_close(
            acts[site.id],
            oracle[site.id],
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, activation=site.id: f"{activation}: {text}",
        )
        n = size[0] // site.stride * (size[1] // site.stride)
        if site.layout == "attention":
            assert acts[site.id].shape == (2, site.channels, n, 77 if site.id.endswith("cross-map") else n), site.id
        else:
            assert maps[site.id].shape == (2, site.channels, size[0] // site.stride, size[1] // site.stride), site.id


def test_maps_are_the_weights_of_the_stock_attention(folder):
    """One softmax over text and image: the two maps sum to 1, and with the stock values they give the stock output."""
    backbone = db.create_model(NAME, recipe=["unet-out"], checkpoint_path=folder)
    x, text = torch.rand(2, 3, 32, 48) * 2 - 1, torch.randn(2, 77, tiny.T5["d_model"])
    oracle = Stock(stock(folder))
    oracle(noisy(backbone, x, 50), 50, encoder_hidden_states=text)
    layers = [site for site in backbone.catalogue.all() if site.id.endswith("cross-map")]
    assert len(layers) == ATTENDED
    for site in layers:
        ids = [site.id, site.id.replace("cross", "self")]
        weights = torch.cat(list(backbone.forward_activations(x, ids, prompt_embeds=text).values()), -1)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        layer = oracle.unet.get_submodule(site.path)
        with torch.no_grad():
            out = layer.to_out[0]((weights @ oracle.heads(site.path, "add_v_proj", "to_v")).transpose(1, 2).flatten(2))
        residual = oracle.inputs[site.path]
        expected = oracle.outputs[site.path] - residual
        torch.testing.assert_close(
            out.transpose(1, 2).reshape(residual.shape),
            expected,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, activation=site.id: f"{activation}: {text}",
        )


def test_a_network_that_was_cut_gives_the_same_and_holds_less(folder, tmp_path):
    x = torch.rand(1, 3, 27, 46) * 2 - 1
    whole = db.create_model(NAME, recipe=["unet-out"], checkpoint_path=folder)
    count = count_parameters(whole.denoiser)
    held = []
    sites = [site for site in whole.catalogue.all() if not site.id.endswith("self-map")]
    for site in [
        *sites[:3],
        *[whole.catalogue[f"down-level1-repeat0-vit-block0-{kind}"] for kind in ("self-q", "self-v", "cross-map")],
        *sites[3::11],
    ]:
        backbone = db.create_model(NAME, recipe=Recipe("mine", (Level((site.id,)),)), checkpoint_path=folder)
        if site.layout == "attention":
            [expected] = whole.forward_activations(x, [site.id]).values()
            [mine] = backbone.forward_activations(x, [site.id]).values()
            assert torch.equal(mine, expected), site.id
        else:
            [expected] = whole.forward_activations(x, [site.id], as_maps=True).values()
            assert torch.equal(backbone(x)[0], expected), site.id
        held.append(count_parameters(backbone.denoiser))
        assert held[-1] < count or site.id == "unet-out"
    assert held[0] == held[1] < held[2]
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'saved')}")
    assert torch.equal(saved(x)[0], backbone(x)[0])


@pytest.mark.parametrize(
    "activation",
    [
        f"down-level1-repeat0-{kind}"
        for kind in ("res-increment", "vit-block0-self-q", "vit-block0-cross-map", "vit-out")
    ],
)
def test_nothing_that_a_call_cannot_reach_is_kept(activation, folder):
    backbone = db.create_model(NAME, recipe=[activation], checkpoint_path=folder, trainable=True)
    sum(m.pow(2).sum() for m in backbone(torch.randn(1, 3, 32, 32))).backward()
    assert [name for name, p in backbone.denoiser.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    "activation",
    [
        "unet-after-conv-in",
        "down-level0-repeat1-res-out",
        "down-level1-repeat0-res-out",
        "down-level1-repeat0-vit-block0-self-q",
    ],
)
def test_the_text_is_not_projected_where_no_attention_reads_it(activation, folder):
    backbone = db.create_model(NAME, recipe=[activation], checkpoint_path=folder)
    assert isinstance(backbone.denoiser.encoder_hid_proj, Bypass)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    [empty], [cat] = backbone(x), backbone(x, prompt=["a cat", "a dog"])
    assert torch.equal(empty, cat) == (activation == "unet-after-conv-in"), (
        "the pooled text is part of the timestep's embedding"
    )


def test_full_size_on_meta():
    """4.3 billion parameters, as the authors state; every id is there, and an early one keeps little."""
    checkpoint = db.get_checkpoint(NAME)
    configs = package_configs(checkpoint)
    network = meta_trace.build(architecture(checkpoint, configs))
    assert round(count_parameters(network) / 1e9, 1) == 4.3
    backbone = db.create_model(NAME, recipe=["unet-out"], device="meta")
    assert (backbone.size_divisibility, backbone.latent_stride, backbone.latent_channels) == (8, 1, 3)
    assert tuple(backbone.conditioning.prompt_embeds.shape) == (1, 77, 4096)
    sites = backbone.catalogue.all()
    x = torch.empty(2, 3, 59, 45, device="meta")
    maps = backbone.forward_activations(x, [site.id for site in sites if site.layout != "attention"], as_maps=True)
    for site in sites:
        if site.layout == "attention":
            layer = network.get_submodule(site.path)
            assert (site.channels, layer.to_q.out_features) == (layer.heads, 64 * layer.heads), site.id
        else:
            assert tuple(maps[site.id].shape) == (2, site.channels, -(-59 // site.stride), -(-45 // site.stride)), (
                site.id
            )
    assert {site.stride for site in sites} == {1, 2, 4, 8}
    early = db.create_model(NAME, recipe=["down-level1-repeat1-vit-out"], device="meta")
    assert count_parameters(early.denoiser) < 0.2 * count_parameters(network)
    assert safetensors_io.shapes(early.denoiser).items() <= safetensors_io.shapes(network).items()


@pytest.mark.parametrize("prompt", ["", "A photo of a CAT "])
def test_prompts_are_encoded_as_the_pipeline_does(prompt, folder):
    source = Folder(folder)
    family = FAMILIES["deepfloyd"](source.configs(FAMILIES["deepfloyd"]))
    tokenizer, encoder = source.text("text_encoder")
    pipeline = IFPipeline(tokenizer, encoder, None, None, None, None, None, requires_safety_checker=False)
    stock, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, device=torch.device("cpu"))
    ours = family.encode_prompts(source.text, [prompt], "max_length")
    assert list(ours) == ["prompt_embeds"]
    assert ours["prompt_embeds"].shape == (1, 77, tiny.T5["d_model"])
    torch.testing.assert_close(ours["prompt_embeds"], stock, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="prompts of this network are always padded to its length"):
        family.encode_prompts(source.text, [prompt], "longest")


def test_a_prompt_conditions_a_call(folder):
    backbone = db.create_model(
        NAME,
        recipe=["mid-vit-block0-cross-map", "up-level0-repeat0-vit-out", "up-level3-repeat0-res-out"],
        checkpoint_path=folder,
    )
    assert backbone.feature_info.channels() == [8, 77 + 32]
    x = torch.rand(2, 3, 43, 62) * 2 - 1
    maps = backbone(x)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 43, 62), (2, 77 + 32, 6, 8)]
    assert not torch.equal(backbone(x, prompt="a cat")[1], maps[1])
    for one, both in zip(backbone(x[1:], prompt="a dog"), backbone(x, prompt=["a cat", "a dog"]), strict=True):
        torch.testing.assert_close(one, both[1:], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has .* tokens and the network takes 77; shorten it"):
        backbone(x, prompt="cat " * 100)
    with pytest.raises(TypeError, match="is not conditioned on pooled_prompt_embeds; it takes prompt_embeds"):
        backbone(x, pooled_prompt_embeds=torch.zeros(1, 4))
    half = db.create_model(
        NAME,
        recipe=["mid-vit-block0-cross-map", "up-level3-repeat0-res-out"],
        checkpoint_path=folder,
        dtype=torch.bfloat16,
    )
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in half(x))


def test_noise_is_that_of_its_scheduler():
    scheduler = DDPMScheduler.from_config(package_configs(db.get_checkpoint(NAME))["scheduler"])
    process = db.create_model(NAME, recipe=["unet-in"], device="meta").forward_process
    for timestep in (0, 50, 261, 999):
        alpha, sigma = process.levels(timestep)
        assert alpha**2 == pytest.approx(float(scheduler.alphas_cumprod[timestep]), abs=1e-6)
        assert alpha**2 + sigma**2 == pytest.approx(1, abs=1e-6)


def test_a_folder_says_itself_what_it_is(folder):
    backbone = db.create_model(f"local-dir:{folder}", recipe=["mid-vit-out"])
    assert (backbone.declaration.checkpoint.family, backbone.declaration.input_size) == ("deepfloyd", 64)
    config = package_configs(db.get_checkpoint(NAME))["unet"]
    configs = package_configs(db.get_checkpoint(NAME))
    for other in ({"class_embed_type": "timestep"}, {"addition_embed_type": "image"}):  # an upscaler of IF, Kandinsky
        family = next(family for family in FAMILIES.values() if family.matches(config | other))
        missing = {} if family.encoder == "" else {"vae": package_configs(db.get_checkpoint("sd15"))["vae"]}
        with pytest.raises(ValueError, match="|".join(other)):
            upstream.read(family, configs | missing | {"unet": config | other}, "here")
