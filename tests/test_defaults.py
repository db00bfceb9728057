"""Results do not depend on torch's default device and dtype, meant for tensors a user creates."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fastrnn
from fastrnn import convert, functional, testing
from fastrnn.planner import use_path

STEPS, BATCH = 9, 4
LENGTHS = [9, 3, 0, 7]


@contextlib.contextmanager
def other_defaults():
    """Defaults of a program that computes on another device, in another dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if before == torch.float32 else torch.float32)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


LAYERS = {
    "lstm": lambda **options: fastrnn.LSTM(6, 8, **options),
    "projected": lambda **options: fastrnn.LSTM(6, 8, proj_size=3, **options),
    "gru": lambda **options: fastrnn.GRU(6, 8, **options),
    "rnn": lambda **options: fastrnn.RNN(6, 8, **options),
    "identity": lambda **options: fastrnn.RNN(6, 8, nonlinearity="identity", **options),
    "layernorm_lstm": lambda **options: fastrnn.LayerNormLSTM(6, 8, **options),
    "layernorm_gru": lambda **options: fastrnn.LayerNormGRU(6, 8, **options),
    "peephole_lstm": lambda **options: fastrnn.PeepholeLSTM(6, 8, **options),
    "slstm": lambda **options: fastrnn.SLSTM(6, 8, **options),
    "gru_reset_before": lambda **options: fastrnn.ResetBeforeGRU(6, 8, **options),
}
BUILT = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    "noisy": {"zoneout": 0.2, "recurrent_dropout": 0.3, "weight_dropout": 0.1},
    "heads": {"num_heads": 2, "bidirectional": True},
}


def calls():
    """Arguments of a call by name, created under torch's own defaults."""
    x, lengths = torch.randn(STEPS, BATCH, 6), torch.tensor(LENGTHS)
    reset = torch.rand(STEPS, BATCH) < 0.3
    packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
    return {
        "nothing": (x, {}),
        "lengths": (x, {"lengths": lengths}),
        "number": (x[:, 0], {"lengths": 7}),
        "reset": (x, {"reset": reset}),
        "states": (x, {"return_states": True, "lengths": lengths}),
        "gates": (x, {"return_states": "gates", "reset": reset}),
        "bptt": (x, {"bptt": 2}),
        "recompute": (x, {"recompute": True, "lengths": lengths}),
        "chunks": (x, {"recompute": 2, "lengths": lengths}),
        "packed": (packed, {}),
        "packed_reset": (packed, {"reset": reset, "return_states": True}),
        "half": (x.bfloat16(), {"lengths": lengths}),
    }


def run(module, argument, given):
    """Results and gradients, always with the same seed."""
    torch.manual_seed(1)
    tensors = [t for t in tree_leaves(module(argument, **given)) if t is not None]
    value = sum(t.float().square().sum() for t in tensors if t.is_floating_point())
    grads = torch.autograd.grad(value, list(module.parameters()))
    return [t.detach() for t in tensors], grads


@pytest.mark.sweep(7)
@pytest.mark.parametrize("path", [None, "kernels", "reference"])
@pytest.mark.parametrize(
    ("name", "build"),
    [pair for pair in itertools.product(LAYERS, BUILT) if pair != ("projected", "heads")],
)
def test_every_option(name, build, path):
    module = LAYERS[name](**BUILT[build])
    for call, (argument, given) in calls().items():
        if call == "gates" and not fastrnn.cells.CELLS[module._cell].activations:
            continue
        module.to(torch.bfloat16 if call == "half" else torch.float32)
        with use_path(path):
            expected = run(module, argument, given)
            with other_defaults():
                found = run(module, argument, given)
        for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert a.device == b.device, call
            assert a.dtype == b.dtype, call
            assert torch.equal(a, b), call


@pytest.mark.parametrize("path", [None, "kernels", "reference"])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(name, path):
    cell, x = getattr(fastrnn, name)(6, 8), torch.randn(BATCH, 6)
    with use_path(path):
        expected = run(cell, x, {})
        with other_defaults():
            found = run(cell, x, {})
    assert all(map(torch.equal, tree_leaves(found), tree_leaves(expected)))


def test_transforms_and_second_derivatives():
    gru, x = fastrnn.GRU(6, 8, dtype=torch.float64), torch.randn(STEPS, BATCH, 6).double()
    lengths = torch.tensor(LENGTHS)

    def loss(x):
        return gru(x, lengths=lengths)[0].square().sum()

    def results():
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(inputs), inputs, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), inputs)
        mapped = torch.func.vmap(lambda one: gru(one)[0])(torch.stack([x, x]))
        _, tangent = torch.func.jvp(loss, (x,), (x,))
        return [grad, second, mapped, torch.func.grad(loss)(x), tangent]

    expected = results()
    with other_defaults():
        found = results()
    assert all(map(torch.equal, found, expected))


def test_functions():
    gru, x = fastrnn.GRU(6, 8, bidirectional=True), torch.randn(STEPS, BATCH, 6)
    weights, lengths = list(gru.parameters()), torch.tensor(LENGTHS)
    expected = functional.gru(x, None, weights, bidirectional=True, lengths=lengths)
    with other_defaults():
        found = functional.gru(x, None, weights, bidirectional=True, lengths=lengths)
    assert all(map(torch.equal, found, expected))


def test_diagnose():
    lstm, x = fastrnn.LSTM(6, 8, bidirectional=True), torch.randn(STEPS, BATCH, 6)
    packed = pack_padded_sequence(x, torch.tensor([9, 3, 1, 7]), enforce_sorted=False)
    for argument, given in ((x, {}), (x, {"lengths": torch.tensor(LENGTHS)}), (packed, {})):
        expected = str(fastrnn.diagnose(lstm, argument, **given))
        with other_defaults():
            assert str(fastrnn.diagnose(lstm, argument, **given)) == expected


def test_convert_and_verify():
    gru = fastrnn.GRU(6, 8)
    arrays = convert.to_keras(gru)
    case = testing.draw_case("gru", seed=0, index=4)
    expected = testing.check_case(case, torch.float32)
    with other_defaults():
        other = fastrnn.GRU(6, 8, device="cpu", dtype=torch.float32)
        convert.from_keras(other, arrays)
        assert testing.check_case(case, torch.float32) == expected
    assert torch.equal(other.weight_hh_l0, gru.weight_hh_l0)
