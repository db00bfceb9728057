"""Run a checked call: choose its path once, and do what surrounds the layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import _VF, Tensor

from . import autocast, checks, chunks, cpu, ops, planner, reference, stepping
from . import flow as flows
from .call import Call, Result
from .context import can_look, differentiated, is_plain, is_traced
from .flow import Flow
from .states import states_of

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


#: A function from input, states and weights to output and final states.
Prepared = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


def run(call: Call) -> tuple[Any, ...]:
    """Plan and run all layers of a call that ``checks.checked`` made.

    Returns the output, the final state and, if requested, the states of all steps.
    """
    options = call.options
    if options.reset is not None:
        call = _begun(call)
    dtypes = autocast.dtypes(call)
    path = planner.path_of(call, None if dtypes is None else dtypes.compute)
    if options.recompute and path not in planner.OURS and differentiated(*call.tensors):
        path = "operators"  # the other paths cannot recompute
    # cuDNN is left to autocast, which casts all weights into one contiguous buffer.
    if dtypes is None or (path == "torch" and call.x.is_cuda):
        return _on_path(path, call)
    with torch.autocast(call.x.device.type, enabled=False):
        output, (h, *final), *states = _on_path(path, autocast.to(call, dtypes.compute))
    states = [part._replace(h=part.h.to(dtypes.of_h)) for part in states]
    return output.to(dtypes.of_h), [h.to(dtypes.of_h), *final], *states


def prepared(call: Call, *, is_step: bool = False) -> Prepared | None:
    """Make a function that runs calls like this one without a record, or None if there is none.

    It is for inference, or for a step with gradients. It runs the path of this call, on tensors
    that pass a ``context.guard`` made for this call.
    """
    if not is_plain(*call.tensors) or reference.is_watched():
        return None
    if not call.x.is_cpu:
        return None
    path = planner.path_of(call, is_step=is_step)
    if path == "torch" and not is_step:
        return _prepared_by_torch(call)
    if path != "kernels":
        return None
    checks.check_alike(call)
    if is_step and differentiated(*call.tensors):
        return stepping.prepared(call)
    if call.options.is_noisy:  # in inference the noise is constant
        call = call._replace(flow=call.flow._replace(noise=_noise(call)))
    return cpu.prepared(call, is_step=is_step)


def _prepared_by_torch(call: Call) -> Prepared:
    """Make a function that runs `_by_torch` on other tensors."""
    cell, options, others = call.cell, call.options, call[5:]

    def run(
        x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        x = x.transpose(0, 1) if options.batch_first else x
        output, final = _by_torch(Call(cell, x, state, weights, None, *others))
        return output.transpose(0, 1) if options.batch_first else output, final

    return run


def _begun(call: Call) -> Call:
    """Apply the reset of a call of a single step, such as that of an acting policy, to its state.

    Whether T is 1 is checked last, and only for calls with resets, because torch.export turns the
    check into a constraint on T; it is not checked while torch.jit traces, which would record it.
    """
    options, fresh = call.options, call.flow.fresh
    is_whole = not call.bidirectional and options.lengths is None and call.batch_sizes is None
    if not is_whole or is_traced() or call.steps != 1:
        return call
    checks.check_alike(call)
    reset, state = options.reset.view(call.batch, 1), call.state  # type: ignore[union-attr]
    if fresh:
        state = [torch.where(reset, *pair) for pair in zip(fresh, call.initial(), strict=True)]
    elif state:
        state = [part.masked_fill(reset, 0.0) for part in state]
    options = options._replace(reset=None, reset_state=None)
    return call._replace(state=state, flow=flows.PLAIN, options=options)


def _on_path(path: str, call: Call) -> tuple[Any, ...]:
    options = call.options
    if path == "torch":
        output, final = _by_torch(call)
        return output.transpose(0, 1) if options.batch_first else output, final
    checks.check_alike(call)
    is_marked = options.is_marked or options.is_noisy
    is_padded = is_marked or type(options.recompute) is int or call.x.is_cuda
    if is_padded and call.batch_sizes is not None:
        return _padded(path, call)
    if is_marked:
        call = _with_flow(call)
    elif call.batch_sizes is not None and not call.state:
        call = call._replace(state=call.initial())  # an operator cannot tell B from packed input
    inputs, results, final = reference.stack(call, _layer_on(path, options))
    output = results[-1].y
    if options.batch_first:
        output = output.transpose(0, 1)
    if not options.return_states:
        return output, final
    return output, final, states_of(call, inputs, results)


def _by_torch(call: Call) -> tuple[Tensor, Sequence[Tensor]]:
    """Run all layers by torch's functions, which check the arguments themselves."""
    options, name = call.options, call.cell.name
    state = call.state or call.initial()
    hx = state if name == "lstm" else state[0]
    others = (
        call.n_weights > 3, call.num_layers, options.dropout, options.training, call.bidirectional,
    )  # fmt: skip
    if call.batch_sizes is None:
        output, *final = ATEN_LAYERS[name](call.x, hx, call.weights, *others, False)
    else:
        output, *final = ATEN_LAYERS[name](call.x, call.batch_sizes, hx, call.weights, *others)
    return output, final


def _layer_on(path: str, options: Any) -> Callable[[Call], Result]:
    """The function that runs one layer on a path."""
    layer = reference.layer if options.reset is None else _by_reference_with_resets
    if path in planner.OURS:
        recompute, traced = options.recompute, bool(options.return_states)
        layer = ops.layer
        if recompute or traced:
            layer = partial(ops.layer, recompute=bool(recompute), traced=traced)
        if not isinstance(recompute, bool):
            layer = partial(chunks.layer, layer, recompute)
    return layer


def _by_reference_with_resets(call: Call) -> Result:
    """``reference.layer``, with finite gradients even if values before a reset are NaN.

    Autograd would multiply them by 0. The operator's backward leaves out the steps that no result
    depends on, but starts with another forward, so it is used only in this case, and where the
    values cannot be inspected.
    """
    x = call.x
    is_seen = is_plain(x, *call.weights) and not reference.is_watched() and x.is_floating_point()
    if not is_seen or not differentiated(*call.tensors):
        return reference.layer(call)
    if can_look(x):
        result = reference.layer(call)
        values = (x, *call.state, result.y, *result.traces)
        total: Any = sum(part.detach().sum(dtype=torch.float64) for part in values)
        if bool(total.isfinite()):
            return result
    return ops.layer(call, traced=True)


def _with_flow(call: Call) -> Call:
    """Add the marks and the noise, which is drawn now, to a call.

    The initial state is set to NaN in rows whose length is out of range.
    """
    options, x, state = call.options, call.x, call.state
    lengths, reset = options.lengths, options.reset
    if reset is not None and options.batch_first:
        reset = reset.transpose(0, 1)
    if lengths is not None:
        lengths = lengths.to(x.device, non_blocking=True)
        if not can_look(lengths):
            # Raising an error would need a host sync: set the row to NaN.
            wrong = (lengths < 0) | (lengths > call.steps)
            lengths = torch.where(wrong, call.steps, lengths)
            reset = None if reset is None else reset & ~wrong
            state = [part.masked_fill(wrong[:, None], float("nan")) for part in call.initial()]
    sizes = (call.steps, call.batch, call.directions)
    marks = flows.make_marks(*sizes, x.device, lengths, reset, options.bptt)
    noise = _noise(call) if options.is_noisy else []
    return call._replace(state=state, flow=Flow(marks, call.flow.fresh, noise))


def _noise(call: Call) -> list[Tensor]:
    """Draw the noise of a flow."""
    x, options, shapes = call.x, call.options, call.shapes()
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}  # not of `x`: vmap may batch it
    p, none = options.recurrent_dropout if options.training else 0.0, torch.empty(0, **like)
    noise = [torch.dropout(torch.ones(shapes[0], **like), p, True) if p else none]
    for zone, (count, batch, width) in zip(options.zones(len(shapes)), shapes, strict=True):
        if zone and options.training:
            noise.append(_mask((count, call.steps, batch, width), zone, x.device))
        else:
            noise.append(torch.full((1,), zone, **like) if zone else none)
    return noise


def _mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """Draw a mask whose elements are True with probability `p`, rounded to a multiple of 2^-32.

    On a CPU this takes half the time of torch.bernoulli, which draws 64 bits per element.
    """
    count, least = math.prod(shape), -(2**31)
    # One more than needed, because a tensor of 0 elements cannot be viewed.
    bits = torch.randint(-(2**63), 2**63 - 1, (count // 2 + 1,), device=device).view(torch.int32)
    below = bits[:count] <= least - 1 + max(1, round(p * 2**32)) if p < 1 else bits[:count] >= least
    return below.view(shape)


def _padded(path: str, call: Call) -> tuple[Any, ...]:
    """Run a packed sequence as a padded batch with lengths."""
    sizes, batch = call.batch_sizes, call.batch
    assert sizes is not None
    row = torch.arange(batch, device=sizes.device)[:, None]
    lengths = (row < sizes).sum(1)
    x, _ = _VF._pad_packed_sequence(call.x, sizes, False, 0.0, call.steps)
    options = call.options._replace(batch_sizes=None, lengths=lengths)
    output, final, *states = _on_path(path, call._replace(x=x, batch_sizes=None, options=options))
    packed, _ = _VF._pack_padded_sequence(output, lengths, False)
    return packed, final, *states


def run_step(call: Call) -> Sequence[Tensor]:
    """Plan and run one step of a call that ``checks.checked_step`` made; return the new states.

    Raises RuntimeError if input or state do not fit the weights.
    """
    dtypes = autocast.dtypes(call, is_step=True)
    path = planner.path_of(call, is_step=True)
    if path == "torch":
        return _aten_step(call)
    checks.check_step(call)
    if path == "kernels" and dtypes is None and differentiated(*call.tensors):
        run = prepared(call, is_step=True)
        if run is not None:
            return run(call.x, call.state, call.weights)[1]
    step = ops.cell_step if path in planner.OURS else reference.step
    if dtypes is None:
        checks.check_alike(call)
        return step(call)
    with torch.autocast(call.x.device.type, enabled=False):
        return step(autocast.to(call, dtypes.compute))


def _aten_step(call: Call) -> Sequence[Tensor]:
    """Run one step by ATen, which checks the arguments and handles autocast itself."""
    step = ATEN_STEPS[call.cell.name]
    if call.cell.name == "lstm":
        return step(call.x, call.state, *call.weights)
    return [step(call.x, call.state[0], *call.weights)]
