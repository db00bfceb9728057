"""The functional layer: invalid arguments are rejected in the same way on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastrnn.functional as F
from fastrnn.planner import PATHS, use_path

X = torch.zeros(5, 3, 2)
ROWS = torch.zeros(6, 2)
STATE = torch.zeros(1, 3, 4)


def weights(gates: int, *, hidden: int = 4, inputs: int = 2) -> list[torch.Tensor]:
    width = gates * hidden
    shapes = [(width, inputs), (width, hidden), (width,), (width,)]
    return [torch.zeros(shape) for shape in shapes]


GRU, LSTM = weights(3), weights(4)


def packed(*sizes: Any, dtype: torch.dtype = torch.int64) -> dict[str, torch.Tensor]:
    return {"batch_sizes": torch.tensor(sizes, dtype=dtype)}


BAD_SEQUENCES = {
    "no_weights": ((X, None, []), {}, ValueError, "begin with w_ih and w_hh"),
    "one_weight": ((X, None, GRU[:1]), {}, ValueError, "got 1 weights"),
    "scalar_weight": ((X, None, [X.sum(), *GRU]), {}, ValueError, "both 2-D"),
    "three_weights": ((X, None, GRU[:3]), {}, ValueError, "3 weights"),
    "other_gates": ((X, None, weights(4, hidden=5)), {}, ValueError, "do not make whole gru"),
    "bias_size": ((X, None, [*GRU[:3], GRU[3][1:]]), {}, ValueError, "weight 3 must be"),
    "one_direction": ((X, None, GRU), {"bidirectional": True}, ValueError, "2 direction"),
    "second_layer": ((X, None, GRU * 2), {}, ValueError, "weight 4 must be of shape .12, 4"),
    "hidden": ((X, None, [GRU[0], GRU[1][:, :3], *GRU[2:]]), {}, ValueError, "weight 1 must be"),
    "input_size": ((X[..., :1], None, GRU), {}, RuntimeError, "Expected 2, got 1"),
    "input_dims": ((X[0], None, GRU), {}, RuntimeError, "3 dimensions, got 2"),
    "no_steps": ((X[:0], None, GRU), {}, RuntimeError, "sequence length"),
    "state_size": ((X, STATE[:, 1:], GRU), {}, RuntimeError, "Expected hidden size"),
    "dropout": ((X, None, GRU), {"dropout": 1.5}, ValueError, "dropout .* got 1.5"),
    "batch_first": (
        (ROWS, None, GRU), {"batch_first": True, **packed(6)}, ValueError, "batch_first",
    ),
    "sizes_dtype": ((ROWS, None, GRU), packed(3, 3, dtype=torch.int32), ValueError, "torch.int32"),
    "sizes_float": ((ROWS, None, GRU), packed(3.0, 3.0, dtype=None), ValueError, "torch.float32"),
    "sizes_dims": ((ROWS, None, GRU), packed([3, 3]), ValueError, "got 2-D"),
    "sizes_sum": ((ROWS, None, GRU), packed(3, 2), ValueError, "6 rows .* got .3, 2."),
    "sizes_grow": ((ROWS, None, GRU), packed(2, 4), ValueError, "non-increasing"),
    "sizes_zero": ((ROWS, None, GRU), packed(6, 0), ValueError, "positive"),
    "sizes_negative": ((ROWS, None, GRU), packed(4, 3, -1), ValueError, "positive"),
    "sizes_long": ((ROWS, None, GRU), packed(*[1] * 9), ValueError, r"1, '...'"),
    "sizes_empty": ((ROWS[:0], None, GRU), packed(), RuntimeError, "sequence length"),
}  # fmt: skip


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("case", BAD_SEQUENCES)
def test_bad_sequence(case: str, path: str | None) -> None:
    args, options, error, text = BAD_SEQUENCES[case]
    with use_path(path), pytest.raises(error, match=text):
        F.gru(*args, **options)


BAD_STEPS = {
    "one_bias": ((X[0], None, *GRU[:3]), ValueError, "both or neither"),
    "bias_size": ((X[0], None, *GRU[:2], GRU[2][:1], GRU[3]), ValueError, "weight 2 must be"),
    "input_dims": ((X, None, *GRU), RuntimeError, "2 dimensions, got 3|1D or 2D"),
    "input_size": ((X[0, :, :1], None, *GRU), RuntimeError, "input_size: got 1,? expected 2"),
    "batch": ((X[0], STATE[0, 1:], *GRU), RuntimeError, "Input batch size 3 doesn't match hidden0"),
    "hidden": ((X[0], STATE[0, :, 1:], *GRU), RuntimeError, "hidden_size: got 3, expected 4"),
}


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("case", BAD_STEPS)
def test_bad_step(case: str, path: str | None) -> None:
    args, error, text = BAD_STEPS[case]
    with use_path(path), pytest.raises(error, match=text):
        F.gru_cell(*args)


@pytest.mark.parametrize("hx", [[STATE], [STATE] * 3])
def test_states_of_lstm_are_two(hx: list[torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        F.lstm(X, hx, LSTM)
    with pytest.raises(RuntimeError, match="lstm_cell expects two hidden states"):
        F.lstm_cell(X[0], [part[0] for part in hx], *LSTM)


def test_unknown_nonlinearity() -> None:
    with pytest.raises(ValueError, match="tanh, relu, identity, got 'sine'"):
        F.rnn(X, None, weights(1), nonlinearity="sine")
    with pytest.raises(ValueError, match="tanh, relu, identity, got 'sine'"):
        F.rnn_cell(X[0], None, *weights(1), nonlinearity="sine")


@pytest.mark.parametrize("path", ["torch", "kernels"])
def test_weights_may_be_any_sequence(path: str) -> None:
    parameters = torch.nn.ParameterList(torch.nn.GRU(X.shape[-1], 4).parameters())
    with use_path(path):
        y, _ = F.gru(X, None, parameters)
        assert y.equal(F.gru(X, None, tuple(parameters))[0])


@pytest.mark.parametrize("path", [None, *PATHS])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_recompute_changes_memory_and_nothing_else(cell, path):
    module = getattr(torch.nn, cell.upper())(3, 4, num_layers=2, bidirectional=True).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    weights = list(module.parameters())
    results, kept = [], []
    for recompute in (False, True):
        sizes: list[int] = []
        with (
            use_path(path),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
            ),
        ):
            y, _ = getattr(F, cell)(x, None, weights, bidirectional=True, recompute=recompute)
        results.append([y, *torch.autograd.grad(y.square().sum(), weights)])
        kept.append(sum(sizes))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    if path in ("kernels", "operators"):
        assert kept[1] < kept[0]
