"""Recipes and checkpoints as data: digests, files, pickles, the old spelling of a setting, the bibliography."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import yaml

import diffusion_backbones as db
from diffusion_backbones import Checkpoint, Recipe
from diffusion_backbones.models.papers import FILE, papers, read
from diffusion_backbones.spec import registry
from diffusion_backbones.spec.input_format import FORMATS, InputFormat

LEVELS = (("up-level2-repeat1-vit-out", "up-level2-upsampler-out"), "up-level1-upsampler-out")
RECIPE = Recipe("mine", LEVELS, timestep=51, discard=[3, 5], normalize="layer", paper=papers["meng2024gdf"])


# Digests name cached features and the rows of costs.json, so they are those of version 0.1.


def test_a_digest_is_what_it_was():
    assert db.get_declaration("sd15_gdf").recipe.digest == "5cfc777cf7cf"
    assert db.get_declaration("flux_dev_ditf").recipe.digest == "ec10af389b81"
    assert RECIPE.digest == "aa5e119c3a92"


def test_an_integer_stays_an_integer():
    assert json.dumps(RECIPE.to_dict()["timestep"]) == "51"


def test_scalars_of_numpy_are_numbers():
    recipe = RECIPE.override(timestep=np.float64(0.5), ensemble=np.int64(2), scaled=np.bool_(False))
    assert (recipe.timestep, recipe.ensemble, recipe.scaled) == (0.5, 2, False)
    assert recipe.digest == RECIPE.override(timestep=0.5, ensemble=2, scaled=False).digest


# Files.


@pytest.mark.parametrize("name", db.list_models())
def test_every_recipe_survives_yaml_and_json(name, tmp_path):
    recipe = db.get_declaration(name).recipe
    recipe.to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    assert Recipe.from_file(tmp_path / "recipe.yaml") == Recipe.from_file(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize("name", db.list_checkpoints())
def test_every_checkpoint_survives_json(name):
    checkpoint = db.get_checkpoint(name)
    assert Checkpoint.from_dict(json.loads(json.dumps(asdict(checkpoint)))) == checkpoint


@pytest.mark.parametrize("name", FORMATS)
def test_every_input_format_survives_json(name):
    assert InputFormat.from_dict(json.loads(json.dumps(FORMATS[name]._asdict()))) == FORMATS[name]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gated": "no"}, ValueError, "checkpoint: gated: expected bool, got 'no'"),
        ({"license": None}, ValueError, "checkpoint: license: expected mapping, got None"),
        ({"license": {"id": "other"}}, ValueError, "checkpoint: license: .*needs the licence's name="),
        ({"license": {"idd": "mit"}}, TypeError, "checkpoint: license has no setting 'idd'. Did you mean id"),
        ({"mirrors": ["a/b", 3]}, ValueError, r"checkpoint: mirrors\[1\]: expected str, got 3"),
        ({"denoiser": {"repo": "a/b"}}, ValueError, "checkpoint: denoiser: lacks the field 'filename'"),
        ({"licence": "mit"}, TypeError, "checkpoint has no setting 'licence'. Did you mean license"),
    ],
)
def test_a_checkpoint_that_cannot_be(change, error, words):
    with pytest.raises(error, match=words):
        Checkpoint.from_dict({**asdict(db.get_checkpoint("sd15")), **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"bgr": 0}, ValueError, "input_format: bgr: expected bool, got 0"),
        ({"mean": [0.5, 0.5]}, ValueError, r"input_format: mean: expected list of length 3, got \[0.5, 0.5\]"),
        ({"men": 1}, TypeError, "input_format has no setting 'men'. Did you mean mean"),
    ],
)
def test_an_input_format_that_cannot_be(change, error, words):
    with pytest.raises(error, match=words):
        InputFormat.from_dict({**FORMATS["symmetric"]._asdict(), **change})


# ``normalise`` is the spelling of version 0.1, and of files.


def test_files_keep_the_old_spelling_and_both_are_read(tmp_path):
    RECIPE.to_yaml(tmp_path / "recipe.yaml")
    data = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert data.pop("normalise") == "layer"
    assert "normalize" not in data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for key in ("normalise", "normalize"):
            assert Recipe.from_dict({**data, key: "layer"}) == RECIPE


def test_the_old_keyword_and_attribute_still_work():
    with pytest.warns(DeprecationWarning, match="normalize now"):
        assert Recipe("mine", LEVELS, normalise="layer").normalize == "layer"
    with pytest.warns(DeprecationWarning, match="normalize now"):
        assert RECIPE.override(normalise="none").normalize == "none"
    with pytest.warns(DeprecationWarning, match="normalize now"):
        assert replace(RECIPE, normalise="none").normalize == "none"
    with pytest.warns(DeprecationWarning, match="normalize now"):
        assert RECIPE.normalise == "layer"


def test_copies_and_pickles_are_equal_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for copied in (copy.deepcopy(RECIPE), pickle.loads(pickle.dumps(RECIPE)), replace(RECIPE), RECIPE.override()):
            assert copied == RECIPE


def test_a_pickle_of_the_last_version_is_read():
    """Its classes have the old module path, and its state the old spelling."""
    written = pickle.dumps(RECIPE, protocol=0)
    for new, old in ((b".spec.recipe", b".recipe"), (b".spec.checkpoint", b".recipe"), (b"normalize", b"normalise")):
        assert new in written
        written = written.replace(new, old)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert pickle.loads(written) == RECIPE


# The bibliography.


def test_the_bibliography_is_written_as_it_is_read():
    entries = [entry.strip() for entry in FILE.read_text(encoding="utf-8").split("\n\n") if not entry.startswith("%")]
    assert [paper.bibtex for paper in papers.values()] == entries


def test_every_entry_is_cited():
    cited = {db.get_checkpoint(name).paper for name in db.list_checkpoints()}
    cited |= {db.get_declaration(name).recipe.paper for name in db.list_models(include_tags=True)}
    cited |= {paper for name in registry.list_fusions() for paper in registry.get_fusion(name).papers}
    assert cited - {None} == set(papers.values())


def test_an_unknown_key_names_the_closest():
    with pytest.raises(KeyError, match=r"references.bib has no entry 'meng2023gdf'. Did you mean meng2024gdf"):
        papers["meng2023gdf"]


ENTRY = "@misc{a,\n  title = {T},\n  author = {A},\n  year = {2024},\n  url = {https://x}\n}\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENTRY.replace("@misc", "@article"), "expected @misc entries.*got '@article"),
        (ENTRY.replace("{T}", "{T"), "expected @misc entries"),
        (ENTRY.replace("url =", "note ="), "'a' must appear once.*it has title, author, year, note"),
        (ENTRY.replace("  year = {2024},\n", ""), "'a' must appear once.*it has title, author, url"),
        (ENTRY + ENTRY, "'a' must appear once"),
        (ENTRY + "stray text\n", "got 'stray text'"),
    ],
)
def test_a_bibliography_that_cannot_be(text, words):
    assert read(ENTRY)["a"].url == "https://x"
    with pytest.raises(ValueError, match=words):
        read(text)
