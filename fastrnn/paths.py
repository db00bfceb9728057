"""From a checked call to layers: its path, asked for once, and what surrounds the layers."""

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


#: Takes input, states and weights, and returns output and final states.
Prepared = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


def run(call: Call) -> tuple[Any, ...]:
    """Plan and run all layers of a call that ``checks.checked`` made.

    Returns the output, the final state and, if they were asked for, the states of all steps.
    """
    options = call.options
    if options.reset is not None:
        call = _begun(call)
    dtypes = autocast.dtypes(call)
    path = planner.path_of(call, None if dtypes is None else dtypes.compute)
    if options.recompute and path not in planner.OURS and differentiated(*call.tensors):
        path = "operators"  # the others keep everything
    # cuDNN is best left with autocast, which casts all weights into one piece of memory.
    if dtypes is None or (path == "torch" and call.x.is_cuda):
        return _on_path(path, call)
    with torch.autocast(call.x.device.type, enabled=False):
        output, (h, *final), *states = _on_path(path, autocast.to(call, dtypes.compute))
    states = [part._replace(h=part.h.to(dtypes.of_h)) for part in states]
    return output.to(dtypes.of_h), [h.to(dtypes.of_h), *final], *states


def prepared(call: Call, *, is_step: bool = False) -> Prepared | None:
    """Make what runs calls like this one without a record; None if nothing does.

    That is in inference, or a step with gradients; for the path of this call, and for tensors that
    a ``context.guard`` of its own lets pass.
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
    if call.options.is_noisy:  # which is not drawn in inference
        call = call._replace(flow=call.flow._replace(noise=_noise(call)))
    return cpu.prepared(call, is_step=is_step)


def _prepared_by_torch(call: Call) -> Prepared:
    """`_by_torch` for other tensors."""
    cell, options, others = call.cell, call.options, call[5:]

    def run(
        x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        x = x.transpose(0, 1) if options.batch_first else x
        output, final = _by_torch(Call(cell, x, state, weights, None, *others))
        return output.transpose(0, 1) if options.batch_first else output, final

    return run


def _begun(call: Call) -> Call:
    """The call with a reset before its only step, as of a policy that acts, in the initial state.

    That T is 1 is asked last, and of calls with resets only: torch.export takes it for a limit on
    T; and not of those that torch.jit records, which would keep it.
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
        call = call._replace(state=call.initial())  # B is not known from the input of an operator
    inputs, results, final = reference.stack(call, _layer_on(path, options))
    output = results[-1].y
    if options.batch_first:
        output = output.transpose(0, 1)
    if not options.return_states:
        return output, final
    return output, final, states_of(call, inputs, results)


def _by_torch(call: Call) -> tuple[Tensor, Sequence[Tensor]]:
    """All layers by torch's own functions, which check the arguments themselves."""
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
    """``reference.layer``, with gradients also where what lies before a reset is not a number.

    Autograd would multiply it by 0. The operator's backward leaves out what nothing depends on, but
    begins with another forward, so it is for this case only, and for where nobody may look.
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
    """The call with its marks and its noise, which is drawn now.

    The initial state is not a number in rows whose length is out of range.
    """
    options, x, state = call.options, call.x, call.state
    lengths, reset = options.lengths, options.reset
    if reset is not None and options.batch_first:
        reset = reset.transpose(0, 1)
    if lengths is not None:
        lengths = lengths.to(x.device, non_blocking=True)
        if not can_look(lengths):
            # Nobody waits for the device, or the compiler, to complain: the row becomes NaN.
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
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}  # not `x`, which may be mapped
    p, none = options.recurrent_dropout if options.training else 0.0, torch.empty(0, **like)
    noise = [torch.dropout(torch.ones(shapes[0], **like), p, True) if p else none]
    for zone, (count, batch, width) in zip(options.zones(len(shapes)), shapes, strict=True):
        if zone and options.training:
            noise.append(_mask((count, call.steps, batch, width), zone, x.device))
        else:
            noise.append(torch.full((1,), zone, **like) if zone else none)
    return noise


def _mask(shape: tuple[int, ...], p: float, device: torch.device) -> Tensor:
    """True with a probability, known to 2^-32, for each element of a shape.

    Twice as fast on a CPU as torch.bernoulli, which draws 64 bits for each.
    """
    count, least = math.prod(shape), -(2**31)
    # One more than there is room for: of 0 elements a view is refused.
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
    """Plan and run one step, to the new states, of a call that ``checks.checked_step`` made.

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
    """One step by ATen, which checks the arguments itself and knows autocast."""
    step = ATEN_STEPS[call.cell.name]
    if call.cell.name == "lstm":
        return step(call.x, call.state, *call.weights)
    return [step(call.x, call.state[0], *call.weights)]
