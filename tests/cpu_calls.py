"""Random calls of a layer on a CPU, their results, and the exact results."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrnn import cpu, gradients, reference
from fastrnn.call import Asked, Call, Cotangents
from fastrnn.cells import CELLS
from fastrnn.cpu import ALL
from fastrnn.flow import PLAIN, Flow, make_marks

#: Cells that support a projection.
PROJECTED = ("lstm", "layernorm_lstm", "peephole_lstm", "slstm")
SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 65)
# One or more blocks of rows of a product with unpacked weights; one or more tiles.
BATCHES = (1, 2, 3, 4, 5, 7, 13)


def random_state(name: str, lead: Sequence[int], hidden: int, size_h: int) -> list[Tensor]:
    """A state that steps can produce: in an sLSTM, n >= 1, or both n and c are 0.

    If an empty state has a large m, derivatives and their errors grow as exp(m - i);
    test_variants.py covers that case in float64.
    """
    others = CELLS[name].states[1:]
    state = [torch.randn(*lead, size_h), *[torch.randn(*lead, hidden) for _ in others]]
    if name == "slstm":
        is_empty = torch.rand(*lead, hidden) < 0.25
        state[2] = (1.0 + state[2].abs()).masked_fill(is_empty, 0.0)
        state[1] = state[1].masked_fill(is_empty, 0.0)
        state[3] = state[3].masked_fill(is_empty, -5.0)
    return state


def random_noise(rng: random.Random, steps: int, state: Sequence[Tensor]) -> list[Tensor]:
    """Recurrent dropout, and zoneout of every kind, for such states.

    In an sLSTM, zoneout applies to h alone: the other states depend on each other.
    """
    none = torch.empty(0)
    noise = [torch.dropout(torch.ones_like(state[0]), 0.4, True) if rng.random() < 0.5 else none]
    for k, (directions, *rest) in enumerate(part.shape for part in state):
        mask = torch.rand(directions, steps, *rest) < 0.3
        noise.append(
            none if k and len(state) > 2 else rng.choice([none, torch.full((1,), 0.2), mask])
        )
    return noise


def random_flow(rng: random.Random, steps: int, lead: Sequence[int], fresh: Any) -> Flow:
    """Lengths, resets and truncation, each present at random; `fresh` makes a state."""
    lengths, reset, bptt = (rng.random() < 0.5 for _ in range(3))
    directions, batch = lead
    marks = make_marks(
        steps,
        batch,
        directions,
        torch.device("cpu"),
        torch.tensor([rng.randint(0, steps) for _ in range(batch)]) if lengths else None,
        torch.rand(steps, batch) < 0.3 if reset else None,
        rng.randint(1, steps) if bptt else None,
    )
    return Flow(marks, fresh() if marks is not None and rng.random() < 0.5 else [])


def draw(name: str, seed: int) -> tuple[Call, Cotangents]:
    """Draw a call of a layer and gradients of its results."""
    rng, cell = random.Random(f"{name}{seed}"), CELLS[name]
    torch.manual_seed(seed)
    # The standard deviation of a few numbers can be near 0, which amplifies errors.
    inputs, hidden, batch = (
        rng.choice(sizes) for sizes in (SIZES, SIZES[6 * cell.is_normalized :], BATCHES)
    )
    bidirectional, biased, packed, flows, projected = (rng.random() < 0.5 for _ in range(5))
    projected = projected and hidden > 1 and name in PROJECTED
    heads = 1 if projected else rng.choice([n for n in (1, 1, 2, 3) if hidden % n == 0])
    members = 0 if packed else rng.choice((0, 0, 0, 2, 3))
    size_h = rng.randint(1, hidden - 1) if projected else hidden
    given = packed or rng.random() < 0.5
    directions = 2 if bidirectional else 1
    lengths = sorted((rng.randint(1, 6) for _ in range(batch)), reverse=True)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])])
    of_all = batch * max(1, members)
    rows = (int(sizes.sum()),) if packed else (lengths[0], of_all)
    width, lead, each = cell.n_gates * hidden, (directions, of_all), (members,) * (members > 0)
    shapes = [(width, inputs), (width, size_h // heads), *[(width,), (width,)] * biased]
    shapes += [(size_h, hidden)] * projected
    shapes += [(extra.blocks * hidden,) for extra in cell.extras]
    make_state = functools.partial(random_state, name, lead, hidden, size_h)
    state = make_state()
    flow = random_flow(rng, lengths[0], lead, make_state) if flows and not packed else PLAIN
    if rng.random() < 0.4 and not packed:
        flow = flow._replace(noise=random_noise(rng, lengths[0], state))
    call = Call(
        cell,
        torch.randn(*rows, inputs),
        state if given else [],
        [
            torch.randn(*each, *shape) * shape[-1] ** -0.5
            for _ in range(directions)
            for shape in shapes
        ],
        sizes if packed else None,
        bidirectional,
        flow,
    )
    dy = torch.randn(*rows, directions * size_h) if rng.random() < 0.8 else None
    d_traces = [torch.randn(*rows, directions * hidden) for _ in state[1:]]
    d_final = [torch.randn_like(part) for part in state]
    return call, Cotangents(dy, d_final, d_traces if rng.random() < 0.5 else [])


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A call or cotangents, in another dtype."""
    if isinstance(value, (Call, Cotangents, Flow)):
        return type(value)(*(convert(part, dtype) for part in value))
    if type(value) in (list, tuple):
        return [convert(part, dtype) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@functools.cache
def drawn(name: str, seed: int, dtype: torch.dtype) -> tuple[Call, Cotangents]:
    """The result of `draw`, rounded to a dtype."""
    call, given = draw(name, seed)
    return convert(call, dtype), convert(given, dtype)


def run(call: Call, given: Cotangents) -> list[Tensor]:
    """All results and gradients of a layer, except gradients of a state that is not given."""
    result, saved = cpu.forward(call, ALL, True)
    fakes = cpu.fake_saved(call, ALL)
    assert [(t.shape, t.dtype) for t in saved] == [(t.shape, t.dtype) for t in fakes]
    dx, d_state, d_fresh, d_weights = cpu.backward(call, given, saved, Asked())
    d_state = d_state if call.state else []
    return [result.y, *result.final, *result.traces, dx, *d_state, *d_fresh, *d_weights]


def exact(call: Call, given: Cotangents) -> list[Tensor]:
    """The same from the reference, in float64."""
    call, given = convert(call, torch.float64), convert(given, torch.float64)
    result, found = reference.layer(call), gradients.first(call, given)
    inputs = [call.x, *call.state, *call.flow.fresh, *call.weights]
    grads = [found.dx, *found.d_state, *found.d_fresh, *found.d_weights]
    filled = [
        torch.zeros_like(t) if grad is None else grad for grad, t in zip(grads, inputs, strict=True)
    ]
    return [result.y, *result.final, *result.traces, *filled]


@functools.cache
def exact_of(name: str, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """`exact` for the result of `drawn`."""
    return exact(*drawn(name, seed, dtype))


@functools.cache
def operators_of(name: str, seed: int, dtype: torch.dtype) -> list[Tensor]:
    """`run` for the result of `drawn`, with torch's operators: half precision is rounded once."""
    with cpu.kernels_allowed(False):
        return run(*drawn(name, seed, dtype))
