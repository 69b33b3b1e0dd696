"""Model cards: what the hub reads, what users read, and the code that they paste."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from snippets import blocks, printed, promised

import diffusion_backbones as db
from diffusion_backbones.families.base import is_flow
from diffusion_backbones.reports import backbone_card, checkpoint_card, costs, measurements
from diffusion_backbones.spec.configs import CONFIGS, package_configs
from diffusion_backbones.spec.declaration import Declaration
from diffusion_backbones.spec.schedule import noise_level

ROOT = Path(__file__).parent.parent
NAMES = db.list_models(include_tags=True)
CHECKPOINTS = [
    name
    for name in db.list_checkpoints()
    if not any(db.get_declaration(model).checkpoint.name == name for model in NAMES)
]
# hf.co/docs/hub/repositories-licenses, those in use here
HUB_LICENSES = {"apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "cc-by-nc-4.0", "other"}


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "scripts/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(block, names, **replaced):
    for old, new in replaced.items():
        block = block.replace(old, new)
    assert promised(block), "a snippet that shows no output"
    assert printed(block, names) == promised(block)


# What the hub reads.


@pytest.mark.parametrize("name", NAMES)
def test_front_matter(name):
    declaration = db.get_declaration(name)
    data = ModelCard(backbone_card.card(declaration)).data
    assert data.library_name == "diffusion_backbones"
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.license == declaration.checkpoint.license.id
    assert data.license in HUB_LICENSES
    if data.license == "other":
        assert re.fullmatch(r"[a-z0-9.-]+", data.license_name)
        assert data.license_link.startswith("https://")
    assert "feature-pyramid" in data.tags
    assert all(isinstance(tag, str) for tag in data.tags)
    base = data.base_model or []
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", repo) for repo in ([base] if isinstance(base, str) else base))
    assert bool(base) == bool(declaration.checkpoint.hub_id)
    assert data.eval_results is None


def test_a_license_is_never_made_up():
    declaration = db.get_declaration("sd15_gdf")
    unknown = replace(
        declaration.checkpoint, license=db.License("other", name="Unknown; ask its author", verified=False)
    )
    card = ModelCard(backbone_card.card(replace(declaration, checkpoint=unknown)))
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "unknown-ask-its-author",
        None,
    )
    assert "which no source at hand confirms" in card.text


def test_weights_from_two_repositories_name_both():
    data = ModelCard(backbone_card.card(db.get_declaration("sd21_cleandift"))).data
    assert data.base_model == ["CompVis/cleandift", "stabilityai/stable-diffusion-2-1"]


# What users read.


@pytest.mark.parametrize("name", NAMES)
def test_levels_and_usage_are_those_of_the_network(name):
    """At full size, on meta, where there are no weights to download."""
    card, names = backbone_card.card(db.get_declaration(name)), {}
    with torch.device("meta"):
        run(blocks(card)[0], names, **{"pretrained=True": "pretrained=False"})
    backbone = names["backbone"]
    for i, level in enumerate(backbone.levels):
        side = backbone.declaration.input_size // level.stride
        assert f"| {i} | {level.stride} | {level.channels} × {side} × {side} | `{level.sites[0].id}` |" in card
    positions = [
        card.index(f"| `{site.id}` | {site.channels} | `{site.path}` |")
        for level in backbone.levels
        for site in level.sites
    ]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    "folder", sorted(path.parent.parent.name for path in CONFIGS.glob("*/scheduler/scheduler_config.json"))
)
def test_noise_levels_equal_diffusers(folder):
    config = package_configs(replace(db.get_checkpoint("sd15"), configs=folder))["scheduler"]
    if is_flow(config):
        flow = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000
        )  # no shift: what a timestep means, not which are visited
        for timestep, sigma in zip(flow.timesteps.tolist(), flow.sigmas.tolist(), strict=False):
            assert noise_level(config, timestep) == pytest.approx((1 - sigma, sigma), abs=1e-6)
        return
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    alpha_bar = DDPMScheduler(**{key: config[key] for key in keys}).alphas_cumprod.double()
    for timestep in (0, 1, 49, 51, 261, 500, 999):
        alpha, sigma = noise_level(config, timestep)
        assert alpha == pytest.approx(alpha_bar[timestep].sqrt().item(), abs=1e-5)  # diffusers' are float32
        assert sigma == pytest.approx((1 - alpha_bar[timestep]).sqrt().item(), abs=1e-5)
    assert noise_level(config, 51.9) == noise_level(config, 51)


def test_linear_betas_too():
    alpha_bar = DDPMScheduler(beta_schedule="linear").alphas_cumprod
    config = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "num_train_timesteps": 1000,
    }
    assert noise_level(config, 261)[0] == pytest.approx(alpha_bar[261].sqrt().item(), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sd15_gdf", "| Timestep | 51, which the source counts as 50 |"),
        ("sd15_gdf", "| Noise | z_t = 0.9749 z + 0.2224 noise; one fixed canvas, seed 0 |"),
        ("sd15_gdf", "denoiser 845 M of 860 M"),
        ("sd15_gdf", "denoiser 640 GFLOPs, image encoder 1,117 GFLOPs"),
        ("sd21_dift", "activations averaged over 8 fixed canvases, seeds 0 to 7"),
        ("sd21_dift", "denoiser 8 × 1,126 GFLOPs"),
        ("sd21_dift", "removed this repository about 13 November 2025"),
        ("sd21_cleandift", "| Noise | none: z_t = z |"),
        ("sd15_vpd", "the mode of the posterior, not scaled |"),
        ("sdxl_gdf", "the image encoder overflows in float16 and stays in float32"),
        ("sd21_genpercept", "| Prompt | empty, not padded |"),
        ("sd15_hyperfeatures", "| Timestep | -1, before the first step |"),
    ],
)
def test_details(name, sentence):
    assert sentence in backbone_card.card(db.get_declaration(name))


def test_other_settings_change_the_details():
    declaration = db.get_declaration("sd15_gdf")
    other = replace(declaration, recipe=declaration.recipe.override(prompt="a horse", noise="random", ensemble=2))
    card = backbone_card.card(other)
    assert "| Prompt | 'a horse', padded to the text encoder's limit |" in card
    assert "activations averaged over 2 draws, new in every call" in card


def test_gated_weights_say_what_to_do():
    declaration = db.get_declaration("sd15_gdf")
    gated = replace(declaration, checkpoint=replace(declaration.checkpoint, gated=True))
    assert (
        "accept the terms at https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
        in backbone_card.card(gated)
    )


def test_every_published_number_is_in_a_card_and_none_is_claimed():
    assert set(measurements.results()) <= set(NAMES)
    for name, rows in measurements.results().items():
        card = backbone_card.card(db.get_declaration(name))
        assert "None was reproduced with this package." in card
        for row in rows:
            cells = " | ".join(row[column] for column in ("task", "dataset", "protocol", "metric", "value", "source"))
            caveat = re.search(rf"^\| {re.escape(cells)} \| (\d*) \|$", card, flags=re.MULTILINE)
            assert caveat, f"{name}: no line for {cells}"
            assert f"\n{caveat[1]}. {row['caveat']}\n" in card if row["caveat"] else caveat[1] == ""


@pytest.mark.parametrize("name", NAMES)
def test_notes_doubts_and_citations_are_complete(name):
    declaration = db.get_declaration(name)
    card, recipe, checkpoint = backbone_card.card(declaration), declaration.recipe, declaration.checkpoint
    for sentence in (*recipe.notes, *recipe.unverified, *checkpoint.unverified):
        assert f"\n* {sentence}\n" in card
    for paper in filter(None, (recipe.paper, checkpoint.paper)):
        assert paper.bibtex in card
    assert "More Information Needed" not in card
    assert "None |" not in card


def test_an_unknown_architecture_is_an_error_that_says_what_to_give():
    declaration = db.get_declaration("tinysd_gdf")
    anonymous = Declaration("my_model_gdf", replace(declaration.checkpoint, name="my_model"), declaration.recipe)
    with pytest.raises(ValueError, match="no architecture for my_model"):
        backbone_card.card(anonymous)
    assert "48@8" in backbone_card.card(anonymous, package_configs(declaration.checkpoint))


# The code that they paste.


@pytest.mark.parametrize("name", ["tinysd_gdf", "tinysd_dift"])
def test_usage_runs_as_it_stands(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(backbone_card.card(db.get_declaration(name))):
        run(block, {})


def test_usage_of_a_saved_folder(tmp_path):
    backbone = db.create_model("tinysd_gdf", pretrained=True)
    backbone.save_pretrained(tmp_path)
    (block,) = blocks(backbone_card.card(backbone.declaration, backbone.configs))
    run(block, {}, FOLDER=str(tmp_path))


def test_usage_of_a_recipe_of_ones_own():
    declaration = db.get_declaration("tinysd_gdf")
    card = backbone_card.card(declaration, load='db.create_model("tinysd", recipe="recipe.yaml")')
    (block,) = blocks(card)
    assert '\nbackbone = db.create_model("tinysd", recipe="recipe.yaml")\n' in block
    assert "torch.hub" not in card


def test_text_from_a_users_recipe_stays_in_its_place():
    """A bar or a line break must not end a cell, a row or a list item."""
    declaration, nasty = db.get_declaration("tinysd_gdf"), "a | b\n\n## c\n| d |"
    recipe = declaration.recipe.override(prompt="x | y", source=nasty, notes=(nasty,), unverified=(nasty,))
    checkpoint = replace(declaration.checkpoint, status=nasty, title=nasty)
    card = backbone_card.card(replace(declaration, recipe=recipe, checkpoint=checkpoint))
    tame = declaration.recipe.override(prompt="x", source="a", notes=("a",), unverified=("a",))
    plain = backbone_card.card(replace(declaration, recipe=tame))
    heads = [[line for line in text.splitlines() if line.startswith("#")] for text in (card, plain)]
    assert heads[0] == heads[1]
    for line in card.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 6, 7), line
    assert r"| Prompt | 'x \| y', padded" in card
    assert r"| Source of the recipe | a \| b ## c \| d \| |" in card
    assert "\n* a | b ## c | d |\n" in card


# What is generated from them.


@pytest.mark.parametrize("name", NAMES)
def test_card_in_the_repository_is_current(name, generate):
    _, _, text = (ROOT / f"model_cards/{name}.md").read_text().partition("\n# ")
    assert text.partition("\n")[0] == generate.NOTICE
    assert text.partition("\n")[2] == backbone_card.card(db.get_declaration(name)).removeprefix("---\n")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_without_a_recipe_has_a_card(name, generate):
    """Current, readable by the hub, with its licence, its gate and every doubt; and its usage is that of the network,
    at full size on meta.
    """
    checkpoint = db.get_checkpoint(name)
    card = checkpoint_card.card(checkpoint)
    _, _, text = (ROOT / f"model_cards/{name}.md").read_text().partition("\n# ")
    assert text == f"{generate.NOTICE}\n{card.removeprefix('---' + chr(10))}"
    data = ModelCard(card).data
    assert data.license == checkpoint.license.id in HUB_LICENSES
    assert ("Access is gated" in card) == checkpoint.gated
    assert all(f"\n* {sentence}\n" in card for sentence in checkpoint.unverified)
    assert checkpoint.paper is None or checkpoint.paper.bibtex in card
    with torch.device("meta"):
        run(blocks(card)[0], {}, **{"pretrained=True": "pretrained=False"})


def test_check_names_what_is_not_current(generate, tmp_path, monkeypatch, capsys):
    declarations = [
        *map(db.get_declaration, NAMES),
        *(costs.whole_network(db.get_checkpoint(name)) for name in db.list_checkpoints()),
    ]
    known = {declaration: costs.costs(declaration) for declaration in declarations}
    monkeypatch.setattr(costs, "measure", known.__getitem__)  # as they are in costs.json; measuring takes a minute
    monkeypatch.setattr(costs, "FILE", tmp_path / "costs.json")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "CARDS", tmp_path / "model_cards")
    monkeypatch.setattr(generate, "README", tmp_path / "README.md")
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    (tmp_path / "model_cards/old_name.md").write_text("")
    (tmp_path / "model_cards/sd15_gdf.md").write_text("by hand")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace("1,117 + 640", "1,117 + 600"))
    (tmp_path / "costs.json").unlink()
    capsys.readouterr()
    assert generate.main(["--check"]) == 1
    named = {line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()}
    assert named == {"model_cards/old_name.md", "model_cards/sd15_gdf.md", "README.md", "costs.json"}
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0
    assert not (tmp_path / "model_cards/old_name.md").exists()


def test_generated_tables_keep_the_text_around_them(generate):
    assert (
        generate.fill("a\n<!-- zoo -->\nold\n<!-- /zoo -->\nb", {"zoo": "new"}, "page.md")
        == "a\n<!-- zoo -->\nnew\n<!-- /zoo -->\nb"
    )
    with pytest.raises(ValueError, match="page.md needs a line <!-- zoo -->"):
        generate.fill("no markers", {"zoo": "new"}, "page.md")


def test_wrong_arguments_of_generate(generate, capsys):
    assert generate.main(["--chekc"]) == 2
    assert "--check" in capsys.readouterr().err
