"""The documents: their code runs and prints what it says, their links and commands exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from snippets import blocks, promised

import diffusion_backbones as db
from diffusion_backbones.spec.activations import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/README.md",
    "docs/activations.md",
    "docs/checkpoints.md",
    "docs/memory.md",
    "docs/postprocessing.md",
    "docs/timesteps.md",
    "docs/fusion.md",
    "docs/finetuning.md",
    "docs/tinysd.md",
    "docs/selection.md",
    "docs/examples/README.md",
    *(
        f"docs/decoders/{name}.md"
        for name in ("README", "smp", "torchvision", "transformers", "openmmlab", "detectron2")
    ),
    "model_cards/README.md",
]

RUN = """
import contextlib, json, sys
with contextlib.redirect_stdout(sys.stderr):            # mmseg prints what it does not find
    import detectron2_source, mmseg.datasets
from snippets import printed
names, out = {}, []
for block in json.load(sys.stdin):
    out.append(printed(block, names))
json.dump(out, sys.stdout)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder in which the paths of the README exist and files can be written."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "docs").symlink_to(ROOT / "docs")
    return folder


def run(command: list[str], clone: Path, text: str = "") -> str:
    paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "tests")}
    process = subprocess.run(
        command, input=text, cwd=clone, env={**os.environ, **paths}, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_block_of_the_readme_runs_and_prints_what_it_says(clone):
    """In the order of the page: commands of the package first run where they stand, everything in one session."""
    shell = [
        line
        for block in blocks(README, "bash")
        for line in block.splitlines()
        if line.startswith("diffusion-backbones ")
    ]
    assert shell, "the README shows no command"
    for line in shell:
        run(["bash", "-ec", line], clone)
    code = blocks(README)
    out = json.loads(run([sys.executable, "-c", RUN], clone, json.dumps(code)))
    assert out == [promised(block) for block in code]
    assert all(promised(block) for block in code), "a block that shows no output"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    targets = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()) if "://" not in target]
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []


@pytest.mark.parametrize("document", [*DOCUMENTS, ".ci/run"])
def test_make_targets_exist(document):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = re.findall(r"(?:^|`)make ([a-z]+)", (ROOT / document).read_text(), flags=re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_zoo_is_complete():
    for name in db.list_models(include_tags=True):
        assert f"[`{name}`](model_cards/{name}.md)" in README
    read = {db.get_declaration(name).checkpoint.name for name in db.list_models(include_tags=True)}
    for name in set(db.list_checkpoints()) - read:
        assert f"| [`{name}`](model_cards/{name}.md) |" in README


def test_the_declaration_shown_is_the_one_registered():
    """README and CONTRIBUTING show sd15_legacy; a reader may compare."""
    declaration = db.get_declaration("sd15_legacy")
    for document in ("README.md", "CONTRIBUTING.md"):
        shown = re.search(
            r"levels=\((.*?)\n    \),\n    timestep=(\d+)", (ROOT / document).read_text(), flags=re.DOTALL
        )
        assert re.findall(r'"(.*?)"', shown[1]) == list(declaration.recipe.ids)
        assert int(shown[2]) == declaration.recipe.timestep


def test_the_table_of_levels_is_that_of_stable_diffusion():
    catalogue = tiny.denoiser_catalogue("sd15")
    row = r"^\| `(.*?)` \| (\d+)@(\d+) \| (?:(\d) repeats, )?(none|1 block).*? \| (?:`(.*?)` (\d+)@(\d+)|none) \|$"
    rows = re.findall(row, (ROOT / "docs/activations.md").read_text(), flags=re.MULTILINE)
    assert len(rows) == 9
    for level, channels, stride, repeats, blocks_, sampler, sampled, sampled_stride in rows:
        res = catalogue[f"{level}-repeat0-res-out"]
        assert (res.channels, res.stride) == (int(channels), int(stride))
        assert len(catalogue.find(f"{level}*-vit-out")) == (0 if blocks_ == "none" else int(repeats or 1))
        assert len(catalogue.find(f"{level}-*sampler-out")) == bool(sampler)
        if sampler:
            site = catalogue[f"{level}-{sampler}"]
            assert (site.channels, site.stride) == (int(sampled), int(sampled_stride))


def test_every_kind_of_activation_is_documented():
    catalogue = tiny.denoiser_catalogue("sd15")
    text = (ROOT / "docs/activations.md").read_text()
    for kind in {parse(site.id).kind for site in catalogue.all()}:
        assert re.search(rf"\b{kind}\b", text), f"{kind} is not in docs/activations.md"


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == db.__version__
    assert citation["license"] == "Apache-2.0"
    assert db.__version__ in (ROOT / "CHANGELOG.md").read_text()
