"""``diagnose``: gradients against finite differences and theory, the rest by definition."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn
from fastrnn import diagnose

T, B, X, H = 6, 2, 3, 4  # steps, batch, input and hidden size
CLASSES = (
    fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN, fastrnn.SLSTM, fastrnn.LayerNormLSTM,
    fastrnn.LayerNormGRU, fastrnn.PeepholeLSTM, fastrnn.ResetBeforeGRU,
)  # fmt: skip


def linear(a: float) -> Any:
    """A linear network that rotates its state and scales it by `a` at every step."""
    rnn = fastrnn.RNN(X, H, nonlinearity="identity", dtype=torch.float64)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(a * torch.linalg.qr(torch.randn(H, H, dtype=torch.float64))[0])
    return rnn


def of_outputs(output: Tensor, hx: Any) -> Tensor:
    """A loss with a different gradient at every step."""
    return output.sin().sum()


def gradients(found: Any) -> list[Tensor]:
    return [s.gradient for one in found.directions for s in one.states.values()]


@pytest.mark.parametrize(("a", "verdict"), [(0.5, "vanish"), (1.0, "pass"), (2.0, "explode")])
def test_linear_network(a: float, verdict: str) -> None:
    (one,) = diagnose(linear(a), torch.randn(20, B, X).double()).directions
    h = one.states["h"]
    expected = h.last * a ** torch.arange(19, -1, -1).double()
    torch.testing.assert_close(h.gradient, expected)
    assert h.ratio == pytest.approx(a**19)
    assert h.per_step == pytest.approx(a)
    assert one.weights["h"] == pytest.approx((a, a))
    assert one.verdict.startswith(f"gradients {verdict}: ")
    assert not one.activations


def differences(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a function by central differences."""
    step, found = 1e-5, torch.zeros_like(at)
    for index in torch.cartesian_prod(*map(torch.arange, at.shape)):
        shift = torch.zeros_like(at)
        shift[tuple(index)] = step
        found[tuple(index)] = (function(at + shift) - function(at - shift)) / (2 * step)
    return found


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN])
def test_total_derivatives_of_an_inner_layer(cls: Any) -> None:
    """Derivatives with respect to an intermediate state from which both layers continue."""
    lower, upper = (cls(size, H, dtype=torch.float64) for size in (X, H))
    both = cls(X, H, num_layers=2, dtype=torch.float64)
    weights = [f"{name}_l{k}" for k in (0, 1) for name, _ in _without_suffix(lower)]
    values = [*lower.parameters(), *upper.parameters()]
    both.load_state_dict(dict(zip(weights, values, strict=True)))
    x = torch.randn(T, B, X, dtype=torch.float64)
    found = diagnose(both, x, loss=of_outputs).directions[0].states
    is_lstm = cls is fastrnn.LSTM
    gates = {"return_states": "gates" if cls is not fastrnn.RNN else True}
    y, _, states = lower(x, **gates)

    for t in range(T - 1):

        def loss_from(h: Tensor, c: Tensor | None = None, t: int = t) -> Tensor:
            hx = h[None] if c is None else (h[None], c[None])
            rest, _ = lower(x[t + 1 :], hx)
            return of_outputs(upper(torch.cat([y[:t], h[None], rest]))[0], None)

        with torch.no_grad():
            h = states.h[t, 0]
            c = states.c[t, 0] if is_lstm else None
            dh = differences(lambda part, c=c: loss_from(part, c), h)
            assert found["h"].gradient[t] == pytest.approx(_norm(dh), rel=1e-6)
            if c is None:
                continue
            dc = differences(lambda part, h=h: loss_from(h, part), c)
            # A cell state also acts through h of the same step.
            o = states.gates[t, 0].chunk(4, dim=-1)[3]
            dc = dc + dh * o * (1 - c.tanh().square())
            assert found["c"].gradient[t] == pytest.approx(_norm(dc), rel=1e-6)


def _without_suffix(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [(name.removesuffix("_l0"), p) for name, p in module.named_parameters()]


def _norm(d_rows: Tensor) -> float:
    """Root mean square over the rows."""
    return float(d_rows.norm() / len(d_rows) ** 0.5)


def test_reverse_direction_is_that_of_the_reversed_sequence() -> None:
    lstm = fastrnn.LSTM(X, H, bidirectional=True)
    names = [name for name, _ in _without_suffix(fastrnn.LSTM(X, H))]
    swapped = copy.deepcopy(lstm)
    for name in names:
        setattr(swapped, f"{name}_l0", getattr(lstm, f"{name}_l0_reverse"))
        setattr(swapped, f"{name}_l0_reverse", getattr(lstm, f"{name}_l0"))
    x = torch.randn(T, B, X)
    forward, reverse = diagnose(lstm, x, loss=of_outputs).directions
    mirrored = diagnose(swapped, x.flip(0), loss=of_outputs).directions
    assert (forward.name, reverse.name) == ("l0", "l0_reverse")
    for one, other in zip((forward, reverse), reversed(mirrored), strict=True):
        for name in ("h", "c"):
            a, b = one.states[name], other.states[name]
            torch.testing.assert_close(a.gradient, b.gradient.flip(0))
            torch.testing.assert_close(a.norm, b.norm.flip(0))
            assert a[2:] == pytest.approx(b[2:])
        assert one.weights == other.weights
        assert one.activations == other.activations


@pytest.mark.parametrize("cls", CLASSES)
def test_lengths(cls: Any) -> None:
    """Rows that end early count as if they were alone: padded, packed or one by one."""
    module = cls(X, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, 3, X, dtype=torch.float64), torch.tensor([2, T, 0])
    padded = diagnose(module, x, lengths=lengths)
    alone = [diagnose(module, x[:n, k : k + 1]) for k, n in enumerate(lengths) if n]
    for whole, short, long in zip(*(d.directions for d in (padded, *alone)), strict=True):
        for name in whole.states:
            a, b, c = (one.states[name] for one in (whole, short, long))
            square = c.gradient.square()
            square[:2] = (square[:2] + b.gradient.square()) / 2
            torch.testing.assert_close(a.gradient, square.sqrt())
            assert a.first == pytest.approx(((b.first**2 + c.first**2) / 2) ** 0.5)
            assert a.last == pytest.approx(((b.last**2 + c.last**2) / 2) ** 0.5)
            assert a.distance == (1 + T - 1) / 2
        for name, found in whole.activations.items():
            shares = zip(short.activations[name], long.activations[name], strict=True)
            assert found == pytest.approx([(2 * a + T * b) / (2 + T) for a, b in shares])

    packed = pack_padded_sequence(x[:, :2], lengths[:2], enforce_sorted=False)
    same = diagnose(module, packed)
    torch.testing.assert_close(gradients(same), gradients(padded))
    assert [d.activations for d in same.directions] == [d.activations for d in padded.directions]


def test_forms_of_input() -> None:
    gru, x = fastrnn.GRU(X, H), torch.randn(T, 1, X)
    expected = gradients(diagnose(gru, x))
    torch.testing.assert_close(gradients(diagnose(gru, x.squeeze(1))), expected)
    torch.testing.assert_close(gradients(diagnose(gru, x.squeeze(1), lengths=T)), expected)
    gru.batch_first = True
    torch.testing.assert_close(gradients(diagnose(gru, x.transpose(0, 1))), expected)


def test_gradients_that_are_cut() -> None:
    gru, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3] = True
    fresh = torch.randn(1, 1, H)
    for options in ({"bptt": 3}, {"reset": reset}, {"reset": reset, "reset_state": fresh}):
        (one,) = diagnose(gru, x, torch.randn(1, B, H), **options).directions
        assert (one.states["h"].gradient > 0).tolist() == [False] * 3 + [True] * 3
        assert one.verdict == "no gradient reaches the first step"


def test_heads_and_noise() -> None:
    """Each head is treated as a small layer; noise is drawn as in a call."""
    lstm = fastrnn.LSTM(X, H, bidirectional=True, num_heads=2)
    for one in diagnose(lstm, torch.randn(T, B, X)).directions:
        heads = getattr(lstm, f"weight_hh_{one.name}").detach().view(4, 2, 2, 2)
        for gate, blocks in zip("ifgo", heads, strict=True):
            radii, sizes = zip(*(_spectrum(block) for block in blocks), strict=True)
            assert one.weights[gate] == pytest.approx((max(radii), max(sizes)), rel=1e-5)
    noisy = fastrnn.LSTM(X, H, num_layers=2, dropout=0.2, zoneout=0.3, recurrent_dropout=0.2)
    assert all(g.isfinite().all() for g in gradients(diagnose(noisy, torch.randn(T, B, X))))


def _spectrum(matrix: Tensor) -> tuple[float, float]:
    return float(torch.linalg.eigvals(matrix).abs().max()), float(torch.linalg.svdvals(matrix)[0])


def test_spectrum_of_a_projection() -> None:
    lstm = fastrnn.LSTM(X, H, proj_size=2)
    (one,) = diagnose(lstm, torch.randn(T, B, X)).directions
    for gate, block in zip("ifgo", lstm.weight_hh_l0.detach().chunk(4), strict=True):
        expected = _spectrum(block @ lstm.weight_hr_l0.detach())
        assert one.weights[gate] == pytest.approx(expected, rel=1e-5)


def test_saturation() -> None:
    gru, x = fastrnn.GRU(X, H), torch.randn(T, B, X)
    with torch.no_grad():
        for k, bias in enumerate((-20.0, 20.0, 0.0)):  # r, z, n
            gru.bias_ih_l0[k * H : (k + 1) * H] = bias
    (one,) = diagnose(gru, x).directions
    assert one.activations["r"] == (1, 0)
    assert one.activations["z"] == (0, 1)
    assert "r is saturated: 100% low; z is saturated: 100% high" in one.verdict

    relu = fastrnn.RNN(X, H, nonlinearity="relu")
    torch.nn.init.constant_(relu.bias_ih_l0, -20.0)
    (one,) = diagnose(relu, x).directions
    assert one.activations == {"h": (1, 0)}
    assert one.verdict == "no gradient arrives; h is saturated: 100% low"

    lstm = fastrnn.LSTM(X, H)
    _, _, states = lstm(10 * x, return_states="gates")
    (one,) = diagnose(lstm, 10 * x).directions
    i, f, g, o = states.gates[:, 0].chunk(4, dim=-1)
    for name, values, low in (("i", i, 0.05), ("f", f, 0.05), ("g", g, -0.95), ("o", o, 0.05)):
        shares = [float((values < low).double().mean()), float((values > 0.95).double().mean())]
        assert one.activations[name] == pytest.approx(shares)
    assert one.activations["g"].low > 0.05
    share = float((states.c.tanh() > 0.95).double().mean())
    assert one.activations["tanh(c)"].high == pytest.approx(share)


def test_norms_of_states() -> None:
    lstm, x = fastrnn.LSTM(X, H, num_layers=2), torch.randn(T, B, X)
    _, _, states = lstm(x, return_states=True)
    for n, one in enumerate(diagnose(lstm, x).directions):
        for name, whole in (("h", states.h), ("c", states.c)):
            expected = [_norm(part) for part in whole[:, n].detach()]
            assert one.states[name].norm.tolist() == pytest.approx(expected)


def test_modules_of_torch() -> None:
    for name in ("LSTM", "GRU", "RNN"):
        stock = getattr(torch.nn, name)(X, H, bidirectional=True)
        x = torch.randn(T, B, X)
        found = diagnose(stock, x)
        assert found.module == name
        ours = getattr(fastrnn, name).from_torch(stock)
        torch.testing.assert_close(gradients(found), gradients(diagnose(ours, x)))
    with pytest.raises(TypeError, match=r"diagnose expects a layer of fastrnn, or .*, got Linear"):
        diagnose(torch.nn.Linear(2, 2), x)
    with pytest.raises(TypeError, match="got LSTMCell"):
        diagnose(fastrnn.LSTMCell(X, H), x)


def test_leaves_no_trace() -> None:
    """Nothing gets a gradient; a frozen module without grad mode gives the same results."""
    lstm, x = fastrnn.LSTM(X, H), torch.randn(T, B, X)
    expected = gradients(diagnose(lstm, x))
    assert all(p.grad is None for p in lstm.parameters())
    assert not x.requires_grad
    lstm.requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(gradients(diagnose(lstm, x)), expected)
    assert fastrnn.reference._watching.record is None


def test_loss_gets_what_the_module_returns() -> None:
    lstm = fastrnn.LSTM(X, H)
    packed = pack_padded_sequence(torch.randn(T, B, X), torch.tensor([T, 2]))

    def loss(output: Any, hx: Any) -> Tensor:
        padded, lengths = pad_packed_sequence(output)
        assert lengths.tolist() == [T, 2]
        torch.testing.assert_close(padded[[T - 1, 1], [0, 1]], hx[0][0])
        return hx[1].square().mean()

    found = diagnose(lstm, packed, loss=loss)
    _, (_, c) = lstm(packed)
    assert found.loss == pytest.approx(c.detach().square().mean().item())
    for wrong in (lambda *_: 1.0, lambda y, _: y.data, lambda *_: torch.ones(())):
        with pytest.raises(ValueError, match="loss must return a tensor of one element"):
            diagnose(lstm, packed, loss=wrong)


@pytest.mark.parametrize("cls", CLASSES)
def test_text_and_picture(cls: Any, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    found = diagnose(cls(X, H, num_layers=2), torch.randn(T, B, X))
    text = str(found)
    assert text.startswith(f"{cls.__name__}, {T} steps, loss ")
    assert "nan" not in text
    assert len({*map(len, text.split("\n\n")[1].splitlines()[1:])}) == 1, "columns are aligned"
    for one in found.directions:
        assert f"{one.name}: {one.verdict}" in text
    figure = found.plot(tmp_path / "picture.png")
    panels = len(found.directions[0].states) + bool(found.directions[0].activations)
    assert len(figure.axes) == panels
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_picture_of_one_step_and_of_nothing(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    found = diagnose(linear(0.0), torch.randn(1, B, X).double())
    assert found.directions[0].verdict.startswith("gradients cannot be compared")
    assert "nan" not in str(found)
    found.plot(tmp_path / "one.png")
    diagnose(linear(0.0), torch.randn(T, B, X).double()).plot(tmp_path / "zeros.png")


def test_picture_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    found = diagnose(fastrnn.GRU(X, H), torch.randn(T, B, X))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot()
