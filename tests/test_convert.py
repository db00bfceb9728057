"""Weights of other libraries: against their formulas, written here in numpy, and there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastrnn
from fastrnn.convert import (
    from_flashrnn,
    from_haste,
    from_keras,
    to_flashrnn,
    to_haste,
    to_keras,
)

RNG = np.random.default_rng(0)
INPUTS, H = 3, 4


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def random(*shape):
    return RNG.normal(size=shape) * 0.5


def layer(step, x, n_states=1, reverse=False):
    """The outputs of all steps of x, (T, B, I); `step` has the formula of a library."""
    state = [np.zeros((x.shape[1], H)) for _ in range(n_states)]
    ys = []
    for x_t in x[::-1] if reverse else x:
        state = step(x_t, *state)
        ys.append(state[0])
    return np.stack(ys[::-1] if reverse else ys)


# Keras: gates i, f, c, o and z, r, h in columns.


def keras_lstm(kernel, recurrent, bias):
    def step(x, h, c):
        i, f, g, o = np.split(x @ kernel + h @ recurrent + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c

    return step


def keras_gru_after(kernel, recurrent, bias):
    def step(x, h):
        x_z, x_r, x_h = np.split(x @ kernel + bias[0], 3, axis=1)
        h_z, h_r, h_h = np.split(h @ recurrent + bias[1], 3, axis=1)
        z, r = sigmoid(x_z + h_z), sigmoid(x_r + h_r)
        return (z * h + (1 - z) * np.tanh(x_h + r * h_h),)

    return step


def keras_gru_before(kernel, recurrent, bias):
    def step(x, h):
        x_z, x_r, x_h = np.split(x @ kernel + bias, 3, axis=1)
        z, r = sigmoid(x_z + h @ recurrent[:, :H]), sigmoid(x_r + h @ recurrent[:, H : 2 * H])
        return (z * h + (1 - z) * np.tanh(x_h + (r * h) @ recurrent[:, 2 * H :]),)

    return step


def keras_rnn(kernel, recurrent, bias):
    return lambda x, h: (np.tanh(x @ kernel + bias + h @ recurrent),)


KERAS = {
    "lstm": (fastrnn.LSTM, keras_lstm, 4, (4 * H,)),
    "gru": (fastrnn.GRU, keras_gru_after, 3, (2, 3 * H)),
    "gru_before": (fastrnn.ResetBeforeGRU, keras_gru_before, 3, (3 * H,)),
    "rnn": (fastrnn.RNN, keras_rnn, 1, (H,)),
    "torch_gru": (torch.nn.GRU, keras_gru_after, 3, (2, 3 * H)),
}


def keras_weights(n_gates, bias_shape, inputs, directions, bias=True):
    found = []
    for _ in range(directions):
        found += [random(inputs, n_gates * H), random(H, n_gates * H)]
        found += [random(*bias_shape)] * bias
    return found


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", KERAS)
def test_keras(kind, bidirectional):
    cls, formula, n_gates, bias_shape = KERAS[kind]
    directions = 2 if bidirectional else 1
    weights = [keras_weights(n_gates, bias_shape, n, directions) for n in (INPUTS, directions * H)]
    module = cls(INPUTS, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    before = dict(module.named_parameters())
    from_keras(module, weights)
    assert all(module.get_parameter(name) is p for name, p in before.items())
    x = random(5, 2, INPUTS)
    expected = x
    for arrays in weights:
        ys = [
            layer(formula(*arrays[3 * d : 3 * d + 3]), expected, 1 + (kind == "lstm"), d == 1)
            for d in range(directions)
        ]
        expected = np.concatenate(ys, axis=2)
    y = module(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(to_keras(module), weights, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-15)


@pytest.mark.parametrize("kind", KERAS)
def test_keras_without_bias(kind):
    cls, _, n_gates, bias_shape = KERAS[kind]
    weights = [keras_weights(n_gates, bias_shape, INPUTS, 1, bias=False)]
    module = cls(INPUTS, H, bias=False)
    from_keras(module, [[torch.tensor(w) for w in weights[0]]])
    for a, b in zip(to_keras(module)[0], weights[0], strict=True):
        np.testing.assert_array_equal(a, b.astype(np.float32))


@pytest.mark.parametrize("kind", KERAS)
def test_from_ours_to_keras_and_back(kind):
    """Where Keras has one bias, it is the sum of ours."""
    cls = KERAS[kind][0]
    module, other = cls(INPUTS, H, 2), cls(INPUTS, H, 2)
    from_keras(other, to_keras(module))
    x = torch.randn(5, 2, INPUTS)
    torch.testing.assert_close(other(x)[0], module(x)[0])


# haste: gates i, g, f, o and z, r, h in columns.


def normal(v):
    return (v - v.mean(1, keepdims=True)) / np.sqrt(v.var(1, keepdims=True) + 1e-5)


def haste_lstm(p):
    is_normal = "gamma" in p

    def step(x, h, c):
        wx, rh = x @ p["kernel"], h @ p["recurrent_kernel"]
        if is_normal:
            wx, rh = normal(wx) * p["gamma"][0], normal(rh) * p["gamma"][1]
        i, g, f, o = np.split(wx + rh + p["bias"], 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        seen = normal(c) * p["gamma_h"] + p["beta_h"] if is_normal else c
        return sigmoid(o) * np.tanh(seen), c

    return step


def haste_gru(p):
    def step(x, h):
        wx, rh = x @ p["kernel"], h @ p["recurrent_kernel"]
        if "gamma" in p:
            wx, rh = normal(wx) * p["gamma"][0], normal(rh) * p["gamma"][1]
        x_z, x_r, x_g = np.split(wx + p["bias"], 3, axis=1)
        h_z, h_r, h_g = np.split(rh + p["recurrent_bias"], 3, axis=1)
        z = sigmoid(x_z + h_z)
        return (z * h + (1 - z) * np.tanh(x_g + sigmoid(x_r + h_r) * h_g),)

    return step


HASTE = {
    "lstm": (fastrnn.LSTM, haste_lstm, 4),
    "gru": (fastrnn.GRU, haste_gru, 3),
    "layernorm_lstm": (fastrnn.LayerNormLSTM, haste_lstm, 4),
    "layernorm_gru": (fastrnn.LayerNormGRU, haste_gru, 3),
}


@pytest.mark.parametrize("kind", HASTE)
def test_haste(kind):
    cls, formula, n_gates = HASTE[kind]
    shapes = {"kernel": (INPUTS, n_gates * H), "recurrent_kernel": (H, n_gates * H)}
    shapes["bias"] = (n_gates * H,)
    if n_gates == 3:
        shapes["recurrent_bias"] = (3 * H,)
    if "layernorm" in kind:
        shapes["gamma"] = (2, n_gates * H)
    if kind == "layernorm_lstm":
        shapes |= {"gamma_h": (H,), "beta_h": (H,)}
    given = {name: random(*shape) for name, shape in shapes.items()}
    module, x = cls(INPUTS, H, dtype=torch.float64), random(5, 2, INPUTS)
    from_haste(module, given)
    expected = layer(formula(given), x, 2 if n_gates == 4 else 1)
    y = module(torch.from_numpy(x))[0].detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    back = to_haste(module)
    assert back.keys() == given.keys()
    for name, value in back.items():
        np.testing.assert_allclose(value, given[name], rtol=1e-15)


# FlashRNN: R[gate, head, unit, unit before], Wx[..., gate, head, unit]; the GRU's gates n, r, z.


def flashrnn_step(kind, wx, states, r, b):
    """A step as in FlashRNN's own plain backend; wx is (B, G, N, D), states are (B, N, D)."""
    rh = np.einsum("bnp,gndp->bgnd", states[0], r)
    if kind == "gru":
        g = rh[:, 0] + b[0]
        reset, z = (sigmoid(wx[:, k] + rh[:, k + 1] + b[k + 1]) for k in (0, 1))
        n = np.tanh(wx[:, 2] + b[3] + reset * g)
        return [z * states[0] + (1 - z) * n]
    gates = [wx[:, k] + rh[:, k] + b[k] for k in range(r.shape[0])]
    if kind == "elman":
        return [np.tanh(gates[0])]
    i, f, z, o = gates
    if kind == "lstm":
        c = sigmoid(f) * states[1] + sigmoid(i) * np.tanh(z)
        return [sigmoid(o) * np.tanh(c), c]
    _, c, n, m = states
    kept = np.log(sigmoid(f)) + m
    m = i if (n == 0).all() else np.maximum(i, kept)
    c, n = np.exp(kept - m) * c + np.exp(i - m) * np.tanh(z), np.exp(kept - m) * n + np.exp(i - m)
    return [sigmoid(o) * c / n, c, n, m]


FLASHRNN = {
    "lstm": (fastrnn.LSTM, 4, 2),
    "gru": (fastrnn.GRU, 3, 1),
    "elman": (fastrnn.RNN, 1, 1),
    "slstm": (fastrnn.SLSTM, 4, 4),
}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("kind", FLASHRNN)
def test_flashrnn(kind, heads):
    cls, n_gates, n_states = FLASHRNN[kind]
    units = H // heads
    r, w = random(n_gates, heads, units, units), random(n_gates * H, INPUTS)
    b = random(n_gates + (kind == "gru"), heads, units)
    module = cls(INPUTS, H, num_heads=heads, dtype=torch.float64)
    from_flashrnn(module, r, b, w)
    x = random(5, 2, INPUTS)
    states = [np.zeros((2, heads, units))] * n_states
    ys = []
    for x_t in x:
        states = flashrnn_step(kind, (x_t @ w.T).reshape(2, n_gates, heads, units), states, r, b)
        ys.append(states[0].reshape(2, H))
    y, final = module(torch.from_numpy(x))
    np.testing.assert_allclose(y.detach().numpy(), np.stack(ys), rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(final if n_states > 1 else [final], states, strict=True):
        np.testing.assert_allclose(ours.detach().numpy().reshape(theirs.shape), theirs, rtol=1e-10)
    back_r, back_b = to_flashrnn(module)
    np.testing.assert_array_equal(back_r, r)
    np.testing.assert_array_equal(back_b, b)
    other = cls(INPUTS, H, num_heads=heads, dtype=torch.float64)
    kept = other.weight_ih_l0.detach().clone()
    from_flashrnn(other, back_r, back_b)
    assert torch.equal(other.weight_ih_l0, kept)
    from_flashrnn(other, back_r, back_b, module.weight_ih_l0)
    torch.testing.assert_close(other(torch.from_numpy(x))[0], y)


# Errors


def test_values_that_do_not_fit():
    lstm, gru = fastrnn.LSTM(INPUTS, H), fastrnn.GRU(INPUTS, H)
    good = to_keras(lstm)[0]
    before = lstm.weight_ih_l0.detach().clone()
    with pytest.raises(ValueError, match="a list for each of the 1 layers, got 2"):
        from_keras(lstm, [good, good])
    with pytest.raises(ValueError, match=r"weights\[0\] must have 3 arrays, 3 for .* got 2"):
        from_keras(lstm, [good[:2]])
    with pytest.raises(ValueError, match=r"weight_hh_l0, after conversion, must be of shape \(16"):
        from_keras(lstm, [[good[0] * 0, good[1].T, good[2]]])
    assert torch.equal(lstm.weight_ih_l0, before), "nothing may change before all is checked"
    with pytest.raises(ValueError, match=r"the bias of weights\[0\] must have two rows, got"):
        from_keras(gru, [[*to_keras(gru)[0][:2], random(3 * H)]])
    with pytest.raises(ValueError, match="must have bias, kernel, recurrent_kernel, got kernel"):
        from_haste(lstm, {"kernel": good[0]})
    with pytest.raises(ValueError, match=r"r must be of shape \(4, 1, 4, 4\), got \(4, 4, 4\)"):
        from_flashrnn(lstm, random(4, 4, 4), random(4, 1, 4))
    with pytest.raises(ValueError, match=r"b must be of shape \(4, 1, 4\), got \(3, 1, 4\)"):
        from_flashrnn(gru, random(3, 1, 4, 4), random(3, 1, 4))


def test_modules_that_others_do_not_have():
    with pytest.raises(TypeError, match=r"for Keras a module must be one of LSTM, .* got SLSTM"):
        to_keras(fastrnn.SLSTM(INPUTS, H))
    with pytest.raises(TypeError, match=r"for haste a module must be one of .* got RNN_TANH"):
        to_haste(fastrnn.RNN(INPUTS, H))
    with pytest.raises(TypeError, match=r"for FlashRNN a module must be one of .* got Linear"):
        to_flashrnn(torch.nn.Linear(INPUTS, H))
    with pytest.raises(ValueError, match="proj_size must be 0 for Keras, got 2"):
        to_keras(fastrnn.LSTM(INPUTS, H, proj_size=2))
    with pytest.raises(ValueError, match="num_heads must be 1 for haste, got 2"):
        to_haste(fastrnn.LSTM(INPUTS, H, num_heads=2))
    with pytest.raises(ValueError, match="num_layers must be 1 for FlashRNN, got 2"):
        to_flashrnn(fastrnn.LSTM(INPUTS, H, 2))
    with pytest.raises(ValueError, match="bias must be True for haste, got False"):
        to_haste(fastrnn.LSTM(INPUTS, H, bias=False))
