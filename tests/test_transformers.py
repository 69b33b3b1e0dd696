"""Diffusion transformers: every activation equals that of the stock, whole network; see transformer_oracle.py."""

from __future__ import annotations

import inspect
import re
import shutil

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from transformer_oracle import CASES, FIRST, NEW, Case, arguments, blocks, from_pipeline, pipeline_class

import diffusion_backbones as db
from diffusion_backbones import Recipe
from diffusion_backbones.families import FAMILIES, architecture
from diffusion_backbones.loading.source import Folder
from diffusion_backbones.ops import recording
from diffusion_backbones.ops.noise import RectifiedFlow
from diffusion_backbones.reports.costs import costs
from diffusion_backbones.spec.configs import package_configs
from diffusion_backbones.spec.recipe import Level
from diffusion_backbones.surgery import memory_budget

pytestmark = pytest.mark.usefixtures("costs_not_measured")

COUNTS = {"sana": 8 * 4, "sana-1.5": 8 * 4, "hunyuan": 8 * 6, "hunyuan-1.1": 8 * 6, "auraflow": 9 * 2 + 9 * 3}
COUNTS |= {"flux2": 9 * 2 + 8 * 3, "flux2-klein": 9 + 8 * 2, "qwen": 9 * 3}
COUNTS |= {name: 8 * 2 + 9 * 3 for name in ("lumina", "z_image", "z_image-long")}
COUNTS |= {
    "dit": 6 * 4,
    "pixart": 8 * 4,
    "pixart-1024": 8 * 2,
    "flux": 39,
    "flux-schnell": 9 + 14,
    "sd3": 27,
    "sd3.5": 27,
}
"""GDF's ids: activations.md counts 32 for four blocks of PixArt, and 39 for FLUX with two double and three single
blocks.
"""


@pytest.mark.parametrize("latent", [(8, 8), (8, 12)], ids=["square", "wide"])
@pytest.mark.parametrize("timestep", [50, 261])
@pytest.mark.parametrize("name", CASES)
def test_every_activation_is_that_of_the_stock_network(name, timestep, latent, monkeypatch):
    case = Case(name, latent, timestep)
    if name in COUNTS:
        assert len(list(case.catalogue)) == COUNTS[name]
    for block in range(len(blocks(case.network))):
        kinds = {site.id.partition(f"vit-block{block}-")[2] for site in case.catalogue.all()}
        attention = {"q", "k", "v", "attn-out"} if "q" in kinds else {"self-q", "self-k", "self-v", "self-out"}
        lacking = {"norm-out", "ffn-inner", "out", "self-map", *attention} - kinds
        assert not lacking, f"block {block} lacks {lacking}"
    ids = [site.id for site in case.catalogue.all()]
    acts = case.ours(case.cut, ids)
    kept = case.stock(monkeypatch)
    n = case.grid[0] * case.grid[1]
    for activation, act in acts.items():
        site = case.catalogue[activation]
        shapes = {
            "tokens": (2, n, site.channels),
            "attention": (2, site.channels, n),
            "map": (2, site.channels, case.grid[0]),
        }
        assert act.shape[:3] == shapes[site.layout], activation
        torch.testing.assert_close(
            act,
            case.expected(kept, activation),
            rtol=1e-4,
            atol=1e-4,
            msg=lambda text, activation=activation: f"{activation}: {text}",
        )


@pytest.mark.parametrize(
    "name",
    ["pixart", "flux", "flux-schnell", "sd3", "sd3.5", "sana", "hunyuan", "auraflow", "flux2", "lumina", *NEW],
)
def test_a_pipeline_gives_its_network_what_the_oracle_does(name):
    """Of families that the oracle does not know it takes the pipeline's word; of the others it has its own."""
    case = Case(name, (8, 12), 261)
    given, written = from_pipeline(case), arguments(case)
    ignored = {"return_dict", "joint_attention_kwargs", "attention_kwargs", "cross_attention_kwargs"}
    if not case.network.config.get("use_style_cond_and_image_meta_size", True):
        ignored |= {"style", "image_meta_size"}  # Hunyuan-DiT 1.2 is given them and does without
    for key, value in written.items():
        torch.testing.assert_close(given.pop(key), value, check_dtype=False, msg=lambda text, key=key: f"{key}: {text}")
    empty = ({"resolution": None, "aspect_ratio": None}, None)  # the former where PixArt is not told its size
    assert not [key for key, value in given.items() if key not in ignored and value not in empty]


@pytest.mark.parametrize("name", CASES)
def test_a_network_that_was_cut_gives_the_same_and_holds_less(name):
    case = Case(name, (8, 12), 50)
    whole = sum(p.numel() for p in case.network.parameters())
    for activation in [site.id for site in case.catalogue.all()][::3]:
        torch.manual_seed(0)
        cut = case.family.build_denoiser().eval()
        cut.load_state_dict(case.network.state_dict())
        cut = case.family.truncate(cut, list(case.catalogue[activation].modules))
        block = int(re.match(r"vit-block(\d+)", activation)[1])
        kept = [path for path in blocks(cut) if any(True for _ in cut.get_submodule(path).parameters())]
        assert len(kept) == block + 1, activation
        assert sum(p.numel() for p in cut.parameters()) < whole
        assert torch.equal(case.ours(cut, [activation])[activation], case.ours(case.cut, [activation])[activation]), (
            activation
        )


@pytest.mark.parametrize("name", CASES)
def test_maps_are_probabilities_and_may_be_averaged(name):
    case = Case(name, (8, 8), 50)
    for site in (s for s in case.catalogue.all() if s.layout == "attention"):
        recorder = recording.Recorder(case.cut, [site])
        with torch.no_grad(), recorder.recording([site]) as acts:
            case.family.call(case.cut, case.z, case.timestep, case.conditioning, case.size)
        heads, mean = (
            case.family.activation(case.cut, site, recording.collect(acts, site), case.conditioning, case.grid, average)
            for average in (False, True)
        )
        torch.testing.assert_close(heads.mean(1), mean)
        assert (heads.sum(-1) <= 1 + 1e-5).all()


def test_depth_runs_from_input_to_output():
    for name in CASES:
        case = Case(name, (8, 8), 50)
        depths = [case.family.depth(f"{path}.ff.weight") for path in blocks(case.network)]
        order = [case.family.depth("pos_embed.proj.weight"), *depths, case.family.depth("proj_out.weight")]
        assert order == sorted(set(order))


def test_a_flow_is_a_straight_line():
    flow = RectifiedFlow()
    assert flow.levels(260) == (0.74, 0.26)
    alpha, sigma = flow.levels(torch.tensor([0, 500, 1000]))
    assert alpha.flatten().tolist() == [1, 0.5, 0]
    assert sigma.flatten().tolist() == [0, 0.5, 1]
    for wrong in (-1, 1001, torch.tensor([5, 2000])):
        with pytest.raises(ValueError, match="timestep must be from 0 to 1000 on a rectified flow"):
            flow.levels(wrong)
    schedulers = {"FlowMatchEulerDiscreteScheduler": True, "DDIMScheduler": False}
    for kind, is_flow in schedulers.items():
        config = {
            "_class_name": kind,
            "beta_start": 0.0001,
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "num_train_timesteps": 1000,
        }
        assert isinstance(FAMILIES["sd3"]({"scheduler": config}).forward_process, RectifiedFlow) == is_flow


def test_what_cannot_be_is_refused():
    dit = Case("dit", (8, 8), 50)
    dit.conditioning["class_labels"] = torch.tensor([3, 11])
    with pytest.raises(ValueError, match=r"class_labels must be from 0 to 9, or 10 for no class; got \[3, 11\]"):
        dit.ours(dit.cut, ["vit-block0-out"])
    with pytest.raises(ValueError, match="conditioned on ImageNet classes and not on text; give class_labels="):
        dit.family.encode_prompts(None, ["a cat"], "max_length")
    assert dit.family.encode_prompts(None, ["", ""], "max_length")["class_labels"].tolist() == [10, 10]
    assert dit.family.blank_conditioning()["class_labels"].tolist() == [10]
    sd3 = Case("sd3", (8, 26), 50)
    with pytest.raises(
        ValueError,
        match="latents of at most 24 x 24, and those of this 64 x 208 image are 8 x 26; give an image of at most 192 "
        "pixels a side",
    ):
        sd3.ours(sd3.network, ["vit-block0-out"])
    with pytest.raises(KeyError, match="vit-block9-out"):
        dit.catalogue["vit-block9-out"]


@pytest.mark.parametrize(
    ("name", "latents", "pixels"),
    [("sd3.5", 24, 192), ("auraflow", 16, 128), ("lumina", 24, 192), ("z_image", 24, 192)],
)
def test_every_table_of_positions_says_what_it_holds(name, latents, pixels):
    """The largest image that a table holds runs, in either direction, and one that is larger by a patch is refused with
    what would fit.
    """
    for latent in ((4, latents), (latents, 4)):
        case = Case(name, latent, 50)
        assert case.ours(case.cut, ["vit-block0-out"])["vit-block0-out"].isfinite().all()
        too_large = Case(name, tuple(n + 2 if n == latents else n for n in latent), 50)
        with pytest.raises(
            ValueError,
            match=f"latents of at most {latents} x {latents}, .* give an image of at most {pixels} pixels a side",
        ):
            too_large.ours(too_large.cut, ["vit-block0-out"])


def by_hand(folder, x, steps):
    """(noisy latents of FLUX's formula, packed) for a list of noises, with stock parts."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        z = (vae.encode(x).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
    return [(1 - t / 1000) * z + t / 1000 * noise for t, noise in steps]


def test_ditf_is_what_its_paper_says(tiny_folder, monkeypatch):
    """Mean over eight noises of the stream before block 28, two channels zeroed, then the very LayerNorm and modulation
    of block 28.
    """
    folder = tiny_folder("flux_dev")
    recipe = tiny.recipe("flux_dev_ditf")
    backbone = db.create_model("flux_dev", recipe=recipe, checkpoint_path=folder)
    stock = tiny.build("flux_dev")["transformer"]
    torch.manual_seed(3)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    [ours] = backbone(x)
    streams, scales = [], []
    block = stock.single_transformer_blocks[28 - 19]
    block.register_forward_pre_hook(
        lambda m, a, k: streams.append((k.get("hidden_states"), k["temb"])), with_kwargs=True
    )
    h, w = 4, 6
    for z_t in by_hand(folder, x, [(260, backbone.canvas[i : i + 1, :, :8, :12]) for i in range(8)]):
        with torch.no_grad():
            stock(
                diffusers.FluxPipeline._pack_latents(z_t, 1, 16, 2 * h, 2 * w),
                timestep=torch.tensor([0.26]),
                guidance=torch.tensor([3.5]),
                encoder_hidden_states=backbone.conditioning.prompt_embeds,
                pooled_projections=backbone.conditioning.pooled_prompt_embeds,
                img_ids=diffusers.FluxPipeline._prepare_latent_image_ids(1, h, w, "cpu", torch.float32),
                txt_ids=torch.zeros(512, 3),
            )
        with torch.no_grad():
            scales.append(block.norm.linear(F.silu(streams[-1][1])).chunk(3, dim=1))
    mean = torch.stack([stream for stream, _ in streams]).mean(0)
    mean[..., list(recipe.discard)] = 0
    shift, scale, _ = scales[0]
    expected = F.layer_norm(mean, (32,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(ours, expected.reshape(1, h, w, 32).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)
    raw = backbone.forward_activations(x, ["vit-block27-out"])["vit-block27-out"]
    torch.testing.assert_close(raw, torch.stack([stream for stream, _ in streams]).mean(0), rtol=1e-4, atol=1e-4)
    last = backbone.denoiser.single_transformer_blocks[9]
    assert [name for name, _ in last.named_parameters()] == ["norm.linear.weight", "norm.linear.bias"]
    assert len(backbone.denoiser.single_transformer_blocks) == 10


@pytest.mark.parametrize("name", ["sd15", "dit_xl_256", "sd35_medium"])
def test_a_post_operation_goes_with_any_model(name, tiny_folder):
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    ids = ["up-level1-repeat1-res-out", "up-level2-repeat0-vit-block0-out"] if name == "sd15" else ["vit-block3-out"]
    raw = db.create_model(name, recipe=ids, checkpoint_path=tiny_folder(name))(x)
    levels = tuple(Level((activation,)) for activation in reversed(ids))
    done = db.create_model(
        name, recipe=Recipe("mine", levels, discard=(3, 5), normalize="layer"), checkpoint_path=tiny_folder(name)
    )(x)
    for before, after in zip(raw, done, strict=True):
        rows = before.movedim(1, -1).clone()
        rows[..., [3, 5]] = 0
        torch.testing.assert_close(after.movedim(1, -1), F.layer_norm(rows, rows.shape[-1:], eps=1e-6))
    if name == "sd15":
        with pytest.raises(
            ValueError,
            match=r"normalize='adaptive' needs a block with an adaptive LayerNorm behind .* and there is none behind "
            r"up-level2",
        ):
            db.create_model(name, recipe=Recipe("mine", levels, normalize="adaptive"), device="meta")
    else:
        adaptive = db.create_model(
            name, recipe=Recipe("mine", levels, normalize="adaptive"), checkpoint_path=tiny_folder(name)
        )
        whole = db.create_model(
            name, recipe=["transformer_blocks.4.norm1", "vit-block5-out"], checkpoint_path=tiny_folder(name)
        )
        norm = whole.forward_activations(x, ["transformer_blocks.4.norm1"], as_maps=True)["transformer_blocks.4.norm1"]
        torch.testing.assert_close(adaptive(x)[0], norm, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"discard=\(5000,\), and .* has channels 0 to"):
        db.create_model(name, recipe=Recipe("mine", levels, discard=(5000,)), device="meta")


def test_attention_to_a_text_can_be_a_level(tiny_folder):
    """seg4diff: one channel per CLIP token, T5 left out, the mean of the heads' probabilities."""
    backbone = db.create_model("sd3_medium_seg4diff", checkpoint_path=tiny_folder("sd3_medium"))
    assert backbone.feature_info.channels() == [77]
    assert backbone.conditioning.prompt_embeds.shape == (1, 77, tiny.T5["d_model"])
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    [level] = backbone(x, prompt=["a cat", "a dog"])
    heads = backbone.forward_activations(x, ["vit-block9-cross-map"], prompt=["a cat", "a dog"])["vit-block9-cross-map"]
    torch.testing.assert_close(level, heads.mean(1).transpose(1, 2).reshape(2, 77, 4, 6))
    assert (level.sum(1) < 1).all(), "the softmax runs over image tokens too"
    assert len(backbone.denoiser.transformer_blocks) == 10
    with_t5 = db.create_model("sd3_medium", recipe=["vit-block9-cross-map"], checkpoint_path=tiny_folder("sd3_medium"))
    assert with_t5.feature_info.channels() == [333]
    for name in ("text_encoder", "unet"):
        with pytest.raises(
            ValueError,
            match=f"without='{name}' is not a text encoder that this checkpoint can do without; it has text_encoder, "
            "text_encoder_2",
        ):
            db.create_model("sd3_medium", recipe=Recipe("mine", ("vit-block9-out",), without=(name,)), device="meta")
    with pytest.raises(ValueError, match="vit-block9-self-map is an attention map"):
        db.create_model("sd3_medium", recipe=["vit-block9-self-map"], device="meta")


def test_prompts_of_t5_are_as_long_as_the_network_takes(tiny_folder):
    """120 tokens for PixArt-alpha, 300 for Sigma, 512 and 256 for FLUX, whatever the tokenizer says."""
    lengths = {"pixart_alpha_1024": 120, "pixart_sigma_1024": 300, "flux_dev": 512, "flux_schnell": 256}
    for name, tokens in lengths.items():
        backbone = db.create_model(name, recipe=["vit-block0-out"], checkpoint_path=tiny_folder(name))
        assert backbone.conditioning.prompt_embeds.shape == (1, tokens, tiny.T5["d_model"]), name
        with pytest.raises(ValueError, match=f"has .* tokens and the network takes {tokens}; shorten it"):
            backbone(torch.zeros(1, 3, 32, 32), prompt="cat " * 3 * tokens)
        long = backbone(
            torch.zeros(1, 3, 32, 32), prompt="cat " * (tokens // 3)
        )  # often more than CLIP's 77 tokens, which FLUX cuts
        assert long[0].isfinite().all()
    mask = db.create_model(
        "pixart_sigma_1024", recipe=["vit-block0-out"], checkpoint_path=tiny_folder("pixart_sigma_1024")
    ).conditioning.prompt_attention_mask
    assert mask.sum() == 1, "the empty prompt is its end token"


def test_a_class_conditions_a_call(tiny_folder):
    backbone = db.create_model("dit_xl_256_ddae", checkpoint_path=tiny_folder("dit_xl_256"))
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    [null], [same], [one], [two] = (
        backbone(x),
        backbone(x, class_labels=1000),
        backbone(x, class_labels=207),
        backbone(x, class_labels=[1000, 207]),
    )
    assert torch.equal(null, same)
    assert not torch.equal(null, one)
    torch.testing.assert_close(two, torch.stack([null[0], one[1]]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="class_labels must be from 0 to 999, or 1000 for no class; got"):
        backbone(x, class_labels=1001)
    with pytest.raises(ValueError, match="conditioned on ImageNet classes and not on text"):
        backbone(x, prompt="a cat")


@pytest.mark.parametrize("name", ["sd3_medium", "flux_schnell", "hunyuan_dit_12"])
def test_a_missing_second_text_encoder_is_named(name, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder(name), tmp_path / name, ignore=shutil.ignore_patterns("text_encoder_2"))
    with pytest.raises(FileNotFoundError, match="text_encoder_2"):
        db.create_model(name, recipe=["vit-block0-out"], checkpoint_path=tmp_path / name)


def test_truncation_reaches_no_further_than_the_recipe():
    """Full size, on meta: a recipe at block k of n keeps k + 1 blocks, and FLUX.1-dev read by DiTF about half its
    weights.
    """
    for name, depth in {
        "dit_xl_256_ddae": (14, 28),
        "sd3_medium_seg4diff": (10, 24),
        "flux_dev_ditf": (29, 57),
    }.items():
        declaration = db.get_declaration(name)
        network = db.create_model(name, device="meta").denoiser
        kept = len(network.transformer_blocks) + len(getattr(network, "single_transformer_blocks", ()))
        config = package_configs(declaration.checkpoint)["transformer"]
        assert (kept, config["num_layers"] + config.get("num_single_layers", 0)) == depth, name
    cost = costs(db.get_declaration("flux_dev_ditf"))
    assert 0.4 < cost.parameters / cost.parameters_total < 0.7


def test_too_little_memory_says_what_would_fit(tiny_folder, monkeypatch):
    folder = tiny_folder("dit_xl_256")
    size = sum(
        t.numel()
        for part in (db.create_model("dit_xl_256_ddae", checkpoint_path=folder),)
        for net in (part.denoiser, part.encoder)
        for t in net.state_dict().values()
    )
    monkeypatch.setattr(memory_budget, "available", lambda device: 3 * size)
    with pytest.raises(
        MemoryError, match=r"dit_xl_256_ddae needs .* in float32, and cpu has .*; dtype='bfloat16' takes .*, which fits"
    ):
        db.create_model("dit_xl_256_ddae", checkpoint_path=folder)
    assert db.create_model("dit_xl_256_ddae", checkpoint_path=folder, dtype="bfloat16")
    monkeypatch.setattr(memory_budget, "available", lambda device: size)
    with pytest.raises(MemoryError, match=r"is the least that one setting gives; docs/memory.md says how"):
        db.create_model("dit_xl_256_ddae", checkpoint_path=folder)
    db.create_model("dit_xl_256_ddae", device="meta")


def test_the_denoiser_takes_diffusers_casting(tiny_folder):
    """docs/memory.md: weights in eight bits, computation in sixteen."""
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    backbone = db.create_model(
        "flux_schnell", recipe=["vit-block20-out"], checkpoint_path=tiny_folder("flux_schnell"), dtype=torch.bfloat16
    )
    [expected] = backbone(x)
    backbone.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert backbone.denoiser.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    [cast] = backbone(x)
    assert F.cosine_similarity(cast.float(), expected.float(), dim=1).mean() > 0.9


NATIVE = {"dit_xl_256": 256, "pixart_alpha_512": 512, "sana_1600m_1024": 1024, "sd3_medium": 512, "hunyuan_dit_12": 512}


@pytest.mark.parametrize("name", NATIVE)
def test_a_loaded_network_has_all_its_buffers(name, tiny_folder):
    """Positions of the native size are in no file; at other sizes the stock network computes them anew."""
    backbone = db.create_model(name, recipe=["vit-block1-out"], checkpoint_path=tiny_folder(name))
    assert not [path for path, buffer in backbone.denoiser.named_buffers() if buffer.is_meta]
    backbone.to("cpu")
    stock = tiny.build(name)["transformer"]
    x = torch.rand(1, 3, NATIVE[name], NATIVE[name]) * 2 - 1
    kept = []
    stock.get_submodule(blocks(stock)[1]).register_forward_hook(lambda m, a, o: kept.append(o))
    family, z = backbone.architecture, backbone.encode(x)
    conditioning = dict(backbone.conditioning.items())
    with torch.no_grad():
        family.call(stock, z, torch.tensor([50]), conditioning, x.shape[-2:])
    act = backbone.forward_activations(None, ["vit-block1-out"], latents=z, noise="none", timestep=50)["vit-block1-out"]
    torch.testing.assert_close(act, kept[0][1] if isinstance(kept[0], tuple) else kept[0], rtol=1e-4, atol=1e-4)


PLACES = {
    "flux_dev": {"prompt_embeds": 0, "pooled_prompt_embeds": 1},
    "sd3_medium": {"prompt_embeds": 0, "pooled_prompt_embeds": 2},
    "pixart_alpha_1024": {"prompt_embeds": 0, "prompt_attention_mask": 1},
    "pixart_sigma_1024": {"prompt_embeds": 0, "prompt_attention_mask": 1},
    "hunyuan_dit_12": {"prompt_embeds": 0, "prompt_attention_mask": 2},
}
PLACES |= {name: {"prompt_embeds": 0} for name in ("auraflow_03", "flux2_dev", "flux2_klein_4b", "qwen_image")}
PLACES |= {FIRST[family]: {"prompt_embeds": 0} for family in NEW if FAMILIES[family].text_encoders}
"""Checkpoint -> where what its pipeline's ``encode_prompt`` returns has our tensors."""
PIPELINES = {"pixart_sigma_1024": "PixArtSigmaPipeline", "flux2_klein_4b": "Flux2KleinPipeline"}
"""Pipelines of networks that several have."""


@pytest.mark.parametrize("prompt", ["", "A photo of a cat"])
@pytest.mark.parametrize("name", PLACES)
def test_prompts_are_encoded_as_the_pipeline_does(name, prompt, tiny_folder):
    folder = Folder(tiny_folder(name))
    checkpoint = db.get_checkpoint(name)
    family = architecture(checkpoint, folder.configs(FAMILIES[checkpoint.family]))
    cls = getattr(diffusers, PIPELINES[name]) if name in PIPELINES else pipeline_class(family.networks[0])
    signature = inspect.signature(cls.encode_prompt).parameters
    settings = dict.fromkeys(p for p in ("prompt_2", "prompt_3") if p in signature)
    if checkpoint.family in ("flux", *NEW) and "max_sequence_length" in signature:  # others have it as their default
        settings["max_sequence_length"] = family.text_tokens
    settings |= {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in signature else {}
    parts = {}
    for encoder in family.text_encoders:
        parts[encoder.replace("text_encoder", "tokenizer")], parts[encoder] = folder.text(encoder)
    parameters = [p for p in inspect.signature(cls.__init__).parameters if p != "self"]
    empty = {p: False for p in parameters if p == "requires_safety_checker"}
    pipeline = cls(**{p: parts.get(p) for p in parameters} | empty)
    with torch.no_grad():
        stock = pipeline.encode_prompt(prompt, device=torch.device("cpu"), **settings)
        ours = family.encode_prompts(folder.text, [prompt], "max_length")
        for key, place in PLACES[name].items():
            given = ours[key]
            if given.shape != stock[place].shape:  # a pipeline that does not pad one prompt
                given = given[ours["prompt_attention_mask"].bool()][None]
            torch.testing.assert_close(
                given, stock[place].to(given), rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
        if "prompt_embeds_2" in ours:
            second = pipeline.encode_prompt(prompt, device=torch.device("cpu"), text_encoder_index=1, **settings)
            torch.testing.assert_close(ours["prompt_embeds_2"], second[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="prompts of this network are always padded to its length"):
        family.encode_prompts(folder.text, [prompt], "longest")


@pytest.mark.parametrize("name", ["lumina_image_2", "z_image_turbo"])
def test_prompts_are_what_the_pipeline_says_to_a_language_model(name, tiny_folder):
    """Behind an instruction for Lumina, as a turn in a chat for Z-Image; padding is cut off by the network, so it may
    be anything.
    """
    kinds = {"lumina_image_2": "Lumina2Pipeline", "z_image_turbo": "ZImagePipeline"}
    folder, cls = Folder(tiny_folder(name)), getattr(diffusers, kinds[name])
    family = architecture(db.get_checkpoint(name))
    tokenizer, model = folder.text("text_encoder")
    pipeline = cls(tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None)
    for prompt in ("A photo of a cat", ""):
        with torch.no_grad():
            stock = pipeline.encode_prompt(prompt, device=torch.device("cpu"))
            tokenizer.padding_side = "left"  # as Gemma's is
            ours = family.encode_prompts(lambda component: (tokenizer, model), [prompt], "max_length")
        tokenizer.padding_side = "right"
        embeds, mask = ours["prompt_embeds"], ours["prompt_attention_mask"].bool()
        assert embeds.shape == (1, family.tokens, 24)
        if name == "z_image_turbo":
            expected = stock[0][0]
        else:  # nothing was asked for: what guidance leads away from
            states, kept = stock[:2] if prompt else stock[2:]
            expected = states[kept.bool()]
        torch.testing.assert_close(embeds[mask], expected, rtol=1e-5, atol=1e-5)
        assert mask.sum() == len(expected)
        assert mask[0, : len(expected)].all()
    with pytest.raises(
        ValueError, match=f"the prompt 'cat cat .* has .* tokens and the network takes {family.tokens}; shorten it"
    ):
        family.encode_prompts(lambda component: (tokenizer, model), ["cat " * family.tokens], "max_length")
    with pytest.raises(ValueError, match="prompts of this network are always padded to its length"):
        family.encode_prompts(folder.text, ["a cat"], "longest")


@pytest.mark.parametrize("name", ["lumina_image_2", "z_image_turbo"])
def test_what_stands_beside_a_row_changes_nothing(name, tiny_folder):
    """Prompts of different lengths in one call: features, and maps with one column per token, are those of each image
    alone.
    """
    ids = ["vit-block1-out", "vit-block3-cross-map", "vit-block3-self-map", "vit-block3-out"]
    backbone = db.create_model(name, recipe=[ids[-1]], checkpoint_path=tiny_folder(name))
    torch.manual_seed(5)
    x = torch.rand(2, 3, 90, 120) * 2 - 1
    prompts = ["a cat", "a photo of a horse " * 6]
    both = backbone.forward_activations(x, ids, prompt=prompts, timestep=[100, 700])
    lengths = backbone.prompter(prompts)["prompt_attention_mask"].sum(1).int().tolist()
    for i, prompt in enumerate(prompts):
        alone = backbone.forward_activations(x[i : i + 1], ids, prompt=prompt, timestep=[(100, 700)[i]])
        for activation in ids:
            torch.testing.assert_close(
                both[activation][i : i + 1],
                alone[activation],
                rtol=1e-4,
                atol=1e-4,
                msg=lambda text, activation=activation: f"{activation}: {text}",
            )
        seen = alone["vit-block3-cross-map"][0, 0, 0] > 0
        end = lengths[i] if name == "lumina_image_2" else -(-lengths[i] // 32) * 32
        assert seen[:end].all()
        assert not seen[end:].any()
    given = backbone.prompter(prompts[:1])
    with pytest.raises(
        ValueError,
        match=r"prompt_embeds has 9 tokens and prompt_attention_mask \d+; pad the embeddings to it, and give the mask",
    ):
        backbone(x, prompt_embeds=given["prompt_embeds"][:, :9])
    torch.testing.assert_close(backbone(x, **given)[0], backbone(x, prompt=prompts[0])[0])
    path = "layers.1.attention_norm2" if name == "z_image_turbo" else "layers.1.norm2"
    at = {path: "vit-block3", "noise_refiner.1.ffn_norm1": "vit-block1"}
    norms = db.create_model(name, recipe=[*at], checkpoint_path=tiny_folder(name)).forward_activations(
        x, [*at], prompt=prompts, timestep=[100, 700]
    )
    for module, act in norms.items():
        assert act.shape == both[f"{at[module]}-out"].shape
    weight = backbone.denoiser.get_parameter(f"{path}.weight")
    attended = backbone.forward_activations(x, ["vit-block3-attn-out"], prompt=prompts, timestep=[100, 700])[
        "vit-block3-attn-out"
    ]
    torch.testing.assert_close(
        norms[path], F.rms_norm(attended, attended.shape[-1:], weight, eps=1e-5), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["lumina_image_2", "z_image_turbo"])
def test_what_a_pipeline_gives_its_network_gives_the_same_features(name, tiny_folder):
    """The network that diffusers loads, on the arguments of its pipeline: embeddings, and the share of the image in
    place of that of noise.
    """
    folder = tiny_folder(name)
    stock = {
        "lumina_image_2": diffusers.Lumina2Transformer2DModel,
        "z_image_turbo": diffusers.ZImageTransformer2DModel,
    }[name].from_pretrained(folder / "transformer")
    kept = []
    stock.layers[1].register_forward_hook(lambda m, a, o: kept.append(o))
    backbone = db.create_model(name, recipe=["vit-block3-out"], checkpoint_path=folder, timestep=300)
    torch.manual_seed(2)
    z, prompts = torch.randn(2, 16, 10, 14), ["a cat", "a photo of a horse " * 6]
    noisy, t = 0.7 * z + 0.3 * backbone.canvas[:, :, :10, :14], torch.full((2,), 1 - 300 / 1000)
    ours = backbone.forward_activations(None, ["vit-block3-out"], latents=z, prompt=prompts)["vit-block3-out"]
    conditioning = backbone.prompter(prompts)
    embeds, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"].long()
    starts, lengths = [0, 0], mask.sum(1).tolist()
    with torch.no_grad():
        if name == "z_image_turbo":
            stock(list(noisy.unsqueeze(2).unbind(0)), t, [row[:n] for row, n in zip(embeds, lengths, strict=True)])
        else:
            stock(noisy, t, embeds, mask)
            starts = lengths
    expected = torch.stack([row[start : start + 5 * 7] for row, start in zip(kept[0], starts, strict=True)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["lumina_image_2", "z_image_turbo"])
def test_on_meta_a_prompt_is_as_long_as_may_be(name):
    """There is nothing to read, and the shapes are those of a network that runs."""
    backbone = db.create_model(
        name, recipe=Recipe("mine", (("vit-block3-cross-map", "vit-block3-norm-out"),)), device="meta"
    )
    channels = backbone.feature_info.channels()
    assert [tuple(m.shape) for m in backbone(torch.empty(2, 3, 75, 110, device="meta"))] == [(2, channels[0], 5, 7)]


@pytest.mark.parametrize(
    "name",
    [
        "pixart_sigma_1024",
        "sd35_medium",
        "flux_schnell",
        "hunyuan_dit_12",
        "auraflow_03",
        "sana_1600m_1024",
        "qwen_image",
        "flux2_dev",
        "flux2_klein_4b",
        "lumina_image_2",
        "z_image_turbo",
        *(FIRST[family] for family in NEW),
    ],
)
def test_a_transformer_without_a_recipe_keeps_the_contract(name, tiny_folder, tmp_path):
    """Any size, strides by choice, a prompt, bfloat16, a cross-map level as wide as it says, and a saved folder that
    gives the same.
    """
    recipe = Recipe("mine", (("vit-block2-cross-map", "vit-block2-out"),))
    backbone = db.create_model(name, recipe=recipe, checkpoint_path=tiny_folder(name), out_strides=(4, 8, 16, 32))
    x = torch.rand(2, 3, 75, 110) * 2 - 1
    maps = backbone(x)
    channels = backbone.feature_info.channels()
    assert [tuple(m.shape) for m in maps] == [
        (2, c, -(-75 // s), -(-110 // s)) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    assert not torch.equal(backbone(x, prompt="a cat")[0], maps[0])
    alone = backbone(x[:1])
    for m, a in zip(maps, alone, strict=True):
        torch.testing.assert_close(m[:1], a, rtol=1e-4, atol=1e-4)
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path / 'saved')}")
    assert all(torch.equal(a, b) for a, b in zip(saved(x), maps, strict=True))
    half = db.create_model(name, recipe=recipe, checkpoint_path=tiny_folder(name), dtype=torch.bfloat16)
    assert all(m.dtype == torch.bfloat16 and m.isfinite().all() for m in half(x))
    assert "GFLOPs" in (tmp_path / "saved" / "README.md").read_text()


def test_a_recipe_that_leaves_an_encoder_out_is_saved_without_it(tiny_folder, tmp_path):
    backbone = db.create_model("sd3_medium_seg4diff", checkpoint_path=tiny_folder("sd3_medium"))
    saved = db.create_model(f"local-dir:{backbone.save_pretrained(tmp_path)}")
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    assert torch.equal(saved(x)[0], backbone(x)[0])
