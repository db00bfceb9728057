"""Layers of other cells, heads and the kinds of dropout, against formulas written out here."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from test_flow import one_by_one
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn.functional import Options, sequence
from fastrnn.planner import use_path

VARIANTS = {
    "layernorm_lstm": fastrnn.LayerNormLSTM,
    "layernorm_gru": fastrnn.LayerNormGRU,
    "gru_reset_before": fastrnn.ResetBeforeGRU,
    "peephole_lstm": fastrnn.PeepholeLSTM,
    "slstm": fastrnn.SLSTM,
}
N_STATES = {"lstm": 2, "layernorm_lstm": 2, "peephole_lstm": 2, "slstm": 4}
PROJECTED = ("layernorm_lstm", "peephole_lstm", "slstm")
sigmoid, tanh, exp = torch.sigmoid, torch.tanh, torch.exp


def norm(v: Tensor) -> Tensor:
    mean = v.sum(-1, keepdim=True) / v.shape[-1]
    variance = ((v - mean) ** 2).sum(-1, keepdim=True) / v.shape[-1]
    return (v - mean) / (variance + 1e-5) ** 0.5


def step(kind: str, x: Tensor, state: list[Tensor], p: dict[str, Tensor]) -> list[Tensor]:
    """One step of one direction; `p` has the weights by name, without suffix."""
    h = state[0]
    wx, rh = x @ p["weight_ih"].T, h @ p["weight_hh"].T
    b_ih, b_hh = p.get("bias_ih", torch.zeros(1)), p.get("bias_hh", torch.zeros(1))
    size = p["weight_ih"].shape[0] // (3 if "gru" in kind else 4)
    if "layernorm" in kind:
        wx, rh = p["gain_ih"] * norm(wx), p["gain_hh"] * norm(rh)
    wx, rh = wx + b_ih, rh + b_hh

    def gate(k: int) -> Tensor:
        return (wx + rh)[:, k * size : (k + 1) * size]

    if kind == "layernorm_gru":
        n = tanh(wx[:, 2 * size :] + sigmoid(gate(0)) * rh[:, 2 * size :])
        return [sigmoid(gate(1)) * h + (1 - sigmoid(gate(1))) * n]
    if kind == "gru_reset_before":
        w_n, b_n = p["weight_hh"][2 * size :], b_hh[2 * size :] if "bias_hh" in p else 0
        n = tanh(wx[:, 2 * size :] + (sigmoid(gate(0)) * h) @ w_n.T + b_n)
        return [sigmoid(gate(1)) * h + (1 - sigmoid(gate(1))) * n]
    i, f, g, o = (gate(k) for k in range(4))
    c = state[1]
    if kind == "layernorm_lstm":
        new_c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        new = [sigmoid(o) * tanh(norm(new_c) * p["gain_c"] + p["bias_c"]), new_c]
    elif kind == "peephole_lstm":
        p_i, p_f, p_o = p["weight_peephole"].view(3, size)
        new_c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
        new = [sigmoid(o + p_o * new_c) * tanh(new_c), new_c]
    else:  # without a stabiliser: c and n as with m = 0
        _, c, n, m = state
        new_m = torch.where(n == 0, i, torch.maximum(i, torch.log(sigmoid(f)) + m))
        c, n = sigmoid(f) * c * exp(m) + exp(i) * tanh(g), sigmoid(f) * n * exp(m) + exp(i)
        new = [sigmoid(o) * c / n, c / exp(new_m), n / exp(new_m), new_m]
    return [new[0] @ p["weight_hr"].T, *new[1:]] if "weight_hr" in p else new


def run(kind: str, module, x: Tensor, hx: list[Tensor]) -> list[Tensor]:
    """Run all layers of a module step by step; return the output and final states."""
    finals = []
    for k in range(module.num_layers):
        ys = []
        for d, suffix in enumerate(["", "_reverse"][: 2 if module.bidirectional else 1]):
            end = f"_l{k}{suffix}"
            p = {n.removesuffix(end): w for n, w in module.named_parameters() if n.endswith(end)}
            state = [part[k * (1 + module.bidirectional) + d] for part in hx]
            outputs = []
            for x_t in x.flip(0) if d else x:
                state = step(kind, x_t, state, p)
                outputs.append(state[0])
            ys.append(torch.stack(outputs[::-1] if d else outputs))
            finals.append(state)
        x = torch.cat(ys, -1)
    return [x, *(torch.stack(parts) for parts in zip(*finals, strict=True))]


def make(kind: str, **options):
    torch.manual_seed(3)
    module = VARIANTS[kind](3, 4, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in module.parameters():  # gains of 1 and offsets of 0 would hide mistakes
            p.add_(torch.randn_like(p) * 0.3)
    return module


def states(module, batch: int = 3) -> list[Tensor]:
    count = module.num_layers * (1 + module.bidirectional)
    widths = [module.proj_size or module.hidden_size]
    widths += [module.hidden_size] * (N_STATES.get(module._cell, 1) - 1)
    hx = [torch.randn(count, batch, width, dtype=torch.float64) for width in widths]
    if len(hx) == 4:
        hx[2] = hx[2].abs() + 1
    return [part.requires_grad_() for part in hx]


def as_hx(state: list[Tensor]):
    return tuple(state) if len(state) > 1 else state[0]


def flat(result) -> list[Tensor]:
    y, state, *_ = result
    return [y, *(state if isinstance(state, tuple) else (state,))]


def gradients(outputs, leaves):
    torch.manual_seed(5)
    loss = sum((t * torch.randn_like(t)).sum() for t in outputs)
    return torch.autograd.grad(loss, leaves)


def assert_equal(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


OPTIONS = {
    "plain": {},
    "stacked": {"num_layers": 2, "bidirectional": True},
    "unbiased": {"bias": False, "bidirectional": True},
    "projected": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("path", [None, "kernels"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id=f"{kind}-{name}")
        for kind, (name, options) in itertools.product(VARIANTS, OPTIONS.items())
        if name != "projected" or kind in PROJECTED
    ],
)
def test_against_the_formula(kind, options, path):
    module = make(kind, **options)
    hx, x = states(module), torch.randn(5, 3, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *hx, *module.parameters()]
    with use_path(path):
        ours = flat(module(x, as_hx(hx)))
    theirs = run(kind, module, x, hx)
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, leaves), gradients(theirs, leaves))
    zeros = [torch.zeros_like(part) for part in hx]
    with use_path(path):
        assert_equal(flat(module(x)), run(kind, module, x, zeros))


@pytest.mark.parametrize("path", ["reference", "kernels"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_derivatives(kind, path):
    module = VARIANTS[kind](1, 2, dtype=torch.float64)
    hx = [part.detach()[:, :1].requires_grad_() for part in states(module)]
    x, weights = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True), module._flat_weights
    count = len(hx)

    def function(x, *rest):
        y, final = sequence(kind, x, rest[:count], list(rest[count:]))
        return y, *final

    with use_path(path):
        assert torch.autograd.gradcheck(function, (x, *hx, *weights), fast_mode=path == "kernels")
        assert torch.autograd.gradgradcheck(function, (x, *hx, *weights), fast_mode=True)


@pytest.mark.parametrize("path", [None, "kernels"])
@pytest.mark.parametrize("kind", VARIANTS)
def test_flow_of_the_state(kind, path):
    module = make(kind, num_layers=2, bidirectional=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
    hx, fresh = states(module, 4), states(module, 1)
    given = {"lengths": torch.tensor([6, 0, 3, 5]), "reset": torch.rand(6, 4) < 0.3, "bptt": 4}
    expected = one_by_one(module, x, hx, *list(given.values())[:2], fresh, 4)
    given["reset_state"] = as_hx(fresh)
    leaves = [x, *hx, *fresh, *module.parameters()]
    with use_path(path):
        y, final, found = module(x, as_hx(hx), **given, return_states=True)
    y_expected, final_expected, found_expected = expected
    found = [part for part in (found.h, found.c, found.n, found.m) if part is not None]
    ours = [*flat((y, final)), *found]
    theirs = [y_expected, *final_expected, *found_expected]
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, leaves), gradients(theirs, leaves))
    with use_path(path):
        again = flat(module(x, as_hx(hx), **given, recompute=2))
    assert_equal(again, theirs[: len(again)])
    theirs = theirs[: len(again)]
    expected = one_by_one(module, x, hx, given["lengths"], given["reset"], fresh, 4)
    expected = [expected[0], *expected[1]]
    assert_equal(gradients(again, leaves), gradients(expected, leaves))


@pytest.mark.parametrize("kind", VARIANTS)
def test_forms_of_the_input(kind):
    module = make(kind, num_layers=2, bidirectional=True, batch_first=True)
    x, hx, lengths = torch.randn(3, 5, 3, dtype=torch.float64), states(module), [2, 5, 4]
    expected = flat(module(x, as_hx(hx), lengths=torch.tensor(lengths)))
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, *final = flat(module(packed, as_hx(hx)))
    assert_equal([pad_packed_sequence(y, batch_first=True)[0], *final], expected)
    alone = flat(module(x[0], as_hx([part[:, 0] for part in hx]), lengths=2))
    assert_equal(alone, [expected[0][0], *(part[:, 0] for part in expected[1:])])


def test_gates_of_layernorm():
    lstm, gru = make("layernorm_lstm", bidirectional=True), make("layernorm_gru", num_heads=2)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    _, _, found = lstm(x, return_states="gates")
    i, f, g, _ = found.gates.chunk(4, -1)
    before = torch.zeros_like(found.c)
    before[1:, 0], before[:-1, 1] = found.c[:-1, 0], found.c[1:, 1]
    assert_equal([f * before + i * g], [found.c])
    _, _, found = gru(x, return_states="gates")
    _, z, n = found.gates.chunk(3, -1)
    before = torch.cat([torch.zeros_like(found.h[:1]), found.h[:-1]])
    assert_equal([(1 - z) * n + z * before], [found.h])


@pytest.mark.parametrize("kind", ["gru_reset_before", "peephole_lstm", "slstm"])
def test_gates_that_are_not_there(kind):
    with pytest.raises(ValueError, match=f"not supported for the cell {kind}"):
        make(kind)(torch.zeros(2, 1, 3, dtype=torch.float64), return_states="gates")


@pytest.mark.parametrize("kind", VARIANTS)
def test_module(kind):
    module = make(kind, num_layers=2, bidirectional=True, num_heads=2)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    expected = flat(module(x))
    assert isinstance(module, torch.nn.RNNBase)
    assert not isinstance(module, (torch.nn.LSTM, torch.nn.GRU))
    assert not hasattr(module, "to_torch")
    assert [n for n, _ in module.named_parameters()] == module._flat_weights_names
    assert [len(w) for w in module.all_weights] == [len(module._flat_weights) // 4] * 4
    assert repr(module).endswith("(3, 4, num_layers=2, bidirectional=True, num_heads=2)")

    other = VARIANTS[kind](3, 4, 2, bidirectional=True, num_heads=2).double()
    other.load_state_dict(module.state_dict())
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    empty = VARIANTS[kind](3, 4, 2, bidirectional=True, num_heads=2, device="meta")
    empty.load_state_dict(module.state_dict(), assign=True)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    copies += [other, torch.load(buffer, weights_only=False), empty, module.float().double()]
    for made in copies[:-1]:
        assert_equal(flat(made(x)), expected)
    assert_equal(flat(copies[-1](x)), flat(copies[-1](x)))
    torch.optim.SGD(other.parameters(), 1.0).zero_grad()
    doubled = {name: p * 2 for name, p in other.named_parameters()}
    replaced = torch.func.functional_call(other, doubled, (x,))
    other.load_state_dict(doubled)
    assert_equal(flat(replaced), flat(other(x)))


@pytest.mark.parametrize("kind", VARIANTS)
def test_initial_weights(kind):
    torch.manual_seed(1)
    module = VARIANTS[kind](3, 50)
    torch.manual_seed(1)
    stock = (torch.nn.GRU if "gru" in kind else torch.nn.LSTM)(3, 50)
    for name, p in stock.named_parameters():
        assert torch.equal(p, module.get_parameter(name))
    for again in (False, True):
        if again:
            with torch.no_grad():
                for p in module.parameters():
                    p.zero_()
            module.reset_parameters()
        for name, p in module.named_parameters():
            if name.startswith("gain"):
                assert (p == 1).all()
            elif name == "bias_c_l0":
                assert (p == 0).all()
            else:
                assert p.abs().max() <= 50**-0.5
                assert p.std() > 0.4 * 50**-0.5


def test_refused_arguments():
    x = torch.zeros(2, 3, 3)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        fastrnn.LayerNormGRU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match="zoneout of slstm must be a number or 4 numbers, got 2"):
        fastrnn.SLSTM(3, 4, zoneout=(0.1, 0.1))
    with pytest.raises(TypeError, match="hx of SLSTM must be a tuple of 4 tensors, got Tensor"):
        fastrnn.SLSTM(3, 4)(x, torch.zeros(1, 3, 4))
    with pytest.raises(RuntimeError, match="slstm expects 4 hidden states"):
        fastrnn.SLSTM(3, 4)(x, (torch.zeros(1, 3, 4),) * 3)
    with pytest.raises(TypeError, match="hx of LayerNormGRU must be a tensor, got tuple"):
        fastrnn.LayerNormGRU(3, 4)(x, (torch.zeros(1, 3, 4),) * 2)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[3\] size \(1, 3, 4\), got \[1, 2"):
        fastrnn.SLSTM(3, 4)(x, (*[torch.zeros(1, 3, 4)] * 3, torch.zeros(1, 2, 4)))
    with pytest.raises(RuntimeError, match="all parts of hx should also be 3-D but got"):
        fastrnn.SLSTM(3, 4)(x, (*[torch.zeros(1, 3, 4)] * 3, torch.zeros(3, 4)))
    with pytest.raises(ValueError, match="RNN input dtype"):
        fastrnn.SLSTM(3, 4)(x.double())


@pytest.mark.parametrize("kind", VARIANTS)
def test_half_precision_and_autocast(kind, monkeypatch):
    low = torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # oneDNN fuses the LSTM
    module, x = make(kind).float(), torch.randn(4, 2, 3)
    half = copy.deepcopy(module).to(low)
    assert {part.dtype for part in flat(half(x.to(low)))} == {low}
    torch.testing.assert_close(half(x.to(low))[0].float(), module(x)[0], rtol=0.1, atol=0.05)
    stock = fastrnn.GRU if "gru" in kind else fastrnn.LSTM
    with torch.autocast("cpu", dtype=low):
        expected = {part.dtype for part in flat(stock(3, 4)(x))}
        assert {part.dtype for part in flat(module(x))} == expected


def test_transforms():
    slstm = make("slstm")
    xs = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    mapped = torch.func.vmap(lambda x: slstm(x)[0])(xs)
    assert_equal(mapped, [slstm(x)[0] for x in xs])
    _, tangent = torch.func.jvp(lambda x: slstm(x)[0], (xs[0],), (xs[1],))
    _, pull_back = torch.func.vjp(lambda x: slstm(x)[0], xs[0])
    assert_equal([(tangent * tangent).sum()], [(pull_back(tangent)[0] * xs[1]).sum()])


# sLSTM


def test_slstm_keeps_exponentials_in_range():
    slstm = fastrnn.SLSTM(3, 4)
    for scale in (1e3, -1e3, 1e6):
        x = (torch.randn(50, 2, 3) * scale).requires_grad_()
        y, (*_, n, m) = slstm(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert all(t.isfinite().all() for t in (y, n, m, dx))
        assert (n >= 1).all()
        assert y.abs().max() <= 1


def test_slstm_does_not_depend_on_the_scale_of_its_state():
    slstm = make("slstm")
    x, (h, c, n, m) = torch.randn(4, 3, 3, dtype=torch.float64), states(slstm)
    y, final = slstm(x, (h, c, n, m))
    for a in (0.5, -2.0):
        factor = math.exp(a)
        z, moved = slstm(x, (h, c * factor, n * factor, m - a))
        assert_equal([z], [y])
        assert_equal([moved[1] * moved[3].exp()], [final[1] * final[3].exp()])


# Heads


DENSE = {
    "lstm": (fastrnn.LSTM, {}),
    "gru": (fastrnn.GRU, {}),
    "rnn": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "slstm": (fastrnn.SLSTM, {}),
    "gru_reset_before": (fastrnn.ResetBeforeGRU, {}),
}


def with_heads(name: str, **options):
    """A module with 2 heads, and a dense one with the heads' matrices in a block diagonal."""
    cls, own = DENSE[name]
    torch.manual_seed(4)
    module = cls(3, 6, num_heads=2, dtype=torch.float64, **own, **options)
    dense = cls(3, 6, dtype=torch.float64, **own, **options)
    dense.load_state_dict({n: dense_matrix(n, p.detach()) for n, p in module.named_parameters()})
    return module, dense


def dense_matrix(name: str, weight: Tensor) -> Tensor:
    if "weight_hh" not in name:
        return weight
    gates = [
        torch.block_diag(*gate.split(weight.shape[1])) for gate in weight.split(2 * weight.shape[1])
    ]
    return torch.cat(gates)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (name, path)
        for name in DENSE
        for path in (None, "kernels", "reference", "torch")
        if name not in VARIANTS or path in (None, "kernels")
    ],
)
def test_heads_are_a_block_diagonal_matrix(name, path):
    module, dense = with_heads(name, num_layers=2, bidirectional=True)
    assert module.weight_hh_l1.shape == (module.weight_ih_l0.shape[0], 3)
    x = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    hx = states(module, 4)
    options = {"lengths": torch.tensor([5, 0, 2, 4]), "return_states": True}
    for input, state, given in (
        (x, None, {}),
        (x, as_hx(hx), {}),
        (None, None, {}),
        (x, as_hx(hx), {"reset": torch.rand(5, 4) < 0.3, "bptt": 2, "recompute": 2}),
        (x, as_hx(hx), options),
    ):
        results = []
        for own in (module, dense):
            packed = pack_padded_sequence(x, [5, 2, 3, 1], enforce_sorted=False)
            with use_path(path):
                result = own(packed if input is None else input, state, **given)
            y, *final = flat(result)
            y = pad_packed_sequence(y)[0] if input is None else y
            found = [part for part in (result[2] if len(result) > 2 else ()) if part is not None]
            outputs = [y, *final, *found]
            leaves = [x, *(hx if state is not None else ()), *own.parameters()]
            results.append(outputs + list(gradients(outputs, leaves)))
        mask = {n: dense_matrix(n, torch.ones_like(p)) for n, p in module.named_parameters()}
        count = len(results[0]) - len(mask)
        assert_equal(results[0][:count], results[1][:count])
        for (n, m), a, b in zip(mask.items(), results[0][count:], results[1][count:], strict=True):
            torch.testing.assert_close(dense_matrix(n, a) * m, b * m, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_gates_of_heads(name):
    module, dense = with_heads(name, bidirectional=True)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    ours, theirs = (m(x, return_states="gates")[2].gates for m in (module, dense))
    assert_equal([ours], [theirs])


def test_heads_with_noise():
    """Masks are drawn for the whole layer, so they are the same as without heads."""
    module, dense = with_heads("lstm", recurrent_dropout=0.5, zoneout=(0.2, 0.3))
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    for training in (True, False):
        results = []
        for m in (module.train(training), dense.train(training)):
            torch.manual_seed(6)
            results.append(flat(m(x)))
        assert_equal(*results)


def test_heads_that_are_refused():
    with pytest.raises(ValueError, match="num_heads must be a divisor of hidden_size, which is 6"):
        fastrnn.LSTM(3, 6, num_heads=4)
    with pytest.raises(ValueError, match=r"num_heads must be a divisor .* got 0"):
        fastrnn.GRU(3, 6, num_heads=0)
    with pytest.raises(ValueError, match="num_heads=2 cannot be used with proj_size=3"):
        fastrnn.LSTM(3, 6, num_heads=2, proj_size=3)
    lstm, x = fastrnn.LSTM(3, 6), torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"weight 1 must be of shape \(24, 3\), got \(24, 6\)"):
        sequence("lstm", x, None, lstm._flat_weights, Options(num_heads=2))
    for name, value in (
        ("num_heads", 2), ("zoneout", 0.1), ("recurrent_dropout", 0.1), ("weight_dropout", 0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"torch.nn.LSTM has no {name}, got {value}"):
            fastrnn.LSTM(3, 6, **{name: value}).to_torch()


# Compilers


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", [*VARIANTS, "heads"])
def test_compile(name):
    torch._dynamo.reset()
    fastrnn.allow_compile()
    if name == "heads":
        module = fastrnn.GRU(3, 4, num_heads=2, bidirectional=True, dtype=torch.float64)
    else:
        module = make(name, bidirectional=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    ours, theirs = flat(compiled(x)), flat(module(x))
    assert_equal(ours, theirs)
    assert_equal(gradients(ours, leaves), gradients(theirs, leaves))
    torch._dynamo.reset()


# Noise


def identity(hidden: int = 1, *, through_time: float, from_input: float, **options):
    """An RNN that computes h' = through_time * h + from_input."""
    rnn = fastrnn.RNN(1, hidden, nonlinearity="identity", dtype=torch.float64, **options)
    with torch.no_grad():
        for p in rnn.parameters():
            p.zero_()
        for name, p in rnn.named_parameters():
            if "weight_hh" in name:
                p.copy_(torch.eye(hidden) * through_time)
            elif "bias_ih" in name:
                p.fill_(from_input)
    return rnn


def near(share: Tensor, p: float, count: int) -> bool:
    """Whether a share of `count` draws is within 4.5 standard deviations of its mean."""
    return bool((share - p).abs() <= 4.5 * (p * (1 - p) / count) ** 0.5)


@pytest.mark.parametrize("path", [None, "kernels"])
def test_recurrent_dropout_has_one_mask_for_a_sequence(path):
    p, hidden, batch = 0.4, 50, 40
    rnn = identity(hidden, through_time=1.0, from_input=0.0, recurrent_dropout=p)
    x, hx = torch.zeros(3, batch, 1).double(), torch.ones(1, batch, hidden).double()
    torch.manual_seed(0)
    with use_path(path):
        y, h_n = rnn(x, hx)
    kept = y[0] != 0
    for t in range(3):
        expected = kept.double() / (1 - p) ** (t + 1)
        assert_equal([y[t]], [expected])
    assert near((~kept).double().mean(), p, kept.numel())
    assert not (kept[0] == kept[1]).all()
    torch.manual_seed(0)
    with use_path(path):
        assert torch.equal(rnn(x, hx)[1], h_n)
        assert not torch.equal(rnn(x, hx)[1], h_n)
        assert_equal([rnn.eval()(x, hx)[0]], [torch.ones_like(y)])


def test_recurrent_dropout_of_layers_and_directions_differ():
    gru = fastrnn.GRU(1, 64, num_layers=2, bidirectional=True, recurrent_dropout=0.5)
    with torch.no_grad():
        for p in gru.parameters():
            p.zero_()
        for k in itertools.product((0, 1), ("", "_reverse")):
            # n = tanh(r * W h), which is 0 for a dropped unit
            gru.get_parameter(f"weight_hh_l{k[0]}{k[1]}")[128:] = torch.eye(64)
    # h' = (1 - z) n + z h, so h' > 0.5 h where it was not dropped
    _, h_n = gru(torch.zeros(1, 1, 1), torch.ones(4, 1, 64))
    masks = h_n[:, 0] > 0.51
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.parametrize("path", [None, "kernels"])
def test_zoneout_keeps_a_share_of_the_state_and_its_mean_in_evaluation(path):
    p, hidden, batch = 0.3, 50, 40
    rnn = identity(hidden, through_time=0.0, from_input=1.0, zoneout=p)
    x = torch.zeros(3, batch, 1).double()
    torch.manual_seed(0)
    with use_path(path):
        y, h_n = rnn(x)
    for t in range(3):  # a unit is 0 if every step kept it
        assert near((y[t] == 0).double().mean(), p ** (t + 1), batch * hidden)
    assert set(y.unique().tolist()) == {0.0, 1.0}
    torch.manual_seed(0)
    with use_path(path):
        assert torch.equal(rnn(x)[1], h_n)
        y = rnn.eval()(x)[0]
    assert_equal(y, [torch.full_like(y[t], 1 - p ** (t + 1)) for t in range(3)])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.LayerNormLSTM, fastrnn.PeepholeLSTM])
def test_zoneout_of_h_and_of_c(cls, training):
    x, hx = torch.randn(4, 2, 3), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    for rates in ((1.0, 0.0), (0.0, 1.0), 1.0):
        module = cls(3, 5, zoneout=rates).train(training)
        y, final = module(x, hx)
        for rate, before, after in zip(
            rates if isinstance(rates, tuple) else (1.0, 1.0), hx, final, strict=True
        ):
            assert torch.equal(before, after) is (rate == 1.0)
        assert torch.equal(y, hx[0].expand(4, 2, 5)) is (rates != (0.0, 1.0))


def test_zoneout_of_an_slstm_is_of_h():
    x, hx = torch.randn(4, 2, 3).double(), states(fastrnn.SLSTM(3, 5), 2)
    plain = fastrnn.SLSTM(3, 5).double()
    zoned = fastrnn.SLSTM(3, 5, zoneout=1.0).double()
    zoned.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for m in (plain, zoned):
            m.weight_hh_l0.zero_()
    _, (h, *rest) = zoned(x, tuple(hx))
    assert torch.equal(h, hx[0])
    assert_equal(rest, plain(x, tuple(hx))[1][1:])
    everything = fastrnn.SLSTM(3, 5, zoneout=(0.0, 0.0, 1.0, 1.0)).double()
    assert_equal(everything(x, tuple(hx))[1][2:], hx[2:])


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.ResetBeforeGRU])
def test_weight_dropout(cls):
    p = 0.25
    module, x = cls(2, 40, weight_dropout=p), torch.randn(4, 3, 2)
    torch.manual_seed(0)
    y, _ = module(x)
    y.sum().backward()
    dropped = module.weight_hh_l0.grad == 0
    assert near(dropped.double().mean(), p, dropped.numel())
    for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
        assert (module.get_parameter(name).grad != 0).all()
    with torch.no_grad():
        fixed = copy.deepcopy(module)
        fixed.weight_dropout = 0.0
        fixed.weight_hh_l0.masked_fill_(dropped, 0.0).div_(1 - p)
        torch.testing.assert_close(fixed(x)[0], y)
        torch.manual_seed(0)
        torch.testing.assert_close(module(x)[0], y)
        assert (module(x)[0] - y).abs().max() > 1e-3
        fixed.load_state_dict(module.state_dict())
        torch.testing.assert_close(module.eval()(x)[0], fixed(x)[0])


@pytest.mark.parametrize("path", [None, "kernels"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, *VARIANTS.values()])
def test_gradients_through_noise(cls, training, path):
    module = cls(
        2, 2, zoneout=0.3, recurrent_dropout=0.4, weight_dropout=0.3, dtype=torch.float64,
        bidirectional=True,
    ).train(training)  # fmt: skip
    hx = [part.detach()[:, :2].requires_grad_() for part in states(module, 2)]
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def function(x, *rest):
        torch.manual_seed(7)
        weights = dict(zip(names, rest[len(hx) :], strict=True))
        arguments = (x, as_hx(list(rest[: len(hx)])))
        return tuple(flat(torch.func.functional_call(module, weights, arguments)))

    with use_path(path):
        inputs = (x, *hx, *module.parameters())
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_recurrent_dropout_of_the_product_alone():
    """Dropout applies to the h that W_hh multiplies, not to the h that the gates mix in."""
    gru = make("gru_reset_before", recurrent_dropout=0.5)
    x, hx = torch.randn(1, 3, 3, dtype=torch.float64), states(gru)
    torch.manual_seed(8)
    y, _ = gru(x, hx[0])
    torch.manual_seed(8)
    h = hx[0][0] * torch.dropout(torch.ones(1, 3, 4, dtype=torch.float64), 0.5, True)[0]
    wx = x[0] @ gru.weight_ih_l0.T + gru.bias_ih_l0
    rz = sigmoid(wx[:, :8] + h @ gru.weight_hh_l0[:8].T + gru.bias_hh_l0[:8])
    r, z = rz[:, :4], rz[:, 4:]
    n = tanh(wx[:, 8:] + (r * h) @ gru.weight_hh_l0[8:].T + gru.bias_hh_l0[8:])
    assert_equal([y[0]], [(1 - z) * n + z * hx[0][0]])


@pytest.mark.parametrize("cls", [fastrnn.GRU, fastrnn.LayerNormLSTM, fastrnn.ResetBeforeGRU])
def test_noise_of_an_empty_batch(cls):
    module, x = cls(3, 4, recurrent_dropout=0.3, zoneout=0.2), torch.randn(5, 0, 3)
    y, _ = module(x.requires_grad_())
    y.sum().backward()
    assert y.shape == (5, 0, 4)
    assert all((p.grad == 0).all() for p in module.parameters())


@pytest.mark.parametrize(("p", "share"), [(1e-11, 0.0), (1 - 1e-11, 1.0), (1.0, 1.0), (0.25, 0.25)])
def test_masks_of_any_probability(p, share):
    found = fastrnn.paths._mask((20, 30, 5), p, torch.device("cpu")).double().mean()
    assert near(found, share, 3000) if 0 < share < 1 else found == share


def test_compiled_noise_follows_the_seed():
    torch._dynamo.reset()
    fastrnn.allow_compile()
    module = make("layernorm_gru", zoneout=0.3, recurrent_dropout=0.4, weight_dropout=0.2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, ys = torch.randn(4, 2, 3, dtype=torch.float64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ys.append(compiled(x)[0])
    assert torch.equal(ys[0], ys[1])
    assert not torch.equal(ys[0], ys[2])
    torch._dynamo.reset()


@pytest.mark.parametrize("path", [None, "kernels", "operators", "reference"])
def test_slstm_begins_to_remember(path):
    """Derivatives with respect to an empty state match those for a nearly empty one."""
    slstm = fastrnn.SLSTM(3, 4).double()
    with torch.no_grad():
        slstm.bias_ih_l0[:4] -= 2.0  # the old state outweighs the input
    x = torch.randn(2, 1, 3, dtype=torch.float64)
    zeros = [torch.zeros(1, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    with use_path(path):
        of_n = torch.autograd.grad(slstm(x, zeros)[0].sum(), zeros[2])[0].flatten()
        h, c, n, m = (part.detach() for part in zeros)
        base = slstm(x, (h, c, n, m))[0].sum()
        for unit in range(4):
            nearly = n.clone()
            nearly[..., unit] = 1e-7
            slope = (slstm(x, (h, c, nearly, m))[0].sum() - base) / 1e-7
            torch.testing.assert_close(of_n[unit], slope.detach(), rtol=1e-4, atol=1e-6)
