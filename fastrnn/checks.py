"""Argument checks, with torch's messages where torch has one.

`checked` makes the record of a call of layers, `checked_step` that of a step. Checks that depend
only on shapes and numbers are cached, because a layer is usually called with the same ones again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .call import Call, Known
from .cells import CELLS, Cell
from .context import can_look, is_traced, untraced
from .flow import PLAIN, Flow
from .options import Options


def checked(
    cell: str, input: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Tensor],
    options: Options,
) -> Call:  # fmt: skip
    """Make the record of a call, or raise what ``fastrnn.functional.lstm`` documents.

    The arguments are those of ``fastrnn.functional.sequence``. The record is time-major, with the
    states after a reset in its flow.
    """
    of_cell, weights, state = CELLS[cell], list(weights), () if hx is None else list(hx)
    num_layers, known = _checked(_numbers, _layers_of, of_cell, input, hx, weights, options)
    x = input.transpose(0, 1) if options.batch_first else input
    sizes, bidirectional = options.batch_sizes, options.bidirectional
    call = Call(of_cell, x, state, weights, sizes, bidirectional, PLAIN, num_layers, options, known)
    if options.lengths is not None or options.reset is not None:
        _check_flow(call)
    if options.reset_state is None:
        return call
    _check_reset_state(call)
    pairs = zip(options.reset_state, call.shapes(), strict=True)
    return call._replace(flow=Flow(None, [part.expand(*shape) for part, shape in pairs]))


def checked_step(cell: str, x: Tensor, hx: Sequence[Tensor] | None, weights: Sequence[Any]) -> Call:
    """Make the record of a single step, or raise what ``fastrnn.functional.lstm_cell`` documents.

    `weights` are (w_ih, w_hh, b_ih, b_hh), where both biases may be None, then the cell's extra
    weights. Whether input and state fit the weights is not checked here: see `is_step`.
    """
    of_cell, (w_ih, w_hh, b_ih, b_hh, *extras) = CELLS[cell], weights
    if (b_ih is None) != (b_hh is None):
        raise ValueError("b_ih and b_hh must be given both or neither")
    given = [w_ih, w_hh, *extras] if b_ih is None else list(weights)
    _, known = _checked(_step_numbers, _layers_of_step, of_cell, x, given)
    if hx is None:
        hx = [x.new_zeros(x.shape[0], given[1].shape[-1])] * of_cell.n_states
    _check_count(f"{cell}_cell", of_cell, hx)
    return Call(of_cell, x, hx, given, known=known)


@untraced
def is_step(call: Call) -> bool:
    """Tell whether the input and states of a step fit its weights."""
    w_ih, w_hh = call.weights[:2]
    sizes = (call.x.shape[0], w_hh.shape[-1], w_ih.shape[-1])
    return all((*part.shape, call.x.shape[1]) == sizes for part in call.state)


@untraced
def check_step(call: Call) -> None:
    """Raise RuntimeError with ATen's message unless `is_step`."""
    if is_step(call):
        return
    (batch, inputs), (w_ih, w_hh) = call.x.shape, call.weights[:2]
    if inputs != w_ih.shape[-1]:
        raise RuntimeError(
            f"input has inconsistent input_size: got {inputs} expected {w_ih.shape[-1]}"
        )
    sizes = batch, w_hh.shape[-1]
    for k, part in enumerate(call.state):
        if part.dim() > 0 and part.shape[0] != batch:
            raise RuntimeError(
                f"Input batch size {batch} doesn't match hidden{k} batch size {part.shape[0]}"
            )
        if part.dim() > 1 and part.shape[1] != sizes[1]:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {part.shape[1]}, expected {sizes[1]}"
            )
    raise RuntimeError(f"hidden states must be of shape {sizes}")


def _checked(
    numbers: Callable[..., Any], layers_of: Callable[..., int], *arguments: Any
) -> tuple[int, Known | None]:
    """Check sizes and other numbers, unless cached; return the number of layers and the cache."""
    if torch.compiler.is_compiling() or is_traced():
        return _layers_unseen(numbers, layers_of, arguments), None
    found = numbers(*arguments)
    try:
        known = remembered(layers_of, *found)
    except TypeError:  # symbolic sizes and lists have no hash
        known = Known(layers_of(*found))
    return known.num_layers, known


@untraced
def _layers_unseen(numbers: Any, layers_of: Any, arguments: Any) -> int:
    return layers_of(*numbers(*arguments))


@functools.lru_cache(maxsize=1024, typed=True)
def remembered(layers_of: Callable[..., int], *numbers: Any) -> Known:
    """Check numbers, and cache the last 1024 sets of them."""
    return Known(layers_of(*numbers))


def _numbers(
    cell: Cell, input: Tensor, hx: Any, weights: Sequence[Tensor], options: Options
) -> tuple[Any, ...]:
    """The arguments of `_layers_of`."""
    packed = None if options.batch_sizes is None else _check_batch_sizes(input, options)
    states = None if hx is None else tuple([part.shape for part in hx])
    shapes = input.shape, states, _shapes(weights), packed
    batch_first, bidirectional, dropout, _ = options[:4]
    return (cell, shapes, batch_first, bidirectional, dropout, *options[8:])


def _step_numbers(cell: Cell, x: Tensor, weights: Sequence[Tensor]) -> tuple[Any, ...]:
    return cell, x.shape, _shapes(weights)


def _shapes(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    if not all(map(isinstance, tensors, itertools.repeat(Tensor))):
        k, other = next((k, t) for k, t in enumerate(tensors) if not torch.is_tensor(t))
        kind = type(other).__name__
        raise TypeError(f"expected Tensor as element {k} in argument 2, but got {kind}")
    return tuple([tensor.shape for tensor in tensors])


def _layers_of_step(cell: Cell, shape: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    if len(shape) != 2:
        raise RuntimeError(f"input must have 2 dimensions, got {len(shape)}")
    return _layers_of_weights(cell, weights, False, 1)[0]


def _layers_of(
    cell: Cell, shapes: Any, batch_first: Any, bidirectional: Any, dropout: Any, *options: Any
) -> int:
    """Check a call; `shapes` are those of input, states and weights, and (T, B) if packed."""
    shape, states, weights, packed = shapes
    return_states, bptt, recompute, recurrent_dropout, zoneout, num_heads = options
    num_layers, size_h = _layers_of_weights(cell, weights, bidirectional, num_heads)
    dims, input_size = 3 if packed is None else 2, weights[0][1]
    if len(shape) != dims:
        raise RuntimeError(f"input must have {dims} dimensions, got {len(shape)}")
    if shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {shape[-1]}"
        )
    steps, batch = packed or (shape[1::-1] if batch_first else shape[:2])
    if states is not None:
        _check_count(cell.name, cell, states)
    for k, state in enumerate(states or ()):
        hidden = weights[0][0] // cell.n_gates
        expected = (num_layers * (2 if bidirectional else 1), batch, hidden if k else size_h)
        if torch.compiler.is_compiling() and len(state) == 3:
            # The batch size of a packed sequence is known, and checked, only when the graph runs.
            torch._check(state[1] == batch)
        if state != expected:
            which = f"hidden[{k}]" if len(states) > 1 else "hidden"
            raise RuntimeError(f"Expected {which} size {expected}, got {list(state)}")
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    probability("dropout", dropout)
    probability("recurrent_dropout", recurrent_dropout)
    zoneout_rates(cell, zoneout)
    if bptt is not None:
        _check_steps("bptt", bptt, "None or ")
    if not isinstance(recompute, bool):
        _check_steps("recompute", recompute, "True, False or ")
    if return_states not in (False, True, "gates"):
        raise ValueError(f"return_states must be False, True or 'gates', got {return_states!r}")
    if return_states == "gates" and cell.activations is None:
        raise ValueError(f"return_states='gates' is not supported for the cell {cell.name}")
    return num_layers


def _layers_of_weights(
    cell: Cell, shapes: Sequence[Sequence[int]], bidirectional: bool, num_heads: int
) -> tuple[int, int]:
    """Return the number of layers and the size of h, or raise if layers are incomplete."""
    directions, name = 2 if bidirectional else 1, cell.name
    if [len(shape) for shape in shapes[:2]] != [2, 2]:
        raise ValueError(
            f"the weights of a {name} layer begin with w_ih and w_hh, both 2-D; got "
            f"{len(shapes)} weights of shapes {[tuple(shape) for shape in shapes[:2]]}"
        )
    width = shapes[0][0]
    hidden, rest = width // cell.n_gates, width % cell.n_gates
    size_h = shapes[1][-1] if cell.n_states > 1 and num_heads == 1 else hidden
    projected = bool(size_h != hidden)
    vectors = sum(len(shape) == 1 for shape in shapes)
    biased = vectors * (2 + projected) > (len(shapes) - vectors) * len(cell.extras)
    width_hh = heads(num_heads, hidden) if num_heads != 1 else size_h
    per_direction = 2 + 2 * biased + projected + len(cell.extras)
    if rest or len(shapes) % (directions * per_direction):
        raise ValueError(
            f"{len(shapes)} weights, the first of shape {tuple(shapes[0])}, do not make "
            f"whole {name} layers with {directions} direction(s) and {per_direction} weights each"
        )
    for start in range(0, len(shapes), per_direction):
        first_layer = start < directions * per_direction
        size_in = shapes[0][1] if first_layer else size_h * directions
        expected = [(width, size_in), (width, width_hh)] + [(width,), (width,)] * biased
        expected += [(size_h, hidden)] * projected + [(e.blocks * hidden,) for e in cell.extras]
        for k, shape in enumerate(expected):
            if shapes[start + k] != shape:
                raise ValueError(
                    f"weight {start + k} must be of shape {shape}, got {tuple(shapes[start + k])}"
                )
    return len(shapes) // (directions * per_direction), size_h


def heads(num_heads: int, hidden_size: int, proj_size: int = 0) -> int:
    """Return the hidden units per head, or raise a ValueError if the heads do not fit the layer."""
    if not isinstance(num_heads, int) or num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"num_heads must be a divisor of hidden_size, which is {hidden_size}, got {num_heads!r}"
        )
    if proj_size and num_heads > 1:
        raise ValueError(f"num_heads={num_heads} cannot be used with proj_size={proj_size}")
    return hidden_size // num_heads


def probability(name: str, value: float) -> float:
    """Return `value`, or raise a ValueError that names the argument if it is not a probability."""
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


def zoneout_rates(cell: Cell, zoneout: float | Sequence[float]) -> float | Sequence[float]:
    """Return `zoneout`, or raise a ValueError if it is neither a probability nor one per state."""
    if not isinstance(zoneout, (tuple, list)):
        return probability("zoneout", zoneout)  # type: ignore[arg-type]
    if len(zoneout) != cell.n_states:
        raise ValueError(
            f"zoneout of {cell.name} must be a number or {cell.n_states} numbers, "
            f"got {len(zoneout)}"
        )
    for zone in zoneout:
        probability("zoneout", zone)
    return tuple(zoneout) if any(zoneout) else 0.0


@untraced
def _check_flow(call: Call) -> None:
    options = call.options
    if options.lengths is not None:
        _check_lengths(call, options.lengths)
    reset = options.reset
    if reset is not None:
        shape = (call.batch, call.steps) if options.batch_first else (call.steps, call.batch)
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
            kind = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise ValueError(f"reset must be a tensor of torch.bool, got {kind}")
        if reset.shape != shape:
            raise ValueError(f"reset must be of shape {shape}, got {tuple(reset.shape)}")
        if reset.device != call.x.device:
            raise ValueError(f"reset must be on {call.x.device} like input, got {reset.device}")


def _check_steps(name: str, value: Any, others: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be {others}a positive number of steps, got {value!r}")


def _check_lengths(call: Call, lengths: Tensor) -> None:
    steps, batch, device = call.steps, call.batch, call.x.device
    if call.options.batch_sizes is not None:
        raise ValueError("lengths cannot be used with a packed sequence, which has its own")
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be a tensor of torch.int64 or torch.int32, got {kind}")
    if lengths.shape != (batch,):
        raise ValueError(f"lengths must be of shape {(batch,)}, got {tuple(lengths.shape)}")
    if lengths.device != device and not lengths.is_cpu:
        raise ValueError(f"lengths must be on {device} like input, got {lengths.device}")
    if can_look(lengths) and batch:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > steps:
            wrong = low if low < 0 else high
            raise ValueError(f"lengths must be from 0 to the {steps} steps of input, got {wrong}")


@untraced
def _check_reset_state(call: Call) -> None:
    state, shapes, name = call.options.reset_state, call.shapes(), call.cell.name
    if call.options.reset is None:
        raise ValueError("reset_state was given without reset")
    if isinstance(state, Tensor):
        raise ValueError(f"reset_state of {name} must be a tuple of {len(shapes)}, got a tensor")
    assert state is not None
    _check_count(name, call.cell, state)
    for k, part in enumerate(state):
        if not isinstance(part, Tensor):
            raise ValueError(f"reset_state[{k}] must be a tensor, got {type(part).__name__}")
    for k, (part, (count, batch, width)) in enumerate(zip(state, shapes, strict=True)):
        if part.shape not in ((count, batch, width), (count, 1, width)):
            raise ValueError(
                f"reset_state[{k}] must be of shape {(count, batch, width)} or "
                f"{(count, 1, width)}, got {tuple(part.shape)}"
            )


def _check_batch_sizes(input: Tensor, options: Options) -> tuple[int, int]:
    """T and B."""
    batch_sizes: Any = options.batch_sizes
    if options.batch_first:
        raise ValueError("batch_first cannot be used with batch_sizes")
    if (batch_sizes.dim(), batch_sizes.device.type, batch_sizes.dtype) != (1, "cpu", torch.int64):
        raise ValueError(
            "batch_sizes must be a 1-D int64 tensor on the CPU, got "
            f"{batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        return batch_sizes.shape[0], int(batch_sizes[0])
    sizes = batch_sizes.tolist()
    shrinking, rows = all(a >= b for a, b in itertools.pairwise(sizes)), input.shape[0]
    if sizes and (not shrinking or sizes[-1] < 1 or sum(sizes) != rows):
        raise ValueError(
            f"batch_sizes must be positive, non-increasing and add up to the {rows} rows "
            f"of the input, got {sizes if len(sizes) <= 8 else [*sizes[:8], '...']}"
        )
    return len(sizes), sizes[0] if sizes else 0


def _check_count(name: str, cell: Cell, state: Sequence[Tensor]) -> None:
    # Cells with one state never fail this check: their callers wrap the state in a list.
    if len(state) != (count := cell.n_states):
        raise RuntimeError(f"{name} expects {'two' if count == 2 else count} hidden states")


def check_alike(call: Call) -> None:
    """Raise RuntimeError unless all tensors of a call share the device and dtype of its input."""
    x = call.x
    dtype, device = x.dtype, x.device
    for kind, tensors in (
        ("hidden", call.state), ("parameter", call.weights), ("hidden", call.flow.fresh),
    ):  # fmt: skip
        for other in tensors:
            if other.device != device:
                raise RuntimeError(
                    f"Input and {kind} tensors are not at the same device, "
                    f"found input tensor at {device} and {kind} tensor at {other.device}"
                )
            if other.dtype != dtype:
                raise RuntimeError(
                    f"Input and {kind} tensors are not the same dtype, "
                    f"found input tensor with {dtype} and {kind} tensor with {other.dtype}"
                )
