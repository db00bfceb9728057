"""Heads, ensembles, recurrent dropout and zoneout in the kernels, against the oracle."""

from __future__ import annotations

import pytest
import torch
import triton
from kernel_harness import as_on_a_device
from test_kernels_flow import (
    BATCH,
    Layer,
    Numbers,
    _as_on_a_gpu,
    _one_thread,
    assert_right,
    by_kernels,
    by_reference,
    check,
    draw,
    mode,
    take,
)

from fastrnn import cpu, flow, gpu, groups
from fastrnn.call import Cotangents
from fastrnn.cells import CELLS
from fastrnn.kernels import launch

__all__ = ["_as_on_a_gpu", "_one_thread", "mode"]

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="runs in Triton's interpreter"
)

PLAIN = {"lengths": False, "resets": False, "bptt": None, "fresh": False}
LAYERS = {
    "heads": Layer("lstm", 2, heads=3),
    "heads-plain": Layer("gru", 2, heads=2, **PLAIN),
    "heads-extra": Layer("peephole_lstm", heads=2, save=cpu.STATES),
    "members": Layer("lstm", 2, members=2),
    "members-plain": Layer("gru", 2, members=3, **PLAIN, save=cpu.STATES),
    "members-extra": Layer("peephole_lstm", members=2, bias=False),
    "one-member": Layer("rnn_tanh", 2, members=1, **PLAIN),
    "members-of-heads": Layer("gru", 2, heads=2, members=2),
    "members-of-heads-plain": Layer("slstm", heads=3, members=2, **PLAIN, state=False),
    "drop": Layer("lstm", 2, drop=True),
    "drop-plain": Layer("gru", drop=True, **PLAIN),
    "drop-again": Layer("rnn_tanh", 2, drop=True, bptt=None, save=cpu.STATES),
    "units": Layer("lstm", 2, zones=("units", "units")),
    "units-plain": Layer("gru", zones=("units",), **PLAIN),
    "units-of-c": Layer("lstm", zones=("", "units"), traced=False, d_traced=False),
    "units-of-h": Layer("lstm", 2, zones=("units", ""), save=cpu.STATES),
    "units-of-elman": Layer("rnn_tanh", 2, zones=("units",)),
    "units-of-extra": Layer("peephole_lstm", zones=("units", "units")),
    "share": Layer("lstm", zones=("share", "share"), **PLAIN),
    "share-of-elman": Layer("rnn_relu", zones=("share",), save=cpu.STATES),
    "share-of-gru": Layer("gru", 2, zones=("share",)),
    "mixed": Layer("slstm", 2, drop=True, zones=("units", "share", "", "units")),
    "all": Layer("lstm", 2, heads=2, members=2, drop=True, zones=("units", "share")),
    "all-plain": Layer(
        "peephole_lstm", 2, heads=2, members=2, drop=True, zones=("share", "units"), **PLAIN
    ),
    "half": Layer("gru", 2, heads=2, members=2, drop=True, zones=("units",), dtype=torch.float16),
    "half-share": Layer("lstm", drop=True, zones=("share", "units"), dtype=torch.float16),
}


@pytest.mark.sweep(7)
@pytest.mark.parametrize("layer", [pytest.param(layer, id=name) for name, layer in LAYERS.items()])
def test_layers(mode, layer):
    check(layer)


def test_all_groups_are_one_launch(monkeypatch):
    take(monkeypatch, "resident")
    grids, launched = [], launch._all_at_once

    def watched(name, config, operands, *others):
        grids.append((name, launch._grid(config, operands)))
        launched(name, config, operands, *others)

    monkeypatch.setattr(launch, "_all_at_once", watched)
    by_kernels(layer := LAYERS["all"], draw(layer))
    assert grids == [("forward_kernel", (1, 1, 8)), ("backward_kernel", (1, 1, 8))]


@pytest.mark.parametrize("name", ["members-of-heads", "all", "units-of-extra"])
def test_gradients_of_every_sample(monkeypatch, name):
    """Weight gradients of every part of the batch; here, of every row of each member."""
    take(monkeypatch, "resident")
    layer = LAYERS[name]
    numbers, members = draw(layer), max(1, layer.members)
    count = members * BATCH
    results = by_kernels(layer, numbers, groups=count)
    for part in range(count):
        own = part_of(numbers, part, count, part // BATCH)
        exact = by_reference(layer._replace(members=0), own)
        exact = {name: truth for name, truth in exact.items() if name.startswith("d_weights")}
        assert_right(layer, {name: results[name][part] for name in exact}, exact)


def part_of(numbers: Numbers, part: int, count: int, member: int) -> Numbers:
    """One of `count` parts of the batch."""
    call, given = numbers
    weights = [w[member] for w in call.weights] if call.members else call.weights
    dy, *others = (
        [groups.piece(tensor, part, count) for tensor in tensors]
        for tensors in ([given.dy], given.d_final, given.d_traces)
    )
    own = groups.part_of_batch(call._replace(weights=weights), part, count)
    return Numbers(own, Cotangents(dy[0], *others))


@pytest.mark.parametrize("name", ["half", "units-of-elman", "drop"])
@pytest.mark.parametrize("save", [cpu.NOTHING, cpu.STATES, cpu.ALL])
def test_fake_tensors_are_those_of_the_kernels(monkeypatch, name, save):
    take(monkeypatch, "resident")
    call, _ = draw(LAYERS[name])
    with as_on_a_device():
        _, saved = gpu.forward(call, save, False)
    fake = gpu.fake_saved(call, save)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in saved]


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "slstm"])
def test_a_unit_that_is_kept_keeps_its_bits(mode, cell):
    """Whatever the step computes, even NaN."""
    count = CELLS[cell].n_states
    layer = Layer(cell, zones=("units",) * count, **PLAIN)
    call, _ = draw(layer)
    noise = [call.flow.noise[0], *(torch.ones_like(part) for part in call.flow.noise[1:])]
    call = call._replace(x=torch.full_like(call.x, torch.nan), flow=flow.Flow(noise=noise))
    with as_on_a_device():
        (y, final, traces), _ = gpu.forward(call, cpu.NOTHING, True)
    for part, sequence, last in zip(call.state, [y, *traces], final, strict=True):
        assert torch.equal(sequence, part.expand_as(sequence))
        assert torch.equal(last, part)
