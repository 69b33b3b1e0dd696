"""torch.hub, through torch's own functions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffusion_backbones as db

ROOT = Path(__file__).parent.parent


@pytest.fixture
def hub(monkeypatch):
    """torch.hub with this repository where it looks for its copy of a GitHub repository."""
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", lambda *_, **__: str(ROOT))
    return torch.hub


def test_hub_lists_what_is_registered(hub):
    assert sorted(hub.list("owner/repository")) == sorted([*db.list_models(), *db.list_fusions()])


@pytest.mark.parametrize("name", ["tinysd_gdf", "sd21_dift"])
def test_help_has_an_example(hub, name):
    text = hub.help("owner/repository", name)
    assert f'torch.hub.load(".", "{name}", source="local")' in text
    assert "pretrained is True" in text


def test_entries_load_weights_by_default(hub):
    backbone = hub.load(str(ROOT), "tinysd_gdf", source="local", out_indices=(0, 2))
    same = db.create_model("tinysd_gdf", pretrained=True, out_indices=(0, 2))
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), same(x), strict=True))
    assert backbone.provenance == same.provenance != {}


def test_entries_pass_keywords_on(hub):
    backbone = hub.load(str(ROOT), "sd15_gdf", source="local", pretrained=False, device="meta", timestep=99)
    assert backbone.declaration.recipe.timestep == 99
    with pytest.raises(TypeError, match="timestep"):
        hub.load(str(ROOT), "sd15_gdf", source="local", pretrained=False, device="meta", timstep=99)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)


def test_a_missing_dependency_is_named():
    process = run(
        f"import sys; sys.modules['yaml'] = None\nimport torch; torch.hub.load({str(ROOT)!r}, 'tinysd_gdf', "
        "source='local')"
    )
    assert "Missing dependencies: yaml" in process.stderr


def test_a_clone_that_is_not_installed_works():
    """Late imports and pickles included: torch.hub takes the clone off sys.path again."""
    process = run(f"""
import pickle, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [entry for entry in sys.path if entry not in ("", {str(ROOT)!r})]
import torch
backbone = torch.hub.load({str(ROOT)!r}, "tinysd_gdf", source="local")
assert {str(ROOT)!r} not in sys.path
backbone = pickle.loads(pickle.dumps(backbone))
print([tuple(level.shape) for level in backbone(torch.zeros(1, 3, 64, 64), prompt="a cat")], end=" ")
print(backbone.feature_info.channels())
""")
    assert process.stdout == "[(1, 48, 8, 8), (1, 96, 4, 4), (1, 224, 2, 2)] [48, 96, 224]\n", process.stderr


def test_importing_the_entries_loads_no_network():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import hubconf; assert 'diffusers' not in sys.modules; "
        "assert 'torch' not in sys.modules"
    )
    assert run(code).returncode == 0
