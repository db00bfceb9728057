"""The registration of the operators with torch: schemas, fake kernels, autograd, vmap, autocast.

``fastrnn::layer`` runs one layer over a whole sequence, which may be a single step, in one or both
directions. ``fastrnn::layer_backward`` is an operator too, so that it is opaque to compilers and
can itself be differentiated. Second derivatives are those of ``reference.py``. Support for
``torch.func`` transforms is in ``transforms.py``.

Backends register kernels for these two names; nothing else in the package uses torch's
dispatcher. Only here is a call a flat list of arguments, as the schemas require.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import autocast, cpu, dispatch, flops, gpu, gradients, transforms
from ._imports import when_imported
from .call import Asked, Call, Cotangents, Gradients, Result, split
from .cells import CELLS
from .context import differentiated, forward_mode, is_plain, is_traced, transform
from .flow import Flow

# `save` is what to return for backward: `cpu.NOTHING`, `cpu.STATES` or `cpu.ALL`. `state` may be
# empty, meaning zeros, unless `batch_sizes` is given. `marks`, `fresh` and `noise` are those of a
# Flow. Gradients that were not requested are empty tensors or lists; `d_traces` may be empty. With
# `groups`, the batch consists of this many parts, each with its own weight gradients.
# Lists that may be empty are optional because AOTInductor's loader passes None for an empty list.
_LAYER = (
    "Tensor x, Tensor[]? state, Tensor[] weights, Tensor? batch_sizes, bool bidirectional,"
    " Tensor? marks, Tensor[]? fresh, Tensor[]? noise"
)
_SCHEMAS = {
    "layer": f"(str cell, {_LAYER}, int save, bool traced)"
    " -> (Tensor y, Tensor[] final, Tensor[] traces, Tensor[] saved)",
    "layer_backward": "(str cell, Tensor? dy, Tensor[] d_final, Tensor[] d_traces,"
    f" {_LAYER}, Tensor[] saved, bool needs_x, bool needs_weights, int groups)"
    " -> (Tensor dx, Tensor[] d_state, Tensor[] d_fresh, Tensor[] d_weights)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


def _call(cell, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise) -> Call:
    """Make the record of a list of arguments."""
    flow = Flow(marks, fresh or [], noise or [])
    return Call(CELLS[cell], x, state or [], weights, batch_sizes, bidirectional, flow)


def _resolved(call: Call) -> Call:
    """Resolve negative views in the optional lists of a call, which torch does not do."""
    marks, *others = call.flow
    state, fresh, noise = ([t.resolve_neg() for t in part] for part in (call.state, *others))
    return call._replace(state=state, flow=Flow(marks, fresh, noise))


# Kernels. The CPU backend contains a loop of torch operators, so it serves every device except
# those for which gpu.py has Triton kernels.


def _implement(backend: Any, key: str) -> None:
    """Register a backend's functions as implementations of the operators."""

    def layer(*arguments):
        *of_call, save, traced = arguments
        (y, final, traces), saved = backend.forward(_resolved(_call(*of_call)), save, traced)
        return y, final, traces, saved

    def layer_backward(cell, dy, d_final, d_traces, *arguments):
        *of_call, saved, needs_x, needs_weights, groups = arguments
        call = _resolved(_call(cell, *of_call))
        given, asked = Cotangents(dy, d_final, d_traces), Asked(needs_x, needs_weights, groups)
        dx, d_state, *others = backend.backward(call, given, saved, asked)
        dx = call.x.new_empty(0) if dx is None else dx
        return dx, d_state if call.state else [], *others

    torch.library.impl("fastrnn::layer", key)(layer)
    torch.library.impl("fastrnn::layer_backward", key)(layer_backward)


_implement(cpu, "default")
_implement(gpu, "CUDA")


# Fake kernels: shapes and dtypes of the results.


@torch.library.register_fake("fastrnn::layer")
def _layer_fake(
    cell, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise, save, traced
):
    call = _call(cell, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise)
    y = x.new_empty(*x.shape[:-1], call.directions * call.size_h)
    final = [x.new_empty(part.shape) for part in call.initial()]
    width = call.directions * call.hidden_size
    n_traces = call.cell.n_states - 1 if traced else 0
    traces = [x.new_empty(*x.shape[:-1], width) for _ in range(n_traces)]
    backend = gpu if x.is_cuda and gpu.has_kernels(call) else cpu
    return y, final, traces, backend.fake_saved(call, save)


@torch.library.register_fake("fastrnn::layer_backward")
def _layer_backward_fake(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise,
    saved, needs_x, needs_weights, groups,
):  # fmt: skip
    of_one = weights[0].dim() - 2  # 1 if there is a dimension of members
    shapes = [(groups, *w.shape[of_one:]) if groups else w.shape for w in weights]
    d_weights = [x.new_empty(shape) for shape in shapes]
    return (
        x.new_empty(x.shape if needs_x else 0),
        [x.new_empty(part.shape) for part in state],
        [x.new_empty(part.shape) for part in fresh],
        d_weights if needs_weights else [],
    )


# Autograd. A context stores the tensors of a call as one list, and the call without them.


def _keep(ctx: Any, call: Call, *groups: Sequence[Tensor | None]) -> None:
    ctx.call, ctx.sizes = call.without_tensors(), [3 + sum(call.counts), *map(len, groups)]
    ctx.save_for_backward(*call.flat(), *(part for group in groups for part in group))
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> Iterator[Any]:
    """Restore the call and the groups that `_keep` stored."""
    tensors, *groups = split(ctx.saved_tensors, ctx.sizes)
    return iter((ctx.call.with_flat(tensors), *groups))


def _or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(grads, like, strict=True)
    ]


def _gradients(call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked) -> Any:
    """Call ``layer_backward``; gradients that were not requested are None."""
    cotangents = (given.dy, *given.d_final, *given.d_traces)
    # Not torch.func's vmap, but the legacy one behind autograd's is_grads_batched.
    batched = torch._C._functorch.is_legacy_batchedtensor
    if forward_mode() or any(batched(t) for t in cotangents if t is not None):
        return gradients.first(call, given)
    if torch.is_grad_enabled() and is_plain(*call.tensors, *cotangents, *saved):
        found = _differentiable_backward(call, given, saved, asked)
    else:
        found = dispatch.backward(call, given, saved, asked)
    return found._replace(
        dx=found.dx if asked.x else None,
        d_state=found.d_state if call.state else [],
        d_weights=found.d_weights or [None] * len(call.weights),  # type: ignore[list-item]
    )


def _with_output(y: Tensor, saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """Add the output to what is saved on a GPU; the CPU saves its own copy."""
    return (y, *saved) if y.is_cuda else saved


def _layer_keep(ctx: Any, call: Call, save: int, output: Any) -> None:
    y, final, traces, saved = output
    _keep(ctx, call, saved if save == cpu.NOTHING else _with_output(y, saved))
    ctx.final, ctx.traces = (
        [part.new_zeros(()).expand(part.shape) for part in parts] for parts in (final, traces)
    )


def _layer_setup(ctx, inputs, output):
    *arguments, save, _ = inputs
    _layer_keep(ctx, _call(*arguments), save, output)


def _layer_gradients(ctx, dy, d_final, d_traces, asked):
    call, saved = _kept(ctx)
    is_asked = any(part is not None for part in d_traces)
    d_traces = _or_zeros(d_traces, ctx.traces) if is_asked else []
    given = Cotangents(dy, _or_zeros(d_final, ctx.final), d_traces)
    return _gradients(call, given, saved, asked)


def _layer_autograd(ctx, dy, d_final, d_traces, _d_saved):
    _, needs_x, _, needs_weights, _, _, _, _, needs_noise, _, _ = ctx.needs_input_grad
    asked = Asked(needs_x, any(needs_weights))
    dx, d_state, d_fresh, d_weights = _layer_gradients(ctx, dy, d_final, d_traces, asked)
    d_noise = [None] * len(needs_noise)
    return None, dx, d_state, d_weights, None, None, None, d_fresh, d_noise, None, None


class _Layer(torch.autograd.Function):
    """``fastrnn::layer`` as an autograd function, without torch.library.

    torch.library is slow, and creates garbage: to flatten lists of tensors it defines a new
    recursive function in each pass. The tensors of the call are also passed as a flat list, so that
    autograd sees them.
    """

    @staticmethod
    def forward(ctx, call, save, traced, *flat):
        (y, final, traces), saved = dispatch.backend(call.x).forward(call, save, traced)
        _layer_keep(ctx, call, save, (y, final, traces, saved))
        return y, *final, *traces

    @staticmethod
    def backward(ctx, dy, *grads):
        needs_x, *needs = ctx.needs_input_grad[3:]
        n_state, n_weights, _, n_noise = ctx.call.counts
        asked = Asked(needs_x, any(needs[2 + n_state : 2 + n_state + n_weights]))
        count = len(ctx.final)
        dx, d_state, d_fresh, d_weights = _layer_gradients(
            ctx, dy, grads[:count], grads[count:], asked
        )
        d_flat = dx, None, None, *d_state, *d_weights, *d_fresh, *[None] * n_noise
        return None, None, None, *d_flat


# The derivative of backward. What forward saved is an input of backward too, but it is a function
# of x, state and weights, and the whole derivative is taken through these.


def _keep_given(ctx: Any, call: Call, given: Cotangents) -> None:
    _keep(ctx, call, [given.dy], given.d_final, given.d_traces)


def _second_gradients(ctx, found, wanted):
    """Differentiate the gradients by double backward through the reference."""
    call, (dy,), d_final, d_traces = _kept(ctx)
    dx, d_state, d_fresh, d_weights = found
    cotangents = [dx, *d_state, *d_fresh, *(d_weights or [None] * len(call.weights))]
    return gradients.second(call, Cotangents(dy, d_final, d_traces), cotangents, wanted)


def _backward_setup(ctx, inputs, output):
    cell, dy, d_final, d_traces, *arguments, saved, _, _, groups = inputs
    assert not groups, "only for torch.func, which does not come here"
    ctx.n_saved = len(saved)
    _keep_given(ctx, _call(cell, *arguments), Cotangents(dy, d_final, d_traces))


def _backward_autograd(ctx, *found):
    needs = ctx.needs_input_grad
    groups = ([needs[1]], needs[2], needs[3], [needs[4]], needs[5], needs[10], needs[6])
    wanted = [needed for group in groups for needed in group]
    (d_dy,), d_d_final, d_d_traces, (d_x,), d_state, d_fresh, d_weights = split(
        _second_gradients(ctx, found, wanted), [len(group) for group in groups]
    )
    d_noise, d_saved = [None] * len(needs[11]), [None] * ctx.n_saved
    return (
        None, d_dy, d_d_final, d_d_traces, d_x, d_state, d_weights, None, None, None, d_fresh,
        d_noise, d_saved, None, None, None,
    )  # fmt: skip


class _LayerBackward(torch.autograd.Function):
    """``fastrnn::layer_backward`` as an autograd function, without torch.library, like `_Layer`.

    The tensors are the cotangents and those of the call; saved tensors have no gradient.
    """

    @staticmethod
    def forward(ctx, call, counts, saved, asked, dy, *tensors):
        d_final, d_traces = split(tensors, counts)
        call = call.with_flat(tensors[sum(counts) :])
        given = Cotangents(dy, d_final, d_traces)
        _keep_given(ctx, call, given)
        with torch._C._AutoDispatchBelowAutograd():
            dx, *groups = dispatch.by_operator(call, given, saved, asked)
        ctx.counts, ctx.n_found = counts, [len(group) for group in groups]
        # Autograd forbids in-place changes of views from operators with several results.
        assert dx is not None  # the operator returns an empty tensor instead
        return dx.detach(), *(part for group in groups for part in group)

    @staticmethod
    def backward(ctx, g_dx, *gs):
        n_given = 1 + sum(ctx.counts)
        n_state, n_weights, n_fresh, n_noise = ctx.call.counts
        of_given, of_x, _, of_state, of_weights, of_fresh = split(
            ctx.needs_input_grad[4:], (n_given, 1, 2, n_state, n_weights, n_fresh)
        )
        wanted = [*of_given, *of_x, *of_state, *of_fresh, *of_weights]
        grads = _second_gradients(ctx, (g_dx, *split(gs, ctx.n_found)), wanted)
        d_given, d_x, d_state, d_fresh, d_weights = split(
            grads, (n_given, 1, n_state, n_fresh, n_weights)
        )
        d_flat = *d_x, None, None, *d_state, *d_weights, *d_fresh, *[None] * n_noise
        return *[None] * 4, *d_given, *d_flat


def _differentiable_backward(
    call: Call, given: Cotangents, saved: Sequence[Tensor], asked: Asked
) -> Gradients:
    """``fastrnn::layer_backward`` through `_LayerBackward`."""
    counts = len(given.d_final), len(given.d_traces)
    dx, *grads = _LayerBackward.apply(
        call.without_tensors(), counts, saved, asked,
        given.dy, *given.d_final, *given.d_traces, *call.flat(),
    )  # fmt: skip
    n_state, n_weights, n_fresh, _ = call.counts
    return Gradients(dx, *split(grads, (n_state, n_fresh, n_weights if asked.weights else 0)))


torch.library.register_autograd("fastrnn::layer", _layer_autograd, setup_context=_layer_setup)
torch.library.register_autograd(
    "fastrnn::layer_backward", _backward_autograd, setup_context=_backward_setup
)


# vmap over any of the tensors: one call per element.


def _by_elements(op: Any, info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    def element(arg: Any, dim: Any, k: int) -> Any:
        if isinstance(arg, (list, tuple)):
            return [element(part, d, k) for part, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, k)

    results = [
        op(*(element(arg, dim, k) for arg, dim in zip(args, in_dims, strict=True)))
        for k in range(info.batch_size)
    ]
    stacked = tuple(
        torch.stack(parts)
        if isinstance(parts[0], Tensor)
        else [torch.stack(tensors) for tensors in zip(*parts, strict=True)]
        for parts in zip(*results, strict=True)
    )
    return stacked, tuple(0 if isinstance(p, Tensor) else [0] * len(p) for p in stacked)


for _name in _SCHEMAS:
    _op = getattr(torch.ops.fastrnn, _name).default
    torch.library.register_vmap(f"fastrnn::{_name}", partial(_by_elements, _op))


# Registrations outside the dispatcher.


def _register_fallbacks(lowering: Any) -> None:
    """Make inductor call the operators, even where it does not add fallbacks by itself."""
    for name in _SCHEMAS:
        lowering.make_fallback(getattr(torch.ops.fastrnn, name).default, warn=False)


flops.register()
when_imported("torch._inductor.lowering", _register_fallbacks)


# Autocast.


def _layer_in_autocast(*arguments):
    *of_call, save, traced = arguments
    call = _call(*of_call)
    dtypes = autocast.dtypes(call)
    with torch.autocast(call.x.device.type, enabled=False):
        call = call if dtypes is None else autocast.to(call, dtypes.compute)
        return torch.ops.fastrnn.layer(*dispatch.arguments(call), save, traced)


def _backward_in_autocast(cell, dy, d_final, d_traces, x, *rest):
    """Run backward in the dtypes that the forward used, whatever autocast region is active."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.fastrnn.layer_backward(cell, dy, d_final, d_traces, x, *rest)


for _key in ("AutocastCPU", "AutocastCUDA"):
    torch.library.impl("fastrnn::layer", _key)(_layer_in_autocast)
    torch.library.impl("fastrnn::layer_backward", _key)(_backward_in_autocast)


# The operators as Python functions.


def layer(call: Call, *, recompute: bool = False, traced: bool = False) -> Result:
    """Run ``reference.layer`` by the operator.

    With `recompute`, less is saved for backward: on a GPU only h and c, on a CPU nothing. Traces
    are returned only if `traced`.
    """
    save, tensors = cpu.STATES if recompute else cpu.ALL, call.tensors
    if transform() == "func" and not torch.compiler.is_compiling():
        # Whether gradients will be requested is not known here, only whether they can be.
        save = save if torch.is_grad_enabled() else cpu.NOTHING
        below = partial(layer, recompute=recompute, traced=traced)
        return transforms.layer(call, save, traced, below)
    # torch.jit traces are mostly for inference; in training, backward starts with a forward.
    if not differentiated(*tensors) or is_traced():
        save = cpu.NOTHING
    if save == cpu.NOTHING or not is_plain(*tensors):
        return dispatch.forward(call, save, traced)[0]
    y, *others = _Layer.apply(call, save, traced, *call.flat())
    n_states = call.cell.n_states
    return Result(y, others[:n_states], others[n_states:])


def cell_step(call: Call) -> Sequence[Tensor]:
    """Run ``reference.step`` as a layer of one step; the caller handles autocast."""
    # No views, because callers detach states in place.
    return [part.squeeze(0).clone() for part in layer(_of_one_step(call)).final]


def cell_step_backward(call: Call, d_state: Sequence[Tensor | None], asked: Asked) -> Gradients:
    """Compute the gradients of `cell_step` by the layer's operators, which torch can intercept."""
    of_final = [part.unsqueeze(0) for part in _or_zeros(d_state, call.state)]
    found = _gradients(_of_one_step(call), Cotangents(None, of_final), [], asked)
    dx = found.dx if found.dx is None else found.dx.squeeze(0)
    d_before = [part if part is None else part.squeeze(0) for part in found.d_state]
    return found._replace(dx=dx, d_state=d_before)


def _of_one_step(call: Call) -> Call:
    state = [part.unsqueeze(0) for part in call.state]
    return call._replace(x=call.x.unsqueeze(0), state=state)
