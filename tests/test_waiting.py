"""A call reads values of a device once, before its networks run: whoever reads more waits for all that was started."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import diffusion_backbones as db

READING = {torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten.equal, torch.ops.aten.is_nonzero}


class Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: ``item`` and its like, and operations whose result has a size to be read."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func.overloadpacket in READING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["sd15_gdf", "sdxl_gdf", "sd3_medium_seg4diff", "flux_dev"])
def test_a_call_reads_the_range_of_its_image_alone(name, tiny_folder, monkeypatch):
    recipe = {"recipe": ["vit-block0-out"]} if name == "flux_dev" else {}
    checkpoint = name if recipe else db.get_declaration(name).checkpoint.name
    backbone = db.create_model(name, checkpoint_path=tiny_folder(checkpoint), **recipe)
    side, lists, tolist = max(64, backbone.size_divisibility), [], torch.Tensor.tolist
    x = torch.rand(2, 3, side, side) * 2 - 1
    backbone(x)  # which keeps the noise
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: lists.append(tensor.shape) or tolist(tensor))
    with Reads() as reads:
        backbone(x)
    assert lists == [(2,)]  # the least and the largest value
    assert not reads.found


def test_what_reads_values_is_seen():
    x = torch.rand(3)
    with Reads() as reads:
        x.sum().item()
        bool(x[0] > 2)
        x.nonzero()
        torch.equal(x, x)
    assert len(reads.found) == 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_on_a_gpu_waits_once():
    backbone, x = db.create_model("tinysd_gdf", pretrained=True, device="cuda"), torch.zeros(2, 3, 64, 64).cuda()
    backbone(x)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            backbone(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in told if "synchroniz" in str(warning.message)]) == 1
