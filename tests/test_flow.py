"""Lengths, resets, all states and truncated gradients against sequences run one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import call_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import functional, reference
from fastrnn.cells import CELLS
from fastrnn.planner import PATHS, use_path

MODULES = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 3}),
    "gru": (fastrnn.GRU, {}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "rnn_identity": (fastrnn.RNN, {"nonlinearity": "identity"}),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.05}


def one_by_one(module, x, hx, lengths, reset, fresh, bptt):
    """The meaning of the options: each row alone, split into sequences, step by step.

    Returns the output, the final states and the states of all steps.
    """
    directions = 2 if module.bidirectional else 1
    weights = [list(w) for w in module.all_weights]
    steps, batch, _ = x.shape
    traces, finals = [], []
    for k in range(module.num_layers):
        columns, last = [], []
        for b in range(batch):
            length = steps if lengths is None else int(lengths[b])
            starts = [] if reset is None else [t for t in range(length) if reset[t, b]]
            own, ends = [], []
            for d in range(directions):
                n = k * directions + d
                w, s = weights[n], [part[n, b] for part in hx]
                found: dict[int, list[Tensor]] = {}
                for t in reversed(range(length)) if d else range(length):
                    before = t + 1 if d else t  # the boundary that the walk crosses at this step
                    if bptt and before % bptt == 0 and 0 < before < length:
                        s = [part.detach() for part in s]
                    if before in starts and (before < length):
                        s = [part[n, b if part.shape[1] > 1 else 0] for part in fresh]
                    s = [part[0] for part in reference.step(
                        call_of(module._cell, x[t, b][None], [part[None] for part in s], w)
                    )]  # fmt: skip
                    found[t] = s
                own.append([found.get(t, [torch.zeros_like(p) for p in s]) for t in range(steps)])
                ends.append(s)
            columns.append(own)
            last.append(ends)
        # (T, D, B, ·) for every state
        layers = [
            torch.stack([
                torch.stack([torch.stack([columns[b][d][t][i] for b in range(batch)])
                             for d in range(directions)])
                for t in range(steps)
            ])
            for i in range(len(hx))
        ]  # fmt: skip
        traces.append(layers)
        finals += [[torch.stack([last[b][d][i] for b in range(batch)]) for i in range(len(hx))]
                   for d in range(directions)]  # fmt: skip
        x = layers[0].transpose(1, 2).flatten(2)
    states = [torch.cat(parts, dim=1) for parts in zip(*traces, strict=True)]
    return x, [torch.stack(parts) for parts in zip(*finals, strict=True)], states


def draw(seed: int, name: str, dtype: torch.dtype):
    """A module and all arguments that it may be called with."""
    generator = torch.Generator().manual_seed(seed)

    def integer(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    def flip() -> bool:
        return bool(torch.rand(1, generator=generator) < 0.5)

    cls, options = MODULES[name]
    steps, batch, hidden = integer(7), integer(4), integer(20) + 4 * ("proj_size" in options)
    torch.manual_seed(seed)
    module = cls(
        integer(5), hidden, num_layers=integer(2), bias=flip(), bidirectional=flip(),
        batch_first=flip(), dtype=dtype, **options,
    )  # fmt: skip
    count = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or hidden] + [hidden] * (CELLS[module._cell].n_states - 1)

    def states(rows: int) -> list[Tensor]:
        return [
            torch.randn(count, rows, width, dtype=dtype, requires_grad=True) for width in widths
        ]

    given = {}
    if flip():
        given["lengths"] = torch.randint(0, steps + 1, (batch,), generator=generator)
    if flip():
        given["reset"] = torch.rand(steps, batch, generator=generator) < 0.3
        if flip():
            given["reset_state"] = states(batch if flip() else 1)
    if flip():
        given["bptt"] = integer(4)
    x = torch.randn(steps, batch, module.input_size, dtype=dtype, requires_grad=True)
    return module, x, states(batch), given


def as_argument(state: list[Tensor] | None):
    return state if state is None else tuple(state) if len(state) > 1 else state[0]


def call(module, x, hx, given, **more):
    """The module's results, time first and as lists."""
    given = {k: as_argument(v) if k == "reset_state" else v for k, v in given.items()}
    if module.batch_first:
        x = x.transpose(0, 1)
        if "reset" in given:
            given["reset"] = given["reset"].t()
    output, final, *states = module(x, as_argument(hx), **given, **more)
    final = list(final) if isinstance(final, tuple) else [final]
    return output.transpose(0, 1) if module.batch_first else output, final, *states


def check(ours, exact, tolerance):
    for a, b in zip(ours, exact, strict=True):
        if a is None or b is None:  # the gradient of something unused
            assert a is None or (a == 0).all()
            assert b is None or (b == 0).all()
            continue
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODULES)
def test_every_option_with_every_other(name, dtype):
    for seed in range(12):
        module, x, hx, given = draw(seed, name, dtype)
        fresh = given.get("reset_state")
        leaves = [x, *hx, *(fresh or []), *module.parameters()]
        zeros = [torch.zeros_like(part) for part in hx]
        y, final, states = one_by_one(
            module, x, hx, given.get("lengths"), given.get("reset"), fresh or zeros,
            given.get("bptt"),
        )  # fmt: skip
        exact = [y, *final, *states]
        cotangents = [torch.randn_like(part) for part in exact]
        exact_grads = torch.autograd.grad(exact, leaves, cotangents, allow_unused=True)
        for path, recompute in (
            (None, False),
            ("kernels", True),
            ("kernels", 3),
            ("reference", False),
        ):
            with use_path(path):
                output, final, states = call(
                    module, x, hx, given, return_states=True, recompute=recompute
                )
            ours = [output, *final, *(part for part in states if part is not None)]
            grads = torch.autograd.grad(ours, leaves, cotangents, allow_unused=True)
            check([*ours, *grads], [*exact, *exact_grads], TOLERANCE[dtype])


@pytest.mark.parametrize("given_state", [True, False])
@pytest.mark.parametrize("given_fresh", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_one_step_begins_anew(name, given_fresh, given_state):
    """A reset before the only step, as in a policy's rollout, from any previous state."""
    for seed in range(40):
        module, x, hx, _ = draw(seed, name, torch.float64)
        if module.bidirectional and seed > 8:  # the reverse direction is not reset
            continue
        x = x[:1].detach().requires_grad_()
        reset = torch.rand(1, x.shape[1]) < 0.5
        if seed % 2 and not module.bidirectional:
            hx = [
                part.detach().masked_fill(reset.t(), float("nan")).requires_grad_() for part in hx
            ]
        zeros = [torch.zeros_like(part) for part in hx]
        fresh = [torch.randn_like(part, requires_grad=True) for part in hx]
        given = {"reset": reset, **({"reset_state": fresh} if given_fresh else {})}
        begin, anew = hx if given_state else zeros, fresh if given_fresh else zeros
        y, final, states = one_by_one(module, x, begin, None, reset, anew, None)
        leaves = [x, *(hx if given_state else ()), *(fresh if given_fresh else ())]
        leaves += module.parameters()
        wanted = seed % 3 == 0
        output, last, *all_states = call(
            module, x, hx if given_state else None, given, return_states=wanted
        )
        last += [part for found in all_states for part in found if part is not None]
        exact = [y, *final, *(states if wanted else ())]
        cotangents = [torch.randn_like(part) for part in exact]
        exact_grads = torch.autograd.grad(exact, leaves, cotangents, allow_unused=True)
        grads = torch.autograd.grad([output, *last], leaves, cotangents, allow_unused=True)
        check([output, *last, *grads], [*exact, *exact_grads], TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gates_and_gradients_through_them(name):
    for seed in range(8):
        module, x, hx, given = draw(seed, name, torch.float64)
        fresh = given.get("reset_state")
        *_, states = call(module, x, hx, given, return_states="gates")
        # The gates determine the states, so both must have the same gradients.
        before = torch.cat([hx[0][None], states.h[:-1]])
        if module.bidirectional or given:
            gates = states.gates.chunk(CELLS[name].n_gates, dim=-1)
            alive = (states.gates != 0).any(-1, keepdim=True)
            if name == "lstm":
                h = gates[3] * torch.tanh(states.c)
                check([h * alive], [states.h], 1e-12)
            continue
        gates = states.gates.chunk(CELLS[name].n_gates, dim=-1)
        if name == "gru":
            h = (1 - gates[1]) * gates[2] + gates[1] * before
        else:
            c = gates[1] * torch.cat([hx[1][None], states.c[:-1]]) + gates[0] * gates[2]
            h = gates[3] * torch.tanh(c)
        check([h], [states.h], 1e-12)
        leaves = [x, *hx, *(fresh or []), *module.parameters()]
        cotangent = torch.randn_like(h)
        check(
            torch.autograd.grad(h, leaves, cotangent, retain_graph=True),
            torch.autograd.grad(states.h, leaves, cotangent),
            1e-10,
        )


@pytest.mark.parametrize("name", MODULES)
def test_packed_sequences_take_the_same_options(name):
    for seed in range(12):
        module, x, hx, given = draw(seed, name, torch.float64)
        module.batch_first = False
        steps, batch, _ = x.shape
        lengths = given.pop("lengths", torch.full((batch,), steps)).clamp(min=1)
        lengths[0] = steps
        given["bptt"] = given.get("bptt", 2)
        padded, final, states = call(
            module, x, hx, {**given, "lengths": lengths}, return_states=True
        )
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        output, final_2, states_2 = call(module, packed, hx, given, return_states=True)
        assert isinstance(output, PackedSequence)
        assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
        check([pad_packed_sequence(output)[0], *final_2], [padded, *final], 1e-12)
        check([s for s in states_2 if s is not None], [s for s in states if s is not None], 1e-12)
        if "reset" in given:
            given["reset"] = pack_padded_sequence(given["reset"], lengths, enforce_sorted=False)
            output, *_ = call(module, packed, hx, given)
            check([pad_packed_sequence(output)[0]], [padded], 1e-12)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_half_precision(name):
    for seed in range(6):
        module, x, hx, given = draw(seed, name, torch.bfloat16)
        wide = [t.detach().double() for t in (x, *hx)]
        given = {k: [p.detach() for p in v] if k == "reset_state" else v for k, v in given.items()}
        output, final, states = call(module, x, hx, given, return_states=True)
        assert output.dtype == states.h.dtype == final[-1].dtype == torch.bfloat16
        given = {k: [p.double() for p in v] if k == "reset_state" else v for k, v in given.items()}
        exact, *_ = call(module.double(), wide[0], wide[1:], given)
        check([output], [exact], TOLERANCE[torch.bfloat16])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_lengths_are_what_packing_does(data):
    """Against torch.nn.LSTM with PackedSequence, for lengths of at least 1 in any order."""
    batch = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    hidden, bidirectional = data.draw(st.integers(1, 33)), data.draw(st.booleans())
    torch.manual_seed(0)
    ours = fastrnn.LSTM(3, hidden, num_layers=2, bidirectional=bidirectional)
    x = torch.randn(9, batch, 3)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    expected, (h, c) = ours.to_torch()(packed)
    y, (h_n, c_n) = ours(x, lengths=torch.tensor(lengths))
    expected, _ = pad_packed_sequence(expected, total_length=9)
    check([y, h_n, c_n], [expected, h, c], 1e-5)


def test_a_row_without_steps():
    lstm = fastrnn.LSTM(3, 5, bidirectional=True)
    hx = (torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5, requires_grad=True))
    for lengths in ([0, 4, 2], [0, 0, 0]):
        y, (h, c) = lstm(torch.randn(4, 3, 3), hx, lengths=torch.tensor(lengths))
        assert (y[:, 0] == 0).all()
        assert torch.equal(h[:, 0], hx[0][:, 0])
        assert torch.equal(c[:, 0], hx[1][:, 0])
        d_h, d_c = torch.autograd.grad((h.sum(), c.sum()), hx)
        assert (d_h[:, 0] == 1).all()
        assert (d_c[:, 0] == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("path", [None, "kernels", "reference"])
def test_nothing_crosses_a_reset(name, path, bad):
    """Neither values nor gradients, not even if they are NaN or infinite."""
    cls, options = MODULES[name]
    module = cls(3, 6, **options)
    x = torch.randn(6, 2, 3)
    x[1, 0] = bad
    x.requires_grad_()
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[3, 0] = True
    with use_path(path):
        y, _ = module(x, reset=reset)
        alone, _ = module(x[3:, :1])
        (dx,) = torch.autograd.grad(y[3:].sum(), x)
    torch.testing.assert_close(y[3:, :1], alone)
    assert y[3:].isfinite().all()
    assert y[:, 1].isfinite().all()
    assert dx[3:].isfinite().all()


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_reset_is_the_loop_of_reinforcement_learning(cls):
    """As in CleanRL: the state is multiplied by 1 - done before each step."""
    module = cls(4, 8, num_layers=2)
    x, done = torch.randn(12, 5, 4), torch.rand(12, 5) < 0.2
    state = torch.randn(2, 5, 8)
    hx = (state, state.clone()) if cls is fastrnn.LSTM else state
    y, _ = module(x, hx, reset=done)
    outputs, stock = [], module.to_torch()
    for x_t, done_t in zip(x, done, strict=True):
        keep = (~done_t).float()[:, None]
        hx = tuple(keep * part for part in hx) if cls is fastrnn.LSTM else keep * hx
        output, hx = stock(x_t[None], hx)
        outputs.append(output)
    check([y], [torch.cat(outputs)], 1e-6)


def test_a_learned_state_after_resets():
    gru = fastrnn.GRU(3, 5)
    start = torch.nn.Parameter(torch.randn(1, 1, 5))
    reset = torch.rand(9, 4) < 0.3
    y, _ = gru(torch.randn(9, 4, 3), start.expand(-1, 4, -1), reset=reset, reset_state=start)
    y.sum().backward()
    assert start.grad.abs().min() > 0


def test_the_state_of_all_steps_begins_other_calls():
    """`states.h[t]` is the initial state of a call that continues after step t."""
    lstm = fastrnn.LSTM(3, 5, num_layers=2)
    x = torch.randn(7, 2, 3)
    y, _, states = lstm(x, return_states=True)
    rest, _ = lstm(x[4:], (states.h[3], states.c[3]))
    torch.testing.assert_close(rest, y[4:])


@pytest.mark.parametrize("k", [1, 3, 50])
def test_truncated_gradients_are_those_of_separate_calls(k):
    lstm = fastrnn.LSTM(3, 6, num_layers=2, dtype=torch.float64)
    x = torch.randn(10, 2, 3, dtype=torch.float64)
    y, _ = lstm(x, bptt=k)
    grads = torch.autograd.grad(y.square().sum(), lstm.parameters())
    hx, loss = None, 0.0
    for part in x.split(k):
        output, hx = lstm(part, hx)
        hx = tuple(s.detach() for s in hx)
        loss = loss + output.square().sum()
    for a, b in zip(grads, torch.autograd.grad(loss, lstm.parameters()), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_second_derivatives_with_every_option(cls):
    module = cls(1, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 1, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([3, 2])
    reset = torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.bool)
    start = torch.randn(2, 1, 2, dtype=torch.float64, requires_grad=True)

    def run(x, start):
        state = (start, start * 2) if cls is fastrnn.LSTM else start
        # No bptt: it truncates gradients, so they would not match finite differences.
        y, _, states = module(
            x, lengths=lengths, reset=reset, reset_state=state, return_states=True
        )
        return y, states.h, *([states.c] if states.c is not None else [])

    assert torch.autograd.gradcheck(run, (x, start))
    assert torch.autograd.gradgradcheck(run, (x, start))


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_unbatched(cls):
    module = cls(3, 5, num_layers=2)
    x = torch.randn(6, 3)
    reset = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool)
    y, _, states = module(x, lengths=5, reset=reset, return_states=True)
    y_2, _, states_2 = module(
        x[:, None], lengths=torch.tensor([5]), reset=reset[:, None], return_states=True
    )
    torch.testing.assert_close(y, y_2[:, 0])
    torch.testing.assert_close(states.h, states_2.h[:, :, 0])
    torch.testing.assert_close(module(x, lengths=torch.tensor(5), reset=reset)[0], y)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"lengths": torch.tensor([4, 5])}, "from 0 to the 4 steps of input, got 5"),
        ({"lengths": torch.tensor([4, -1])}, "from 0 to the 4 steps of input, got -1"),
        ({"lengths": torch.tensor([4])}, r"of shape \(2,\), got \(1,\)"),
        ({"lengths": torch.tensor([4.0, 2.0])}, "torch.int64 or torch.int32, got torch.float32"),
        ({"lengths": [4, 2]}, "torch.int64 or torch.int32, got list"),
        ({"lengths": torch.ones(2, dtype=torch.int64, device="meta")}, "must be on cpu"),
        ({"reset": torch.zeros(4, 2)}, "must be a tensor of torch.bool, got torch.float32"),
        ({"reset": torch.zeros(2, 4, dtype=torch.bool)}, r"of shape \(4, 2\), got \(2, 4\)"),
        ({"reset": torch.zeros(4, 2, dtype=torch.bool, device="meta")}, "must be on cpu"),
        ({"reset_state": torch.zeros(1, 2, 5)}, "reset_state was given without reset"),
        (
            {"reset": torch.zeros(4, 2, dtype=torch.bool), "reset_state": torch.zeros(1, 3, 5)},
            r"reset_state\[0\] must be of shape \(1, 2, 5\) or \(1, 1, 5\), got \(1, 3, 5\)",
        ),
        ({"bptt": 0}, "bptt must be None or a positive number of steps, got 0"),
        ({"bptt": 2.5}, "bptt must be None or a positive number of steps, got 2.5"),
        ({"recompute": 0}, "recompute must be True, False or a positive number of steps"),
        ({"recompute": "full"}, "recompute must be True, False or a positive number of steps"),
        ({"return_states": "all"}, "return_states must be False, True or 'gates', got 'all'"),
    ],
)
def test_what_is_refused(given, text):
    gru, x = fastrnn.GRU(3, 5), torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match=text):
        gru(x, **given)


def test_more_that_is_refused():
    x = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="not supported for the cell rnn_tanh"):
        fastrnn.RNN(3, 5)(x, return_states="gates")
    packed = pack_padded_sequence(x, torch.tensor([4, 2]))
    with pytest.raises(ValueError, match="packed sequence, which has its own"):
        fastrnn.GRU(3, 5)(packed, lengths=torch.tensor([4, 2]))
    reset = torch.zeros(4, 2, dtype=torch.bool)
    state = torch.zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        functional.lstm(
            x, None, list(fastrnn.LSTM(3, 5).parameters()), reset=reset, reset_state=[state]
        )
    with pytest.raises(RuntimeError, match="not the same dtype"):
        fastrnn.GRU(3, 5)(x, reset=reset, reset_state=state.double())


def test_wrong_lengths_that_nobody_looks_at_are_not_a_number():
    """As on a GPU, where checking them would make the host wait."""
    gru, x = fastrnn.GRU(3, 5), torch.randn(4, 3, 3)
    y = torch.func.vmap(lambda lengths: gru(x, lengths=lengths, reset=x[..., 0] > 0)[0])(
        torch.tensor([[4, 5, -1], [1, 2, 4]])
    )
    assert y[0, :, 1:].isnan().all()
    assert y[0, :, 0].isfinite().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_what_torch_lacks_runs_on_any_path(path):
    with use_path(path):
        y, _ = fastrnn.GRU(3, 5)(torch.randn(4, 2, 3), lengths=torch.tensor([4, 1]))
    assert (y[1:, 1] == 0).all()


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU])
def test_functional_has_the_same_options(cls):
    module = cls(3, 5)
    x, lengths = torch.randn(4, 2, 3), torch.tensor([4, 2])
    function = getattr(functional, cls.__name__.lower())
    ours = function(x, None, list(module.parameters()), lengths=lengths, return_states=True)
    expected = module(x, lengths=lengths, return_states=True)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (ours, expected)), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_outputs_do_not_share_memory():
    lstm, x = fastrnn.LSTM(3, 5), torch.randn(1, 2, 3)
    y, hx, states = lstm(x, return_states=True, lengths=torch.tensor([1, 1]))
    pointers = [t.untyped_storage().data_ptr() for t in (y, *hx, states.h, states.c)]
    assert all(a != b for a, b in itertools.combinations(pointers, 2))


def test_a_packed_batch_is_checked_before_it_is_sorted():
    gru, x = fastrnn.GRU(3, 5, batch_first=True), torch.randn(3, 6, 3)
    packed = pack_padded_sequence(
        x, torch.tensor([2, 6, 4]), batch_first=True, enforce_sorted=False
    )
    for rows in (2, 5):
        with pytest.raises(
            ValueError, match=rf"reset must be of shape \(6, 3\), got \(6, {rows}\)"
        ):
            gru(packed, reset=torch.zeros(rows, 6, dtype=torch.bool))
    reset = torch.zeros(3, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reset_state\[0\] must be of shape"):
        gru(packed, reset=reset, reset_state=torch.zeros(1, 4, 5))
    for call in (
        lambda: gru(packed, reset=reset.tolist()),
        lambda: gru(x[0], reset=reset[0].tolist()),
    ):
        with pytest.raises(ValueError, match=r"tensor of torch\.bool, got list"):
            call()
    state = torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match=r"reset_state\[0\] must be a tensor, got tuple"):
        gru(x, reset=reset, reset_state=(state,))
    with pytest.raises(ValueError, match="reset_state of lstm must be a tuple of 2, got a tensor"):
        fastrnn.LSTM(3, 5, batch_first=True)(x, reset=reset, reset_state=state)
    for rate in ("x", -0.1, (0.1, 2.0)):
        with pytest.raises(ValueError, match="zoneout"):
            fastrnn.GRU(3, 5, zoneout=rate)
    assert fastrnn.LSTM(3, 5, zoneout=(0.0, 0.0)).to_torch()


def test_a_traced_call_does_not_trust_its_example():
    gru, x = fastrnn.GRU(3, 5).requires_grad_(False), torch.randn(4, 2, 3)
    traced = torch.jit.trace(
        lambda x, lengths: gru(x, lengths=lengths)[0], (x, torch.tensor([4, 2])), check_trace=False
    )
    torch.testing.assert_close(
        traced(x, torch.tensor([1, 4])), gru(x, lengths=torch.tensor([1, 4]))[0]
    )
    assert traced(x, torch.tensor([5, -1])).isnan().all()


@pytest.mark.parametrize("name", MODULES)
def test_traces_of_every_option_serve_other_sizes(name):
    """Tracing must not warn: warnings are errors here."""
    cls, options = MODULES[name]
    module = cls(3, 5, num_layers=2, bidirectional=True, **options).requires_grad_(False)

    def run(x, lengths, reset, *fresh):
        given = {"lengths": lengths, "reset": reset, "reset_state": as_argument([*fresh])}
        y, _, states = module(x, **given, bptt=3, return_states=True)
        return y, states.h

    def arguments(steps, batch):
        fresh = [torch.randn(4, 1, 5) for _ in range(CELLS[module._cell].n_states)]
        fresh[0] = fresh[0][..., : module.proj_size or 5]
        lengths = torch.randint(0, steps + 1, (batch,))
        return torch.randn(steps, batch, 3), lengths, torch.rand(steps, batch) < 0.3, *fresh

    traced = torch.jit.trace(run, arguments(7, 3), check_trace=False)
    for sizes in ((7, 3), (4, 5), (9, 1)):
        given = arguments(*sizes)
        for a, b in zip(traced(*given), run(*given), strict=True):
            torch.testing.assert_close(a, b)


def test_states_under_autocast_have_the_dtype_of_h():
    lstm = fastrnn.LSTM(3, 5, proj_size=2)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, _), states = lstm(torch.randn(4, 2, 3), return_states=True)
    assert y.dtype == h.dtype == states.h.dtype


def test_zoneout_of_one_mask_for_all_that_are_mapped():
    gru, x = fastrnn.GRU(3, 5, zoneout=0.5, recurrent_dropout=0.5), torch.randn(4, 2, 3)
    y = torch.func.vmap(lambda x: gru(x)[0], randomness="same")(torch.stack([x, x]))
    assert torch.equal(y[0], y[1])
    y = torch.func.vmap(lambda x: gru(x)[0], randomness="different")(torch.stack([x, x]))
    assert not torch.equal(y[0], y[1])


def test_recompute_inside_of_transforms():
    gru, x = fastrnn.GRU(3, 5, dtype=torch.float64), torch.randn(6, 2, 3, dtype=torch.float64)
    grads = [
        torch.func.grad(lambda x, k=k: gru(x, recompute=k)[0].square().sum())(x)
        for k in (False, True, 2)
    ]
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0])
