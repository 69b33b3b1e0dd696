"""Shared fixtures: tiny checkpoints, written once a session. Nothing touches the user's caches or the network."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

CACHE = tempfile.mkdtemp(prefix="diffusion_backbones_tests_")
os.environ["HF_HOME"] = CACHE
os.environ["HF_HUB_OFFLINE"] = os.environ.get("HF_HUB_OFFLINE", "0")
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"  # nobody listens: an accidental download fails at once
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.pop("DIFFUSION_BACKBONES_CACHE", None)
THREADS = max(1, (os.cpu_count() or 2) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # of the processes that tests start too: more threads than cores only wait

gc.disable()  # until everything is imported, of which nothing is garbage

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.transforms.functional import to_tensor  # noqa: E402

from diffusion_backbones.reports import costs  # noqa: E402

torch.set_num_threads(THREADS)
PHOTO = Path(__file__).parent.parent / "docs" / "cat.jpg"


def pytest_collection_finish():
    """What was imported stays, so later collections need not look at its million objects."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """``tiny_folder("sd15")`` -> a diffusers folder with that checkpoint's topology, written once."""
    written: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in written:
            written[name] = tiny.folder(name, tmp_path_factory.mktemp(name))
        return written[name]

    return get


@pytest.fixture(scope="session")
def photo() -> torch.Tensor:
    """A real photograph, (1, 3, 300, 451) in [-1, 1]: not square, and no multiple of anything."""
    return to_tensor(Image.open(PHOTO).convert("RGB"))[None] * 2 - 1


@pytest.fixture(scope="module")
def one_thread():
    """For networks this small a second thread costs more than it gives, above all where other processes run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def costs_not_measured(monkeypatch):
    """Saving a backbone writes its card, and counting the operations of a tiny network, whose costs are not published,
    takes longer than the rest. ``test_cards`` and ``test_saved`` count them.
    """
    nothing = costs.Costs(
        size=64, parameters=0, parameters_total=0, encoder_parameters=0, denoiser_gflops=0.0, encoder_gflops=0.0
    )
    monkeypatch.setattr(costs, "measure", lambda *_: nothing)
