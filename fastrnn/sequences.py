"""From checked arguments to layers: the choice of a path, and what surrounds the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import _VF, Tensor

from . import checks, gradients, heads, ops, planner, reference
from . import flow as flows
from .cells import CELLS, Weights
from .flow import Flow
from .options import Options, States

ATEN_LAYERS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm,
    "gru": _VF.gru,
    "rnn_tanh": _VF.rnn_tanh,
    "rnn_relu": _VF.rnn_relu,
}
ATEN_STEPS: dict[str, Callable[..., Any]] = {
    "lstm": _VF.lstm_cell,
    "gru": _VF.gru_cell,
    "rnn_tanh": _VF.rnn_tanh_cell,
    "rnn_relu": _VF.rnn_relu_cell,
}


def sequence(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    options: Options = Options(),  # noqa: B008
) -> tuple[Any, ...]:
    """Check the arguments, plan, and run all layers of any cell.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    input : Tensor
    hx : sequence of Tensor, or None
        The initial state, a tensor of shape (L * D, B, ·) for each that the cell has.
    weights : sequence of Tensor
        As for `lstm`, with the cell's extra weights last in each direction.
    options : Options

    Returns
    -------
    output : Tensor
    final : sequence of Tensor
        Shaped as `hx`.
    states : States
        Only if asked for.

    Raises
    ------
    ValueError, RuntimeError
        As for `lstm`.
    """
    state, weights = None if hx is None else list(hx), list(weights)
    directions = 2 if options.bidirectional else 1
    num_heads = options.num_heads
    per_direction = checks.check_weights(cell, weights, directions, num_heads)
    num_layers = len(weights) // (directions * per_direction)
    hidden = weights[0].shape[0] // CELLS[cell].n_gates
    size_h = weights[1].shape[1] * num_heads
    input_size = weights[0].shape[1]
    steps, batch = checks.check_input(input, input_size, options.batch_first, options.batch_sizes)
    shapes = [
        (num_layers * directions, batch, width)
        for width in [size_h] + [hidden] * (CELLS[cell].n_states - 1)
    ]
    if state is not None:
        checks.check_state(cell, state, shapes)
    checks.check_options(cell, options, input, steps, batch)
    fresh = checks.reset_states(cell, options, shapes)

    others = (*weights, *(state or ()), *fresh)
    is_packed = options.batch_sizes is not None and is_ragged(options.batch_sizes)
    dtypes = ops.autocast_dtypes(
        cell, input, state or (), weights[:per_direction], is_whole=not is_packed
    )
    if dtypes is not None:
        compute, of_h = dtypes
        with torch.autocast(input.device.type, enabled=False):
            output, final, *states = sequence(
                cell,
                input.to(compute),
                None if state is None else [part.to(compute) for part in state],
                [w.to(compute) for w in weights],
                options._replace(reset_state=[part.to(compute) for part in fresh] or None),
            )
        states = [part._replace(h=part.h.to(of_h)) for part in states]
        return output.to(of_h), [final[0].to(of_h), *final[1:]], *states

    # Before the only step, as of a policy that acts, a reset just chooses the initial state. That
    # T is 1 is asked last, and of calls with resets only: torch.export takes it for a limit on T.
    is_whole = directions == 1 and options.lengths is None and options.batch_sizes is None
    is_fixed = ops.is_traced()  # it would keep T = 1
    if options.reset is not None and is_whole and not is_fixed and steps == 1:
        checks.check_alike(input, [*(state or ()), *fresh], ())
        state = _begun(options.reset.view(batch, 1), state, fresh)
        options, fresh = options._replace(reset=None, reset_state=None), []
        others = (*weights, *(state or ()))

    is_marked, is_noisy = options.is_marked, options.is_noisy
    path = choose_path(
        cell,
        (steps, batch, input.shape[-1], hidden // num_heads),
        input,
        others,
        packed=is_packed,
        projected=size_h != hidden,
        layers=num_layers,
        directions=directions,
        marked=is_marked or num_heads > 1,  # nor has torch heads
        noisy=is_noisy,
    )
    if options.recompute and path != "loop" and ops.differentiated(input, *others):
        path = "loop"  # the others keep everything
    if path != "torch":
        checks.check_alike(input, state or (), weights)
        checks.check_alike(input, fresh, ())
    is_padded = is_marked or is_noisy or type(options.recompute) is int or input.is_cuda
    if options.batch_sizes is not None and path != "torch" and is_padded:
        return _padded(cell, input, state, weights, options, (steps, batch))
    if not is_marked and not is_noisy:
        if state is None and num_heads > 1:
            state = [input.new_zeros(shape) for shape in shapes]
        return run_layers(
            path, cell, input, state or [], weights, per_direction > 3, num_layers,
            options.dropout, options.training, options.bidirectional, options.batch_first,
            options.batch_sizes, options.recompute, num_heads,
        )  # fmt: skip

    x = input.transpose(0, 1) if options.batch_first else input
    flow, state = flow_of(options, x, state, shapes, fresh)
    inputs = [x]

    def dropout(y: Tensor) -> Tensor:
        inputs.append(torch.dropout(y, options.dropout, options.training))
        return inputs[-1]

    results, final = reference.stack(
        cell,
        x,
        state or [],
        weights,
        num_layers,
        bidirectional=options.bidirectional,
        flow=flow,
        dropout=dropout,
        layer=_layer_of(
            path, options.recompute, bool(options.return_states), num_heads,
            options.reset is not None,
        ),
    )  # fmt: skip
    output = results[-1].y
    if options.batch_first:
        output = output.transpose(0, 1)
    if not options.return_states:
        return output, final
    gates = None
    if options.return_states == "gates":
        h_0 = state[0] if state else x.new_zeros(shapes[0])
        gates = (cell, inputs, h_0, weights, per_direction, flow, num_heads)
    return output, final, states_of(results, directions, gates)


def states_of(
    results: Sequence[reference.Result], directions: int, gates: tuple[Any, ...] | None = None
) -> States:
    """Put the states of all steps of all layers together.

    Parameters
    ----------
    results : sequence of Result
        Of every layer, with traces.
    directions : int
    gates : tuple, optional
        If these are wanted too: the cell, the inputs of all layers, h_0, the weights, how many of
        these a direction has, the flow, and the number of heads if it is not 1.

    Returns
    -------
    States
    """
    h, *others = (
        torch.cat([part.unflatten(-1, (directions, -1)).transpose(1, 2) for part in parts], dim=1)
        for parts in zip(*([r.y, *r.traces] for r in results), strict=True)
    )
    found = None if gates is None else _gates(h, *gates)
    return States(h, others[0] if others else None, found, *others[1:])


def _layer_of(
    path: str, recompute: bool | int, traced: bool, num_heads: int, begins_anew: bool = False
) -> Callable[..., reference.Result]:
    """The function that runs one layer on a path."""
    layer = _with_resets if begins_anew else reference.layer
    if path == "loop":
        layer = partial(ops.layer, recompute=bool(recompute), traced=traced)
        if not isinstance(recompute, bool):
            layer = partial(_in_chunks, layer, recompute)
    return layer if num_heads == 1 else partial(heads.layer, layer, num_heads)


def _with_resets(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: None,
    bidirectional: bool,
    flow: Flow,
) -> reference.Result:
    """``reference.layer``, with gradients also where what lies before a reset is not a number.

    Autograd would multiply it by 0. The operator's backward leaves out what nothing depends on, but
    begins with another forward, so it is for this case only, and for where nobody may look.
    """
    arguments = (cell, x, state, weights, batch_sizes, bidirectional, flow)
    is_plain = ops.is_plain(x, *weights) and not reference.is_watched() and x.is_floating_point()
    if not is_plain or not ops.differentiated(x, *state, *weights, *flow.fresh):
        return reference.layer(*arguments)
    if checks.can_look(x):
        result = reference.layer(*arguments)
        values = (x, *state, result.y, *result.traces)
        total: Any = sum(part.detach().sum(dtype=torch.float64) for part in values)
        if bool(total.isfinite()):
            return result
    return ops.layer(*arguments, traced=True)


def _in_chunks(
    layer: Callable[..., reference.Result],
    chunk: int,
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: None,
    bidirectional: bool,
    flow: Flow,
) -> reference.Result:
    """A layer in chunks of steps, one call for each and for each direction."""
    directions = 2 if bidirectional else 1
    count = len(weights) // directions
    state = state or reference.zero_state(cell, x, x.shape[1], weights, directions)
    sequences, finals = [], []
    for d in range(directions):
        of_d = slice(d, d + 1)
        walk = _Walk(x.shape[0], d == 1, flow.marks)
        s = [part[of_d] for part in state]
        fresh, noise = ([part[of_d] for part in parts] for parts in (flow.fresh, flow.noise))
        outputs = []
        for start in range(0, x.shape[0], chunk):
            of_t = slice(start, start + chunk)
            marks = None if flow.marks is None else walk.take(flow.marks[d], of_t)[None]
            zones = [z if not z.numel() else walk.take(z[0], of_t)[None] for z in noise[1:]]
            y, s, traces = layer(
                cell, walk.take(x, of_t), s, weights[d * count : (d + 1) * count], None, False,
                Flow(marks, fresh, [*noise[:1], *zones]),
            )  # fmt: skip
            outputs.append((y, *traces))
        # To walk twice is to stand where one began.
        whole = slice(0, x.shape[0])
        sequences.append([walk.take(torch.cat(p), whole) for p in zip(*outputs, strict=True)])
        finals.append(s)
    y, *traces = (torch.cat(parts, dim=-1) for parts in zip(*sequences, strict=True))
    return reference.Result(y, [torch.cat(parts) for parts in zip(*finals, strict=True)], traces)


class _Walk:
    """The steps of every row in the order of a direction, those that it does not have last."""

    def __init__(self, steps: int, reverse: bool, marks: Tensor | None) -> None:
        self.steps, self.reverse, self.order = steps, reverse, None
        if reverse and marks is not None:
            time = torch.arange(steps, device=marks.device)[:, None]
            held = marks[0] & flows.HOLD != 0
            self.order = torch.where(held, time, steps - held.sum(0) - 1 - time)

    def take(self, part: Tensor, of_t: slice) -> Tensor:
        """Some steps, in the order of the walk, of what is (T, B, ...) in the order of time."""
        if not self.reverse:
            return part[of_t]
        if self.order is None:
            stop = min(of_t.stop, self.steps)
            return part[self.steps - stop : self.steps - of_t.start].flip(0)
        index = self.order[of_t]
        index = index.view(*index.shape, *[1] * (part.dim() - 2))
        return part.gather(0, index.expand(-1, -1, *part.shape[2:]))


def _begun(reset: Tensor, state: list[Tensor] | None, fresh: list[Tensor]) -> list[Tensor] | None:
    """The initial state where rows with `reset`, of shape (B, 1), begin anew."""
    if not fresh:
        return None if state is None else [part.masked_fill(reset, 0.0) for part in state]
    state = state or [torch.zeros_like(part) for part in fresh]
    return [torch.where(reset, new, old) for new, old in zip(fresh, state, strict=True)]


def flow_of(
    options: Options,
    x: Tensor,
    state: list[Tensor] | None,
    shapes: Sequence[tuple[int, int, int]],
    fresh: list[Tensor],
) -> tuple[Flow, list[Tensor] | None]:
    """Say what the layers are told about the flow of the state, drawing what is random.

    Parameters
    ----------
    options : Options
    x : Tensor of shape (T, B, I)
        Gives dtype and device.
    state : list of Tensor, or None
    shapes : sequence of (L * D, B, width)
        Those of the states.
    fresh : list of Tensor

    Returns
    -------
    flow : Flow
    state : list of Tensor, or None
        The initial state, not a number in rows whose length is out of range.
    """
    steps, batch, directions = *x.shape[:2], 2 if options.bidirectional else 1
    lengths, reset = options.lengths, options.reset
    if reset is not None and options.batch_first:
        reset = reset.transpose(0, 1)
    if lengths is not None:
        lengths = lengths.to(x.device, non_blocking=True)
        if not checks.can_look(lengths):
            # Nobody waits for the device, or the compiler, to complain: the row becomes NaN.
            wrong = (lengths < 0) | (lengths > steps)
            lengths = torch.where(wrong, steps, lengths)
            reset = None if reset is None else reset & ~wrong
            state = state or [x.new_zeros(shape) for shape in shapes]
            state = [part.masked_fill(wrong[:, None], float("nan")) for part in state]
    marks = flows.make_marks(steps, batch, directions, x.device, lengths, reset, options.bptt)
    noise: list[Tensor] = []
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}  # not `x`, which may be mapped
    if options.is_noisy:
        p = options.recurrent_dropout if options.training else 0.0
        noise.append(torch.dropout(torch.ones(shapes[0], **like), p, True) if p else x.new_empty(0))
        for zone, (count, _, width) in zip(options.zones(len(shapes)), shapes, strict=True):
            keep = torch.full((), zone, **like).expand(count, steps, batch, width)
            if not zone:
                keep = x.new_empty(0)
            elif options.training:
                keep = torch.bernoulli(keep)
            noise.append(keep)
    return Flow(marks, fresh, noise), state


def _gates(
    h: Tensor,
    cell: str,
    inputs: Sequence[Tensor],
    h_0: Tensor,
    weights: Sequence[Tensor],
    per_direction: int,
    flow: Flow,
    num_heads: int = 1,
) -> Tensor:
    """The activations of all steps, computed again from the states, in a differentiable way.

    `inputs` are those of every layer, `h` and `h_0` as in `States` and for `sequence`.
    """

    def of_rows(x: Tensor, before: Tensor, *weights: Tensor) -> Tensor:
        w = Weights.unpack(weights, len(CELLS[cell].extras))
        wx, rh = CELLS[cell].input_part(x, w), CELLS[cell].recurrent_part(before, w)
        return CELLS[cell].gates(wx, rh)  # type: ignore[misc]

    parts = []
    count = len(weights) // per_direction
    directions = count // len(inputs)
    for n in range(count):
        d = n % directions
        own, first = h[:, n], h_0[n : n + 1]
        before = torch.cat([own[1:], first] if d else [first, own[:-1]])
        if flow.marks is not None:
            mark = flow.marks[d, :, :, None]
            before = torch.where(mark & flows.START != 0, first, before)
            before = torch.where(mark & flows.CUT != 0, before.detach(), before)
            fresh = flow.fresh[0][n] if flow.fresh else torch.zeros_like(first)
            before = torch.where(mark & flows.FRESH != 0, fresh, before)
        x = inputs[n // directions]
        if flow.noise and flow.noise[0].numel():
            before = before * flow.noise[0][n]
        if flow.marks is not None:
            held = mark & flows.HOLD != 0
            x, before = x.masked_fill(held, 0.0), before.masked_fill(held, 0.0)
        of_n = weights[n * per_direction : (n + 1) * per_direction]
        of_heads = []
        for k in range(num_heads):
            own_rows = heads.rows(cell, of_n, k, num_heads) if num_heads > 1 else of_n
            own_before = heads.columns(before, k, num_heads)
            if flow.marks is not None and ops.is_plain(x, *weights):
                of_heads.append(gradients.by_rows(of_rows, (x, own_before), own_rows))
            else:
                of_heads.append(of_rows(x, own_before, *own_rows))
        gates = heads.join(of_heads, CELLS[cell].n_gates) if num_heads > 1 else of_heads[0]
        if flow.marks is not None:
            gates = gates.masked_fill(held, 0.0)
        parts.append(gates)
    return torch.stack(parts, dim=1)


def _padded(
    cell: str,
    input: Tensor,
    state: list[Tensor] | None,
    weights: Sequence[Tensor],
    options: Options,
    sizes: tuple[int, int],
) -> tuple[Any, ...]:
    """Run a packed sequence as a padded batch with lengths."""
    steps, batch = sizes
    batch_sizes = options.batch_sizes
    assert batch_sizes is not None
    row = torch.arange(batch, device=batch_sizes.device)[:, None]
    lengths = (row < batch_sizes).sum(1)
    x, _ = _VF._pad_packed_sequence(input, batch_sizes, False, 0.0, steps)
    options = options._replace(batch_sizes=None, lengths=lengths)
    output, final, *states = sequence(cell, x, state, weights, options)
    packed, _ = _VF._pack_padded_sequence(output, lengths, False)
    return packed, final, *states


def run_layers(
    path: str,
    cell: str,
    input: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None = None,
    recompute: bool | int = False,
    num_heads: int = 1,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Run all layers on a path, as torch.nn would, without checking the arguments.

    Parameters
    ----------
    path : str
        One of ``fastrnn.planner.PATHS``.
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    input, state, weights, has_biases, num_layers, dropout, training, bidirectional, batch_first
        As torch's own functions have them; `state` is a sequence, empty for zeros.
    batch_sizes, recompute, num_heads
        As in `Options`; with `num_heads` above 1, neither 'torch' nor an empty `state`.

    Returns
    -------
    output : Tensor
    final : sequence of Tensor
    """
    if not state and (path == "torch" or batch_sizes is not None):
        batch = input.shape[0 if batch_first else 1] if batch_sizes is None else int(batch_sizes[0])
        directions = 2 if bidirectional else 1
        state = reference.zero_state(cell, input, batch, weights, num_layers * directions)
    if path == "torch":
        hx = state if cell == "lstm" else state[0]
        options = (has_biases, num_layers, dropout, training, bidirectional)
        if batch_sizes is None:
            output, *final = ATEN_LAYERS[cell](input, hx, weights, *options, batch_first)
        else:
            output, *final = ATEN_LAYERS[cell](input, batch_sizes, hx, weights, *options)
        return output, final
    results, final = reference.stack(
        cell,
        input.transpose(0, 1) if batch_first else input,
        state,
        weights,
        num_layers,
        batch_sizes=batch_sizes,
        bidirectional=bidirectional,
        dropout=lambda y: torch.dropout(y, dropout, training),
        layer=_layer_of(path, recompute, False, num_heads),
    )
    output = results[-1].y
    return output.transpose(0, 1) if batch_first else output, final


def choose_path(
    cell: str,
    sizes: tuple[int, int, int, int],
    input: Tensor,
    others: Sequence[Tensor | None] = (),
    *,
    packed: bool = False,
    projected: bool = False,
    is_step: bool = False,
    layers: int = 1,
    directions: int = 1,
    marked: bool = False,
    noisy: bool = False,
) -> str:
    """Ask the planner for the path of one call.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.reference.CELLS``.
    sizes : (T, B, I, H)
    input : Tensor
    others : sequence of Tensor or None
        Weights and initial state: what else may need a gradient.
    packed, projected, is_step, layers, directions, marked, noisy
        As for ``fastrnn.planner.Problem``.

    Returns
    -------
    str
        One of ``fastrnn.planner.PATHS``.
    """
    if torch.compiler.is_compiling():
        return planner.compiled_path(cell, input.dtype, is_step, ops.transform())
    if torch._C._is_tracing():  # by torch.jit: sizes are tensors then
        if cell in ATEN_LAYERS and not (marked or noisy):
            return "torch"
        return "reference" if is_step else "loop"  # a loop over T would be recorded for one T only
    has_stock = cell in (ATEN_STEPS if is_step else ATEN_LAYERS) and not (marked or noisy)
    if has_stock and not ops.are_known(input, *others) and planner.forced_path() is None:
        return "torch"
    return planner.path(
        cell,
        *sizes,
        input.dtype,
        ops.device_type(input),
        not is_step and ops.differentiated(input, *others),
        packed,
        projected,
        is_step,
        ops.transform(),
        layers,
        directions,
        marked,
        noisy,
        *((None, "tf32") if input.is_cpu else ops.gpu.facts(input)),
    )


def is_ragged(batch_sizes: Tensor) -> bool:
    """Tell whether the sequences of a packed batch differ in length.

    Parameters
    ----------
    batch_sizes : Tensor of shape (T,)

    Returns
    -------
    bool
        False also while a compiler traces, which must not ask for values.
    """
    is_recorded = torch.compiler.is_compiling() or ops.is_traced()
    return not is_recorded and bool(batch_sizes[0] != batch_sizes[-1])


def step(
    cell: str,
    input: Tensor,
    state: list[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> Sequence[Tensor]:
    """Plan, check the arguments of a cell, and run one step.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    input, state, w_ih, w_hh, b_ih, b_hh
        As for ``fastrnn.functional.lstm_cell``; `state` is a list for every cell.

    Returns
    -------
    sequence of Tensor
        The new states.
    """
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh must be given both or neither")
    if input.dim() != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    checks.check_weights(cell, weights, 1)
    batch, hidden = input.shape[0], w_hh.shape[-1]
    if state is None:
        state = [input.new_zeros(batch, hidden)] * CELLS[cell].n_states
    checks.check_count(f"{cell}_cell", cell, state)
    path = choose_path(cell, (1, batch, input.shape[1], hidden), input, is_step=True)
    if path == "torch":
        return _aten_step(cell, input, state, weights)
    if not checks.is_step(input, state, w_ih, w_hh):
        # Refused in ATen's words.
        _aten_step(cell if cell in ATEN_STEPS else "rnn_tanh", input, state, weights)
        raise RuntimeError(f"hidden states must be of shape {(batch, hidden)}")

    step = ops.cell_step if path == "loop" else reference.cell_step
    dtypes = ops.autocast_dtypes(cell, input, state, weights, is_whole=False)
    if dtypes is None:
        checks.check_alike(input, state, weights)
        return step(cell, input, state, weights)
    tensors = [t.to(dtypes[0]) for t in (*state, *weights)]
    state, weights = tensors[: len(state)], tensors[len(state) :]
    with torch.autocast(input.device.type, enabled=False):
        return step(cell, input.to(dtypes[0]), state, weights)


def _aten_step(
    cell: str, input: Tensor, state: list[Tensor], weights: list[Tensor]
) -> Sequence[Tensor]:
    """One step by ATen, which checks the arguments itself and knows autocast."""
    if cell == "lstm":
        return ATEN_STEPS[cell](input, state, *weights)
    return [ATEN_STEPS[cell](input, state[0], *weights)]
