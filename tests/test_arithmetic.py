"""The arithmetic of cells: each backward against autograd of its forward, on every engine."""

import inspect

import pytest
import torch
from minimal_gated_unit import MGU

import fastrnn
from fastrnn import cells
from fastrnn.cells import CELLS, Cell, functions
from fastrnn.planner import use_path
from fastrnn.reference import TORCH

POINTWISE = [*(cell for cell in CELLS.values() if cell.is_pointwise), MGU]
of_cell = pytest.mark.parametrize("cell", POINTWISE, ids=lambda cell: cell.name)


def values(count: int, *, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    made = torch.randn(count, 1000, dtype=torch.float64) * scale
    return tuple(part.clone().requires_grad_() for part in made)


def states(cell: Cell) -> tuple[torch.Tensor, ...]:
    """States of a cell, some of them empty if the cell has empty states."""
    made = values(cell.n_states)
    if "n" in cell.states:
        with torch.no_grad():
            c, n = (made[cell.states.index(name)] for name in "cn")
            n.abs_()
            c[:300], n[:300] = 0.0, 0.0
    return made


@of_cell
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_backward_is_the_derivative_of_forward(cell: Cell, scale: float) -> None:
    torch.manual_seed(0)
    wx, rh, extra = values(cell.n_gates, scale=scale), values(cell.n_gates), values(cell.n_extra)
    state = states(cell)
    new, saved = TORCH.bind(cell.forward)(wx, rh, state, extra)
    assert (len(new), len(saved)) == (cell.n_states, cell.n_saved)
    d_new = [torch.randn_like(part) for part in new]
    grads = iter(
        torch.autograd.grad(
            new, (*wx, *rh, *state, *extra), d_new, allow_unused=True, materialize_grads=True
        )
    )
    d_wx, d_rh, d_state, d_extra = (
        [next(grads) for _ in group] for group in (wx, rh, state, extra)
    )
    with torch.no_grad():
        found, apart, passed = TORCH.bind(cell.backward)(saved, new, state, d_new, extra)
        of_extra = TORCH.bind(cell.d_extra)(found, new, state) if cell.d_extra else ()
    assert (len(apart), len(of_extra)) == (cell.n_apart, cell.n_extra)
    shared = cell.n_gates - cell.n_apart
    pairs = [
        *zip(d_rh, found, strict=True),
        *zip(d_wx, (*found[:shared], *apart), strict=True),
        *zip(d_state, passed, strict=True),
        *zip(d_extra, of_extra, strict=True),
    ]
    for expected, result in pairs:
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


@of_cell
def test_backward_is_linear_in_the_gradients_of_the_state(cell: Cell) -> None:
    """The loop of torch operators relies on this."""
    torch.manual_seed(0)
    drawn = *(values(n) for n in (cell.n_gates, cell.n_gates, cell.n_extra)), states(cell)
    wx, rh, extra, state = ([part.detach() for part in group] for group in drawn)
    new, saved = TORCH.bind(cell.forward)(wx, rh, state, extra)

    def backward(d_new: list[torch.Tensor]) -> torch.Tensor:
        groups = TORCH.bind(cell.backward)(saved, new, state, d_new, extra)
        return torch.stack([part for group in groups for part in group])

    first, second = ([torch.randn_like(part) for part in new] for _ in range(2))
    both = [2.0 * a - 3.0 * b for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(backward(both), 2.0 * backward(first) - 3.0 * backward(second))


def test_backward_of_a_normalized_cell() -> None:
    """Backward of the part before normalization, and of h as a function of the normalized state."""
    torch.manual_seed(0)
    cell = CELLS["layernorm_lstm"]
    output = cell.output
    assert output is not None
    wx, rh, state, extra = (values(n) for n in (cell.n_gates, cell.n_gates, 2, cell.n_extra))
    new, saved = TORCH.bind(cell.forward)(wx, rh, state, extra)
    assert saved[output.saved] is new[0]
    d_new = [torch.randn_like(part) for part in new]
    expected = torch.autograd.grad(new, (*rh, state[1]), d_new)
    found, _, passed = TORCH.bind(cell.backward)(saved, new, state, d_new, extra)
    torch.testing.assert_close((*found, passed[1]), expected)
    part, normal, d_h = (each.detach().requires_grad_() for each in values(3))
    h = TORCH.bind(output.forward)(part, normal, extra)
    inputs = (part, normal, *extra[-output.n_extra :])
    expected = torch.autograd.grad(h, inputs, d_h)
    d_part, d_normal, d_extra = TORCH.bind(output.backward)(part, normal, d_h, extra)
    torch.testing.assert_close((d_part, d_normal, *d_extra), expected)


def test_backward_of_a_late_product() -> None:
    """The last gate's recurrent part is a product with factor * h; here it is elementwise."""
    torch.manual_seed(0)
    cell = CELLS["gru_reset_before"]
    late = cell.late
    assert late is not None
    wx, early, (h, weight) = values(3), values(2), values(2)
    factor = TORCH.bind(late.factor)(wx, early)
    new, saved = TORCH.bind(cell.forward)(wx, (*early, weight * (factor * h)), (h,), ())
    assert torch.equal(saved[late.saved], factor)
    d_new = [torch.randn_like(new[0])]
    expected = torch.autograd.grad(new, (*wx, h), d_new)
    (d_last,) = TORCH.bind(late.backward)(saved, d_new)
    found, _, passed = TORCH.bind(cell.backward)((*saved, d_last * weight), new, (h,), d_new, ())
    torch.testing.assert_close(found[-1], d_last)
    torch.testing.assert_close((*found, *passed), expected)


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_activations_are_those_of_forward(cell: Cell) -> None:
    if cell.activations is None:
        return
    torch.manual_seed(0)
    wx, rh, extra = values(cell.n_gates), values(cell.n_gates), values(cell.n_extra)
    _, saved = TORCH.bind(cell.forward)(wx, rh, states(cell), extra)
    found = TORCH.bind(cell.activations)(wx, rh)
    assert len(found) == cell.n_gates
    assert all(a.equal(b) for a, b in zip(found, saved, strict=False))


def test_a_function_without_an_engine_says_so() -> None:
    with pytest.raises(NotImplementedError):
        CELLS["rnn_tanh"].forward([0.0], [0.0], [0.0], ())


def test_every_function_has_a_docstring_and_is_one_of_torchs_engine() -> None:
    names = {name for name, _ in inspect.getmembers(functions, inspect.isfunction)}
    assert names <= TORCH.names.keys()
    assert all(inspect.getdoc(getattr(functions, name)) for name in names)
    assert cells.Engine is type(TORCH)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("path", [None, "kernels", "operators"])
def test_a_cell_of_ones_own(path: str | None, bidirectional: bool, monkeypatch) -> None:
    """One registry entry is enough to run everywhere; test_kernels.py has the interpreter."""
    monkeypatch.setitem(CELLS, "mgu", MGU)
    torch.manual_seed(0)
    steps, batch, inputs, hidden, directions = 7, 3, 5, 19, 1 + bidirectional
    shapes = [(2 * hidden, inputs), (2 * hidden, hidden), (2 * hidden,), (2 * hidden,)] * directions
    leaves = [torch.randn(steps, batch, inputs), torch.randn(directions, batch, hidden)]
    leaves += [torch.randn(shape) / hidden**0.5 for shape in shapes]
    options = fastrnn.functional.Options(
        bidirectional=bidirectional, lengths=torch.tensor([7, 0, 4])
    )

    def run(dtype: torch.dtype, path: str | None) -> list[torch.Tensor]:
        x, h, *weights = own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        with use_path(path):
            y, final = fastrnn.functional.sequence("mgu", x, [h], weights, options)
            results = [y, *final]
            cotangents = [torch.ones_like(part) for part in results]
            return [*results, *torch.autograd.grad(results, own, cotangents)]

    exact = run(torch.float64, "reference")
    for dtype in (torch.float32, torch.float64):
        for ours, truth in zip(run(dtype, path), exact, strict=True):
            bound = 64 * torch.finfo(dtype).eps * truth.abs().max().clamp(min=1)
            assert (ours.double() - truth).abs().max() <= bound
