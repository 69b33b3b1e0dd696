"""Every library on every kind of pyramid: a decoder sees the backbone's own maps, learns from them, and predicts at an
odd size.
"""

from __future__ import annotations

import csv
import itertools

import decoders
import pytest
import torch

import diffusion_backbones as db

CELLS = list(itertools.product(decoders.LIBRARIES, decoders.BACKBONES))


@pytest.fixture(scope="module")
def table():
    """The rows that the docs show, by library and backbone."""
    with decoders.TABLE.open(newline="") as file:
        return {(row["library"], row["backbone"]): row for row in csv.DictReader(file)}


@pytest.mark.parametrize(("library", "backbone"), CELLS)
def test_a_decoder_learns_and_predicts(library, backbone, tiny_folder, table):
    decoder, keywords = decoders.build(library, backbone, tiny_folder)
    net = next(m for m in decoder.model.modules() if isinstance(m, db.DiffusionBackbone))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    frozen = {id(p) for p in net.parameters()}
    steps = decoders.train(decoder)
    losses = [next(steps)]
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    added = {name: p.grad for name, p in decoder.model.named_parameters() if id(p) not in frozen}
    assert [name for name, grad in added.items() if grad is None or not grad.isfinite().all()] == [], (
        "the step does not reach them"
    )
    losses += steps
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())

    seen = []
    decoder.source.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], decoder.maps(output))))
    prediction = decoders.infer(decoder)
    assert prediction.shape[-2:] == decoders.ODD
    assert prediction.numel()
    ((x, maps),) = seen
    height, width = decoders.ODD
    torch.testing.assert_close(
        x[..., :height, :width], decoders.symmetric(decoders.sample(decoders.ODD, 1)[0]), rtol=0, atol=1e-6
    )
    expected = decoders.original(**keywords | ({"out_strides": decoder.strides} if decoder.strides else {}))(x)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))

    measured = decoders.row(library, backbone, keywords, losses, prediction)
    same = ("decoder", "strides", "prediction")
    assert {key: measured[key] for key in same} == {key: table[library, backbone][key] for key in same}, (
        "python tests/decoders.py"
    )


def test_the_table_has_every_cell_and_no_other(table):
    assert list(table) == CELLS
