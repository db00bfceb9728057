"""The operators, as torch sees them: schema, fake kernel, autograd, autocast.

``fastrnn::layer`` runs one layer over a whole sequence in one or both directions,
``fastrnn::cell`` runs one step. Both share ``fastrnn::layer_backward``: it is an
operator too, so that compilers see an opaque call, and so that it can itself be
differentiated. Second derivatives are those of ``reference.py``.

A backend registers kernels for these three names; nothing else in the package knows
torch's dispatcher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, gpu, reference
from .reference import CELLS

# `save`: what to return for backward, `cpu.NOTHING`, `cpu.STATES` or `cpu.ALL`. `state` may be
# empty, meaning zeros, unless `batch_sizes` is given. Gradients that were not asked for are empty
# tensors or lists.
_SCHEMAS = {
    "layer": "(str cell, Tensor x, Tensor[] state, Tensor[] weights, Tensor? batch_sizes,"
    " bool bidirectional, int save) -> (Tensor y, Tensor[] final, Tensor[] saved)",
    "layer_backward": "(str cell, Tensor? dy, Tensor[] d_final, Tensor x, Tensor[] state,"
    " Tensor[] weights, Tensor? batch_sizes, bool bidirectional, Tensor[] saved,"
    " bool needs_x, bool needs_weights)"
    " -> (Tensor dx, Tensor[] d_state, Tensor[] d_weights)",
    "cell": "(str cell, Tensor x, Tensor[] state, Tensor[] weights, int save)"
    " -> (Tensor[] new_state, Tensor[] saved)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# Kernels. The CPU backend has a loop of torch operators, so it serves every device but those for
# which gpu.py has Triton kernels.


def _implement(backend: Any, key: str) -> None:
    """Register a backend's functions as the three operators."""

    def layer(cell, x, state, weights, batch_sizes, bidirectional, save):
        return backend.layer_forward(cell, x, state, weights, batch_sizes, bidirectional, save)

    def layer_backward(cell, dy, d_final, x, state, *rest):
        dx, d_state, d_weights = backend.layer_backward(cell, dy, d_final, x, state, *rest)
        return x.new_empty(0) if dx is None else dx, d_state if state else [], d_weights

    def cell_step(cell, x, state, weights, save):
        arguments = (cell, x[None], _steps(state), weights, None, False, save)
        _, final, saved = backend.layer_forward(*arguments)
        return [part.squeeze(0).clone() for part in final], saved

    for name, function in (
        ("layer", layer),
        ("layer_backward", layer_backward),
        ("cell", cell_step),
    ):
        torch.library.impl(f"fastrnn::{name}", key)(function)


_implement(cpu, "default")
_implement(gpu, "CUDA")


def _backend(x: Tensor) -> Any:
    return gpu if x.is_cuda else cpu


def _steps(state: Sequence[Tensor]) -> list[Tensor]:
    """A cell's (B, H) states as those of a layer with one direction."""
    return [part.unsqueeze(0) for part in state]


# Fake kernels: shapes and dtypes of the results.


def _fake_saved(
    cell: str,
    x: Tensor,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    directions: int,
    save: int,
) -> list[Tensor]:
    width, hidden = weights[0].shape[0], weights[0].shape[0] // CELLS[cell].n_gates
    if x.is_cuda and gpu.has_kernels(cell, x, weights, batch_sizes):
        return gpu.fake_saved(cell, x, hidden, directions, save)
    if save != cpu.ALL:
        return []
    rows = math.prod(x.shape[:-1])
    widths = [directions * weights[1].shape[1]]
    if cpu.CPU_CELLS[cell].n_extra:
        widths += [width, hidden] * directions
    return [x.new_empty(rows, width, dtype=cpu.compute_dtype(x.dtype)) for width in widths]


@torch.library.register_fake("fastrnn::layer")
def _layer_fake(cell, x, state, weights, batch_sizes, bidirectional, save):
    directions = 2 if bidirectional else 1
    final = [x.new_empty(part.shape) for part in state]
    if not final:
        final = reference.zero_state(cell, x, x.shape[1], weights, directions)
    y = x.new_empty(*x.shape[:-1], directions * weights[1].shape[1])
    return y, final, _fake_saved(cell, x, weights, batch_sizes, directions, save)


@torch.library.register_fake("fastrnn::layer_backward")
def _layer_backward_fake(
    cell, dy, d_final, x, state, weights, batch_sizes, bidirectional, saved, needs_x, needs_weights
):
    return (
        x.new_empty(x.shape if needs_x else 0),
        [x.new_empty(part.shape) for part in state],
        [x.new_empty(w.shape) for w in weights] if needs_weights else [],
    )


@torch.library.register_fake("fastrnn::cell")
def _cell_fake(cell, x, state, weights, save):
    new_state = [x.new_empty(part.shape) for part in state]
    return new_state, _fake_saved(cell, x[None], weights, None, 1, save)


# Autograd. A context keeps one flat list of tensors; these two group it and ungroup it.


def _save(ctx: Any, *groups: Sequence[Tensor | None]) -> None:
    ctx.group_sizes = [len(group) for group in groups]
    ctx.save_for_backward(*(part for group in groups for part in group))
    ctx.set_materialize_grads(False)


def _load(ctx: Any) -> Iterator[list[Any]]:
    flat = iter(ctx.saved_tensors)
    return ([next(flat) for _ in range(size)] for size in ctx.group_sizes)


def _or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(grads, like, strict=True)
    ]


def _gradients(cell, dy, d_final, arguments, saved, needs_x, needs_weights):
    """Call ``layer_backward``; None for what was not asked for.

    `arguments` are those of ``layer`` from `x` to `bidirectional`.
    """
    # Not the vmap of torch.func, but the older one behind autograd's is_grads_batched.
    batched = torch._C._functorch.is_legacy_batchedtensor
    if _forward_mode() or any(batched(t) for t in (dy, *d_final) if t is not None):
        return _traceable_gradients(cell, dy, d_final, arguments)
    if not saved:
        # The operator was called as if for inference.
        with torch.no_grad(), torch.autocast(arguments[0].device.type, enabled=False):
            y, _, saved = torch.ops.fastrnn.layer(cell, *arguments, cpu.ALL)
        saved = _with_output(y, saved)
    x, state, weights, *_ = arguments
    if not torch.is_grad_enabled() and is_plain(x, *state, *weights, *d_final, dy, *saved):
        layer_backward = _backend(x).layer_backward
    else:
        layer_backward = torch.ops.fastrnn.layer_backward
    dx, d_state, d_weights = layer_backward(
        cell, dy, d_final, *arguments, saved, needs_x, needs_weights
    )
    d_state = d_state if state else []
    n_weights = len(arguments[2])
    return dx if needs_x else None, d_state, d_weights or [None] * n_weights


def _traceable_gradients(cell, dy, d_final, arguments):
    """Gradients by the reference, for what our operators have no rules for."""
    keep_graph = torch.is_grad_enabled()
    x, state, weights, *rest = arguments
    with torch.enable_grad():
        (x,), state, weights = (_aliases(ts, keep_graph) for ts in ((x,), state, weights))
        y, final = reference.layer(cell, x, state, weights, *rest)
        outputs, cotangents = _pairs(y, final, dy, d_final)
        grads = iter(_grad(outputs, [x, *state, *weights], cotangents, keep_graph))
    return next(grads), [next(grads) for _ in state], list(grads)


def _aliases(tensors: Sequence[Tensor], keep_graph: bool) -> list[Tensor]:
    """One leaf for each use of a tensor: weights may be tied, every use has a gradient."""
    return [
        t.view_as(t) if keep_graph and t.requires_grad else t.detach().requires_grad_()
        for t in tensors
    ]


def _pairs(
    y: Tensor, final: list[Tensor], dy: Tensor | None, d_final: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and their cotangents; a cell has no gradient of y, which is its state."""
    return (final, d_final) if dy is None else ([y, *final], [dy, *d_final])


def _grad(
    outputs: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    keep_graph: bool,
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` that gives None where an output does not depend on an input."""
    pairs = [
        (output, cotangent)
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output is not None and output.requires_grad
    ]
    if not inputs or not pairs:
        return [None] * len(inputs)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, cotangents, create_graph=keep_graph, allow_unused=True
    )


def _with_output(y: Tensor, saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """What backward needs: on a GPU the output too, of which the CPU keeps a copy of its own."""
    return (y, *saved) if y.is_cuda else saved


def _layer_setup(ctx, inputs, output):
    ctx.cell, x, state, weights, batch_sizes, ctx.bidirectional, save = inputs
    y, final, saved = output
    saved = saved if save == cpu.NOTHING else _with_output(y, saved)
    _save(ctx, (x,), state, weights, (batch_sizes,), saved)
    ctx.final = [part.new_zeros(()).expand(part.shape) for part in final]


def _layer_gradients(ctx, dy, d_final, needs_x, needs_weights):
    (x,), state, weights, (batch_sizes,), saved = _load(ctx)
    arguments = (x, state, weights, batch_sizes, ctx.bidirectional)
    d_final = _or_zeros(d_final, ctx.final)
    return _gradients(ctx.cell, dy, d_final, arguments, saved, needs_x, needs_weights)


def _layer_autograd(ctx, dy, d_final, _d_saved):
    _, needs_x, _, needs_weights, *_ = ctx.needs_input_grad
    gradients = _layer_gradients(ctx, dy, d_final, needs_x, any(needs_weights))
    return None, *gradients, None, None, None


class _Layer(torch.autograd.Function):
    """``fastrnn::layer`` as autograd has it without torch.library, which takes its time."""

    @staticmethod
    def forward(ctx, cell, n_states, batch_sizes, bidirectional, save, x, *tensors):
        state, weights = list(tensors[:n_states]), list(tensors[n_states:])
        arguments = (cell, x, state, weights, batch_sizes, bidirectional, save)
        output = _backend(x).layer_forward(*arguments)
        _layer_setup(ctx, arguments, output)
        ctx.n_states = n_states
        y, final, _ = output
        return y, *final

    @staticmethod
    def backward(ctx, dy, *d_final):
        needs_x, *needs = ctx.needs_input_grad[5:]
        needs_weights = any(needs[ctx.n_states :])
        dx, d_state, d_weights = _layer_gradients(ctx, dy, d_final, needs_x, needs_weights)
        return None, None, None, None, None, dx, *d_state, *d_weights


def _cell_setup(ctx, inputs, output):
    ctx.cell, x, state, weights, save = inputs
    (h, *_), saved = output
    saved = saved if save == cpu.NOTHING else _with_output(h, saved)
    _save(ctx, (x,), state, weights, saved)


def _cell_autograd(ctx, d_new_state, _d_saved):
    (x,), state, weights, saved = _load(ctx)
    _, needs_x, _, needs_weights, _ = ctx.needs_input_grad
    arguments = (x[None], _steps(state), weights, None, False)
    dx, d_state, d_weights = _gradients(
        ctx.cell,
        None,
        _steps(_or_zeros(d_new_state, state)),
        arguments,
        saved,
        needs_x,
        any(needs_weights),
    )
    d_state = [part.squeeze(0) for part in d_state]
    return None, dx if dx is None else dx.squeeze(0), d_state, d_weights, None


def _backward_setup(ctx, inputs, output):
    ctx.cell, dy, d_final, x, state, weights, batch_sizes, ctx.bidirectional, saved, *_ = inputs
    ctx.n_saved = len(saved)
    _save(ctx, (dy,), d_final, (x,), state, weights, (batch_sizes,))


def _backward_autograd(ctx, g_dx, g_d_state, g_d_weights):
    """Differentiate the gradients: run the reference twice through torch's own autograd.

    What the forward saved is an input here as well, but it is a function of x, state and
    weights, through which the whole derivative is taken.
    """
    (dy,), d_final, (x,), state, weights, (batch_sizes,) = _load(ctx)
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        groups = ((x,), state, weights, d_final)
        (x,), state, weights, d_final = (_aliases(tensors, keep_graph) for tensors in groups)
        dy = None if dy is None else _aliases([dy], keep_graph)[0]
        y, final = reference.layer(ctx.cell, x, state, weights, batch_sizes, ctx.bidirectional)
        outputs, cotangents = _pairs(y, final, dy, d_final)
        gs = [g_dx, *g_d_state, *(g_d_weights or [None] * len(weights))]
        asked = [(t, g) for t, g in zip([x, *state, *weights], gs, strict=True) if g is not None]
        first = _grad(outputs, [t for t, _ in asked], cotangents, keep_graph=True)

        _, needs_dy, needs_d_final, needs_x, needs_state, needs_weights, *_ = ctx.needs_input_grad
        needs = [needs_dy, *needs_d_final, needs_x, *needs_state, *needs_weights]
        tensors = [dy, *d_final, x, *state, *weights]
        wrt = [t for t, needed in zip(tensors, needs, strict=True) if needed and t is not None]
        second = iter(_grad(first, wrt, [g for _, g in asked], keep_graph))
    grads = iter([next(second) if needed else None for needed in needs])
    d_dy, d_d_final = next(grads), [next(grads) for _ in d_final]
    d_x, d_state = next(grads), [next(grads) for _ in state]
    d_saved = [None] * ctx.n_saved
    return None, d_dy, d_d_final, d_x, d_state, list(grads), None, None, d_saved, None, None


torch.library.register_autograd("fastrnn::layer", _layer_autograd, setup_context=_layer_setup)
torch.library.register_autograd("fastrnn::cell", _cell_autograd, setup_context=_cell_setup)
torch.library.register_autograd(
    "fastrnn::layer_backward", _backward_autograd, setup_context=_backward_setup
)


# vmap, over any of the tensors: one call for each element.


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


# Autocast.


def autocasts(device: str) -> bool:
    """Whether an autocast region is active that our operators follow."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast_dtypes(
    cell: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[torch.dtype, torch.dtype] | None:
    """What an enclosing ``torch.autocast`` region asks for, as torch.nn would have it.

    Returns
    -------
    (compute, h) : tuple of torch.dtype, or None outside of autocast
        The dtype to compute in and of the cell state, and that of the output and h. On
        CUDA both are the autocast dtype. On the CPU torch.nn autocasts the GEMMs only, so
        that LSTM and GRU keep the wider dtype of their state, an Elman network does not,
        and a projected h, being the result of a GEMM, does not either.
    """
    device = x.device.type
    if not autocasts(device):
        return None
    low = torch.get_autocast_dtype(device)
    if any(not t.is_floating_point() or t.dtype == torch.float64 for t in (x, *state, *weights)):
        return None  # autocast leaves these as they are
    if device != "cpu" or cell.startswith("rnn"):
        return low, low
    compute = torch.promote_types(low, state[-1].dtype if state else x.dtype)
    return compute, low if len(weights) % 2 else compute


def _autocast(op: Any, cell: str, x: Tensor, state: Any, weights: Any, *rest: Any) -> Any:
    dtypes = autocast_dtypes(cell, x, state, weights)
    with torch.autocast(x.device.type, enabled=False):
        if dtypes is None:
            return op(cell, x, state, weights, *rest)
        compute, _ = dtypes
        state, weights = ([t.to(compute) for t in tensors] for tensors in (state, weights))
        return op(cell, x.to(compute), state, weights, *rest)


def _as_in_forward(cell: str, dy: Tensor | None, d_final: list[Tensor], x: Tensor, *rest: Any):
    """Backward computes in the dtypes that the forward left, whatever region it is called in."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.fastrnn.layer_backward(cell, dy, d_final, x, *rest)


for _key in ("AutocastCPU", "AutocastCUDA"):
    for _name in ("layer", "cell"):
        _op = getattr(torch.ops.fastrnn, _name).default
        torch.library.impl(f"fastrnn::{_name}", _key)(partial(_autocast, _op))
    torch.library.impl("fastrnn::layer_backward", _key)(_as_in_forward)


# The operators as Python functions.


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """``reference.layer`` through the operator; `state` may be empty for a padded batch.

    `recompute` saves memory between forward and backward: on a GPU only h and c are kept, on a CPU
    nothing.
    """
    save = cpu.NOTHING
    if differentiated(x, *state, *weights):
        save = cpu.STATES if recompute else cpu.ALL
    arguments = (cell, x, state, weights, batch_sizes, bidirectional, save)
    if not is_plain(x, *state, *weights):
        y, final, _ = torch.ops.fastrnn.layer(*arguments)
    elif save == cpu.NOTHING:
        y, final, _ = _backend(x).layer_forward(*arguments)
    else:
        y, *final = _Layer.apply(
            cell, len(state), batch_sizes, bidirectional, save, x, *state, *weights
        )
    return y, final


def cell_step(
    cell: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """``reference.cell_step`` through the operator."""
    save = cpu.ALL if differentiated(x, *state, *weights) else cpu.NOTHING
    return torch.ops.fastrnn.cell(cell, x, state, weights, save)[0]


_PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd wants to know of an operation on these.

    Operators are for what looks at them: compilers, modes, subclasses of Tensor, transforms.
    """
    return (
        not torch.compiler.is_compiling()
        and all(t is None or (type(t) in _PLAIN and not t.is_neg()) for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not transformed()
        and not autocasts("cpu")
        and not autocasts("cuda")
    )


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active.

    An autograd formula registered through torch.library works in neither.
    """
    return torch._C._are_functorch_transforms_active() or _forward_mode()


def _forward_mode() -> bool:
    return forward_ad._current_level >= 0


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, sooner on a CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type
