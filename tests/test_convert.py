"""Weights of other libraries: against their formulas in numpy, and round trips."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune

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
    """The outputs of all steps of x, (T, B, I); `step` is the formula of a library."""
    state = [np.zeros((x.shape[1], H)) for _ in range(n_states)]
    ys = []
    for x_t in x[::-1] if reverse else x:
        state = step(x_t, *state)
        ys.append(state[0])
    return np.stack(ys[::-1] if reverse else ys)


# Keras: columns hold gates i, f, c, o and z, r, h.


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


# haste: columns hold gates i, g, f, o and z, r, h.


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


# FlashRNN: R[gate, head, unit, previous unit], Wx[..., gate, head, unit]; GRU gates n, r, z.


def flashrnn_step(kind, wx, states, r, b):
    """A step of FlashRNN's plain backend; wx is (B, G, N, D), states are (B, N, D)."""
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


# Array types, in different torch contexts.


class HasArray:
    def __init__(self, array):
        self.array = array

    def __array__(self):
        return self.array


def read_only(array):
    array = array.copy()
    array.setflags(write=False)
    return array


ARRAYS = {
    "read-only": read_only,
    "lists": lambda a: a.tolist(),
    "arrays in a list": list,
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "longdouble": lambda a: a.astype(np.longdouble),
    "integers": lambda a: a.astype(np.int8),
    "big-endian": lambda a: a.astype(">f4"),
    "little-endian": lambda a: a.astype("<f4"),
    "negative strides": lambda a: np.flip(np.ascontiguousarray(np.flip(a))),
    "gaps": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "columns first": np.asfortranarray,
    "__array__": HasArray,
    "tensor": torch.tensor,
    "bfloat16": lambda a: torch.tensor(a, dtype=torch.bfloat16),
    "int tensor": lambda a: torch.tensor(a, dtype=torch.int64),
    "requires grad": lambda a: torch.tensor(a, requires_grad=True),
}
SURROUNDINGS = {
    "plain": contextlib.nullcontext,
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}


def integers(*shape):
    """Numbers that every dtype represents exactly."""
    return RNG.integers(-8, 9, size=shape).astype(np.float32)


GIVEN = {
    "keras": (
        lambda module, kernel, recurrent, bias, _: from_keras(module, [[kernel, recurrent, bias]]),
        [(INPUTS, 3 * H), (H, 3 * H), (2, 3 * H), ()],
    ),
    "haste": (
        lambda module, kernel, recurrent, bias, recurrent_bias: from_haste(
            module,
            {
                "kernel": kernel,
                "recurrent_kernel": recurrent,
                "bias": bias,
                "recurrent_bias": recurrent_bias,
            },
        ),
        [(INPUTS, 3 * H), (H, 3 * H), (3 * H,), (3 * H,)],
    ),
    "flashrnn": (
        lambda module, r, b, weight_ih, _: from_flashrnn(module, r, b, weight_ih),
        [(3, 1, H, H), (4, 1, H), (3 * H, INPUTS), ()],
    ),
}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("library", GIVEN)
def test_arrays_of_every_kind(library, kind, around):
    load, shapes = GIVEN[library]
    arrays = [integers(*shape) for shape in shapes]
    module, expected = fastrnn.GRU(INPUTS, H), fastrnn.GRU(INPUTS, H)
    load(expected, *(torch.tensor(array) for array in arrays))
    given = [ARRAYS[kind](array) if array.ndim else None for array in arrays]
    with SURROUNDINGS[around]():
        load(module, *given)
    for name, parameter in expected.named_parameters():
        assert torch.equal(module.get_parameter(name), parameter), name
    module(torch.randn(5, 2, INPUTS))[0].sum().backward()


def test_numpy_scalars_and_a_default_dtype():
    module = fastrnn.RNN(1, 1, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        from_keras(module, [[[[np.float32(0.5)]], [[np.int16(2)]], [np.float64(-3)]]])
        assert [array.dtype for array in to_keras(module)[0]] == [np.float32] * 3
    finally:
        torch.set_default_dtype(torch.float32)
    assert [array.item() for array in to_keras(module)[0]] == [0.5, 2, -3]
    assert module.weight_hh_l0.dtype == torch.float32


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_conversions_from_ours_in_any_surroundings(around):
    module = fastrnn.GRU(INPUTS, H)
    expected = [*to_keras(module)[0], *to_haste(module).values(), *to_flashrnn(module)]
    with SURROUNDINGS[around]():
        found = [*to_keras(module)[0], *to_haste(module).values(), *to_flashrnn(module)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_bfloat16_to_keras_is_float32():
    module, back = (fastrnn.LSTM(INPUTS, H, dtype=torch.bfloat16) for _ in range(2))
    arrays = to_keras(module)[0]
    assert [array.dtype for array in arrays] == [np.float32] * 3
    wide = fastrnn.LSTM(INPUTS, H)
    wide.load_state_dict(module.state_dict())
    for a, b in zip(arrays, to_keras(wide)[0], strict=True):
        np.testing.assert_array_equal(a, b)
    from_keras(back, [arrays])
    assert torch.equal(back.weight_hh_l0, module.weight_hh_l0)
    assert to_haste(module)["kernel"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a tensor or an array of real numbers, got NoneType"),
        ("kernel", "must be a tensor or an array of real numbers, got str"),
        ([[1.0], [1.0, 2.0]], "must be a tensor or an array of real numbers, got list"),
        (np.zeros((H, 3 * H), complex), "must be a tensor or an array of real numbers, got ndarr"),
        (torch.zeros(H, 3 * H, dtype=torch.complex64), "must be of real numbers, got torch.comp"),
        (torch.zeros(H, 3 * H, device="meta"), "must be a tensor with values, got a tensor on the"),
        (np.zeros((1, H, 3 * H)), "must be of shape"),
        (np.zeros(3 * H), "must be of shape"),
        (np.float32(1), "must be of shape"),
    ],
)
@pytest.mark.parametrize("library", GIVEN)
def test_what_is_no_array(library, value, message):
    load, shapes = GIVEN[library]
    arrays = [integers(*shape) if shape else None for shape in shapes]
    module = fastrnn.GRU(INPUTS, H)
    before = copied(module)
    with pytest.raises((TypeError, ValueError), match=message):
        load(module, *arrays[:1], value, *arrays[2:])
    assert_same(module, before)


# Modules whose weights are not plain parameters.


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module, state):
    now = module.state_dict()
    assert now.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(now[name], value), name


CONVERSIONS = {
    "keras": (to_keras, from_keras),
    "haste": (to_haste, from_haste),
    "flashrnn": (lambda m: (*to_flashrnn(m), m.weight_ih_l0), lambda m, g: from_flashrnn(m, *g)),
}


@pytest.mark.parametrize("cls", [fastrnn.GRU, torch.nn.GRU])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", CONVERSIONS)
def test_weight_norm(library, dtype, cls):
    give, take = CONVERSIONS[library]
    source, target, back = (cls(INPUTS, H, dtype=dtype) for _ in range(3))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        parametrizations.weight_norm(target, name)
    parameters = dict(target.named_parameters())
    take(target, give(source))
    assert all(target.get_parameter(name) is p for name, p in parameters.items())
    tolerance = 2 * torch.finfo(dtype).eps
    for name in ("weight_ih_l0", "weight_hh_l0"):
        torch.testing.assert_close(
            getattr(target, name), getattr(source, name), rtol=tolerance, atol=tolerance
        )
    x = torch.randn(5, 2, INPUTS, dtype=dtype)
    torch.testing.assert_close(target(x)[0], source(x)[0])
    take(back, give(target))
    assert torch.equal(back.weight_hh_l0, target.weight_hh_l0)


def test_what_was_given_may_be_changed_afterwards():
    module = parametrizations.weight_norm(fastrnn.LSTM(INPUTS, H), "weight_hh_l0")
    r, b = torch.randn(4, 1, H, H), torch.randn(4, 1, H)
    from_flashrnn(module, r, b)
    before = copied(module)
    r.zero_()
    b.zero_()
    assert_same(module, before)


def test_a_part_of_the_module_is_given():
    module = fastrnn.LSTM(INPUTS, H)
    r = module.weight_hh_l0.detach().view(4, 1, H, H)
    expected = r.flip(0).flatten(0, 2).clone()
    from_flashrnn(module, r.flip(0), torch.zeros(4, 1, H))
    assert torch.equal(module.weight_hh_l0, expected)


def test_orthogonal():
    module = fastrnn.RNN(INPUTS, H)
    parametrizations.orthogonal(module, "weight_hh_l0")
    kernel, _, bias = to_keras(module)[0]
    other = np.linalg.qr(random(H, H))[0]
    from_keras(module, [[kernel, other, bias]])
    np.testing.assert_allclose(to_keras(module)[0][1], other, rtol=1e-5, atol=1e-6)
    before = copied(module)
    with pytest.raises(ValueError, match=r"weight_hh_l0 must have values .* can represent: Orthog"):
        from_keras(module, [[kernel * 0, random(H, H), bias]])
    assert_same(module, before)


class Doubled(torch.nn.Module):
    def forward(self, value):
        return 2 * value


def no_inverse(module, name):
    parametrize.register_parametrization(module, name, Doubled())


def trivial(module, name):
    parametrizations.orthogonal(module, name, use_trivialization=False, orthogonal_map="cayley")


@pytest.mark.parametrize("library", CONVERSIONS)
@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (parametrizations.spectral_norm, "must have values .* can represent: Spect"),
        (no_inverse, "has a parametrization without an inverse: .* does not implement"),
        (trivial, "has a parametrization without an inverse: It is not possible to assign"),
    ],
)
def test_parametrizations_without_the_values(norm, message, library):
    give, take = CONVERSIONS[library]
    source, target = fastrnn.RNN(INPUTS, H), fastrnn.RNN(INPUTS, H)
    if library == "haste":
        source, target = fastrnn.GRU(INPUTS, H), fastrnn.GRU(INPUTS, H)
    norm(target, "weight_hh_l0")
    before = copied(target)
    with pytest.raises(ValueError, match=f"weight_hh_l0 {message}"):
        take(target, give(source))
    assert_same(target, before)


def test_zeros_with_weight_norm():
    """A norm of zero has no direction: the weight would be NaN."""
    module = parametrizations.weight_norm(fastrnn.RNN(INPUTS, H), "weight_hh_l0")
    before = copied(module)
    with pytest.raises(ValueError, match="values that its parametrization can represent: Weight"):
        from_keras(module, [[np.ones((INPUTS, H)), np.zeros((H, H)), np.ones(H)]])
    assert_same(module, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("library", CONVERSIONS)
@pytest.mark.parametrize(
    ("norm", "part"),
    [
        (torch.nn.utils.weight_norm, "weight_hh_l0_g"),
        (lambda m, name: prune.random_unstructured(m, name, 0.5), "weight_hh_l0_orig"),
    ],
)
def test_weights_that_a_hook_computes(norm, part, library):
    """They can be exported, as the next call would use them, but not loaded."""
    give, take = CONVERSIONS[library]
    source, target, plain = (fastrnn.GRU(INPUTS, H) for _ in range(3))
    norm(target, "weight_hh_l0")
    with torch.no_grad():
        target.get_parameter(part).mul_(2)
    take(plain, give(target))
    x = torch.randn(5, 2, INPUTS)
    torch.testing.assert_close(plain(x)[0], target(x)[0])
    before = copied(target)
    with pytest.raises(ValueError, match="weight_hh_l0 must be a parameter, but a hook computes"):
        take(target, give(source))
    assert_same(target, before)


@pytest.mark.parametrize("library", CONVERSIONS)
def test_modules_without_values(library):
    give, take = CONVERSIONS[library]
    good = fastrnn.GRU(INPUTS, H)
    given, before = give(good), copied(good)
    meta, without = fastrnn.GRU(INPUTS, H, device="meta"), fastrnn.GRU(INPUTS, H)
    without.bias_hh_l0 = None
    for module, message in (
        (meta, "weight_hh_l0|weight_ih_l0 must be a tensor with values, got a tensor on the meta"),
        (without, "bias_hh_l0 must be a tensor with values, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            give(module)
        kept = {name: p.clone() for name, p in module.named_parameters() if not p.is_meta}
        with pytest.raises(ValueError, match=message):
            take(module, given)
        assert all(torch.equal(module.get_parameter(name), p) for name, p in kept.items())
    assert_same(good, before)


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
