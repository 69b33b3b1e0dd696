"""What is remembered of operations on meta is what PyTorch computes, and nothing else is remembered."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffusion_backbones as db
from diffusion_backbones.ops.known_shapes import KnownShapes


def layouts(backbone, x):
    """Shape, strides and dtype of what every module gives, and the operations counted."""
    seen, handles = [], []
    for name, module in backbone.named_modules():
        handles.append(module.register_forward_hook(lambda m, a, out, name=name: seen.append((name, *described(out)))))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(x)
    for handle in handles:
        handle.remove()
    return seen, counter.get_total_flops()


def described(out):
    return [
        (tuple(t.shape), t.stride(), t.dtype)
        for t in (out if isinstance(out, (list, tuple)) else [out])
        if isinstance(t, torch.Tensor)
    ]


@pytest.mark.parametrize("name", ["sd15_gdf", "flux_dev_ditf", "pixart_sigma_512"])
def test_networks_give_the_same_shapes_and_count_the_same(name):
    recipe = {"recipe": ["vit-block3-out"]} if "pixart" in name else {}
    backbone = db.create_model(name, device="meta", **recipe)
    x = torch.empty(2, 3, 128, 192, device="meta")
    expected = layouts(backbone, x)
    with KnownShapes():
        first, before = layouts(backbone, x), len(KnownShapes.known)
        second = layouts(backbone, x)
    assert first == second == expected
    assert len(KnownShapes.known) == before > 0


def test_other_arguments_are_other_operations():
    x = torch.empty(2, 6, device="meta")
    calls = [
        lambda: x.sum(0),
        lambda: x.sum(1),
        lambda: x.sum(0, keepdim=True),
        lambda: x.to(torch.float16),
        lambda: x.t() + 1,
        lambda: x * 2,
        lambda: x.to(torch.int64) * 2,
        lambda: x.to(torch.int64) * 2.0,
        lambda: x.to(torch.int64) * True,
        lambda: F.pad(x, (1, 0)),
        lambda: F.pad(x, (0, 1, 1, 0)),
        lambda: torch.cat([x, x]),
        lambda: torch.cat([x, x], dim=1),
        lambda: torch.zeros(3, device="meta"),
        lambda: torch.zeros(3, dtype=torch.int32, device="meta"),
        lambda: torch.native_layer_norm(x, (6,), None, None, 1e-5),
    ]
    expected = [described(call()) for call in calls]
    with KnownShapes():
        assert [described(call()) for call in calls * 2] == expected * 2


def test_values_views_and_changes_in_place_are_not_remembered():
    x, m = torch.arange(6.0), torch.empty(6, device="meta")
    with KnownShapes():
        for i in range(3):
            assert torch.equal(x + i, torch.arange(6.0) + i)
            assert torch.equal(torch.full((2,), float(i)), torch.tensor([i, i]).float())
            assert m.view(2, 3)._base is m
            assert m.add_(1) is m
            y = x.clone()
            y[0] = 9
            assert y[0] == 9
    assert torch.equal(x, torch.arange(6.0))


def test_gradients_pass():
    weight = torch.empty(3, 4, device="meta", requires_grad=True)
    with KnownShapes():
        for _ in range(2):
            out = torch.empty(2, 4, device="meta") @ weight.t()
            assert out.requires_grad
    out.sum().backward()
    assert weight.grad.shape == (3, 4)
