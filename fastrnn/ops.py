"""The operators, as torch sees them: schema, fake kernel, autograd, autocast.

``fastrnn::layer`` runs one layer over a whole sequence in one or both directions,
``fastrnn::cell`` runs one step. Both share ``fastrnn::layer_backward``: it is an
operator too, so that compilers see an opaque call, and so that it can itself be
differentiated. Second derivatives are those of ``reference.py``. What ``torch.func``
transforms see is in ``transforms.py``.

A backend registers kernels for these three names; nothing else in the package knows
torch's dispatcher.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import _VF, Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from . import cpu, flops, gpu, gradients, reference, transforms
from ._imports import when_imported
from .cells import CELLS
from .flow import PLAIN, Flow

# `save`: what to return for backward, `cpu.NOTHING`, `cpu.STATES` or `cpu.ALL`. `state` may be
# empty, meaning zeros, unless `batch_sizes` is given. `marks`, `fresh` and `noise` are those of a
# Flow. Gradients that were not asked for are empty tensors or lists; `d_traces` may be empty. With
# `groups`, the batch consists of so many parts, and each has its own weight gradients.
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
    "cell": "(str cell, Tensor x, Tensor[] state, Tensor[] weights, int save)"
    " -> (Tensor[] new_state, Tensor[] saved)",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"fastrnn::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# Kernels. The CPU backend has a loop of torch operators, so it serves every device but those for
# which gpu.py has Triton kernels.


def _implement(backend: Any, key: str) -> None:
    """Register a backend's functions as the three operators."""

    def layer(cell, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise, *rest):
        flow = Flow(marks, fresh or [], noise or [])
        return backend.layer_forward(
            cell, x, state or [], weights, batch_sizes, bidirectional, flow, *rest
        )

    def layer_backward(
        cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional,
        marks, fresh, noise, *rest,
    ):  # fmt: skip
        flow = Flow(marks, fresh, noise)
        arguments = (x, state, weights, batch_sizes, bidirectional, flow)
        dx, d_state, *others = backend.layer_backward(
            cell, dy, d_final, d_traces, *arguments, *rest
        )
        return x.new_empty(0) if dx is None else dx, d_state if state else [], *others

    def cell_step(cell, x, state, weights, save):
        arguments = (cell, x[None], _steps(state), weights, None, False, PLAIN, save, False)
        _, final, _, saved = backend.layer_forward(*arguments)
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
    flow: Flow,
    save: int,
) -> list[Tensor]:
    width, hidden = weights[0].shape[0], weights[0].shape[0] // CELLS[cell].n_gates
    if x.is_cuda and gpu.has_kernels(cell, x, weights, batch_sizes, flow):
        return gpu.fake_saved(cell, x, hidden, directions, save)
    if save != cpu.ALL or cpu.saves_nothing(cell, x, flow):
        return []
    rows = math.prod(x.shape[:-1])
    widths = [directions * weights[1].shape[1]]
    if cpu.CPU_CELLS[cell].n_extra:
        widths += [width, hidden] * directions
    return [x.new_empty(rows, width, dtype=cpu.compute_dtype(x.dtype)) for width in widths]


@torch.library.register_fake("fastrnn::layer")
def _layer_fake(
    cell, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise, save, traced
):
    directions, hidden = 2 if bidirectional else 1, weights[0].shape[0] // CELLS[cell].n_gates
    final = [x.new_empty(part.shape) for part in state]
    if not final:
        final = reference.zero_state(cell, x, x.shape[1], weights, directions)
    y = x.new_empty(*x.shape[:-1], directions * weights[1].shape[1])
    n_traces = CELLS[cell].n_states - 1 if traced else 0
    traces = [x.new_empty(*x.shape[:-1], directions * hidden) for _ in range(n_traces)]
    flow = Flow(marks, fresh, noise)
    return y, final, traces, _fake_saved(cell, x, weights, batch_sizes, directions, flow, save)


@torch.library.register_fake("fastrnn::layer_backward")
def _layer_backward_fake(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise,
    saved, needs_x, needs_weights, groups,
):  # fmt: skip
    d_weights = [x.new_empty(*((groups,) if groups else ()), *w.shape) for w in weights]
    return (
        x.new_empty(x.shape if needs_x else 0),
        [x.new_empty(part.shape) for part in state],
        [x.new_empty(part.shape) for part in fresh],
        d_weights if needs_weights else [],
    )


@torch.library.register_fake("fastrnn::cell")
def _cell_fake(cell, x, state, weights, save):
    new_state = [x.new_empty(part.shape) for part in state]
    return new_state, _fake_saved(cell, x[None], weights, None, 1, PLAIN, save)


# Autograd. A context keeps one flat list of tensors; these two group it and ungroup it.


def _save(ctx: Any, *groups: Sequence[Tensor | None]) -> None:
    ctx.group_sizes = [len(group) for group in groups]
    ctx.save_for_backward(*(part for group in groups for part in group))
    ctx.set_materialize_grads(False)


def _load(ctx: Any) -> Iterator[list[Any]]:
    return _groups(ctx.saved_tensors, ctx.group_sizes)


def _groups(flat: Sequence[Any], sizes: Sequence[int]) -> Iterator[list[Any]]:
    parts = iter(flat)
    return ([next(parts) for _ in range(size)] for size in sizes)


def _or_zeros(grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(tensor) if grad is None else grad
        for grad, tensor in zip(grads, like, strict=True)
    ]


def _gradients(cell, dy, d_final, d_traces, arguments, saved, needs_x, needs_weights):
    """Call ``layer_backward``; None for what was not asked for.

    `arguments` are those of ``layer`` from `x` to `noise`.
    """
    x, state, weights, batch_sizes, bidirectional, *flow = arguments
    # Not the vmap of torch.func, but the older one behind autograd's is_grads_batched.
    batched = torch._C._functorch.is_legacy_batchedtensor
    if forward_mode() or any(batched(t) for t in (dy, *d_final, *d_traces) if t is not None):
        layer_arguments = (x, state, weights, batch_sizes, bidirectional, Flow(*flow))
        return gradients.first(cell, dy, d_final, d_traces, *layer_arguments)
    if not is_plain(x, *state, *weights, *flow[1], *d_final, *d_traces, dy, *saved):
        layer_backward: Any = torch.ops.fastrnn.layer_backward
    elif torch.is_grad_enabled():
        layer_backward = _layer_backward
    else:
        layer_backward = _backend(x).layer_backward
        arguments = (x, state, weights, batch_sizes, bidirectional, Flow(*flow))
    dx, d_state, d_fresh, d_weights = layer_backward(
        cell, dy, d_final, d_traces, *arguments, saved, needs_x, needs_weights, 0
    )
    d_state = d_state if state else []
    return dx if needs_x else None, d_state, d_fresh, d_weights or [None] * len(weights)


def _with_output(y: Tensor, saved: Sequence[Tensor]) -> Sequence[Tensor]:
    """What backward needs: on a GPU the output too, of which the CPU keeps a copy of its own."""
    return (y, *saved) if y.is_cuda else saved


def _layer_setup(ctx, inputs, output):
    (
        ctx.cell, x, state, weights, batch_sizes, ctx.bidirectional, marks, fresh, noise, save, _,
    ) = inputs  # fmt: skip
    y, final, traces, saved = output
    saved = saved if save == cpu.NOTHING else _with_output(y, saved)
    _save(ctx, (x,), state, weights, (batch_sizes, marks), fresh, noise, saved)
    ctx.final, ctx.traces = (
        [part.new_zeros(()).expand(part.shape) for part in parts] for parts in (final, traces)
    )


def _layer_gradients(ctx, dy, d_final, d_traces, needs_x, needs_weights):
    (x,), state, weights, (batch_sizes, marks), fresh, noise, saved = _load(ctx)
    arguments = (x, state, weights, batch_sizes, ctx.bidirectional, marks, fresh, noise)
    d_final = _or_zeros(d_final, ctx.final)
    is_asked = any(part is not None for part in d_traces)
    d_traces = _or_zeros(d_traces, ctx.traces) if is_asked else []
    return _gradients(ctx.cell, dy, d_final, d_traces, arguments, saved, needs_x, needs_weights)


def _layer_autograd(ctx, dy, d_final, d_traces, _d_saved):
    _, needs_x, _, needs_weights, _, _, _, _, needs_noise, _, _ = ctx.needs_input_grad
    dx, d_state, d_fresh, d_weights = _layer_gradients(
        ctx, dy, d_final, d_traces, needs_x, any(needs_weights)
    )
    d_noise = [None] * len(needs_noise)
    return None, dx, d_state, d_weights, None, None, None, d_fresh, d_noise, None, None


class _Layer(torch.autograd.Function):
    """``fastrnn::layer`` as autograd has it without torch.library.

    That takes its time, and leaves work to the garbage collector: what it flattens lists of tensors
    with is a function that refers to itself, a new one in each pass.
    """

    @staticmethod
    def forward(
        ctx, cell, counts, batch_sizes, bidirectional, marks, noise, save, traced, x, *tensors
    ):
        n_states, n_fresh = counts
        state, fresh = list(tensors[:n_states]), list(tensors[n_states : n_states + n_fresh])
        weights = list(tensors[n_states + n_fresh :])
        flow = Flow(marks, fresh, noise)
        arguments = (cell, x, state, weights, batch_sizes, bidirectional)
        output = _backend(x).layer_forward(*arguments, flow, save, traced)
        _layer_setup(ctx, (*arguments, *flow, save, traced), output)
        ctx.counts = counts
        y, final, traces, _ = output
        return y, *final, *traces

    @staticmethod
    def backward(ctx, dy, *grads):
        needs_x, *needs = ctx.needs_input_grad[8:]
        needs_weights = any(needs[sum(ctx.counts) :])
        d_final, d_traces = grads[: len(ctx.final)], grads[len(ctx.final) :]
        dx, d_state, d_fresh, d_weights = _layer_gradients(
            ctx, dy, d_final, d_traces, needs_x, needs_weights
        )
        return *[None] * 8, dx, *d_state, *d_fresh, *d_weights


def _cell_setup(ctx, inputs, output):
    ctx.cell, x, state, weights, save = inputs
    (h, *_), saved = output
    saved = saved if save == cpu.NOTHING else _with_output(h, saved)
    _save(ctx, (x,), state, weights, saved)


def _cell_gradients(ctx, d_new_state, needs_x, needs_weights):
    (x,), state, weights, saved = _load(ctx)
    arguments = (x[None], _steps(state), weights, None, False, *PLAIN)
    dx, d_state, _, d_weights = _gradients(
        ctx.cell,
        None,
        _steps(_or_zeros(d_new_state, state)),
        [],
        arguments,
        saved,
        needs_x,
        needs_weights,
    )
    return dx if dx is None else dx.squeeze(0), [part.squeeze(0) for part in d_state], d_weights


def _cell_autograd(ctx, d_new_state, _d_saved):
    _, needs_x, _, needs_weights, _ = ctx.needs_input_grad
    grads = _cell_gradients(ctx, d_new_state, needs_x, any(needs_weights))
    return None, *grads, None


class _Cell(torch.autograd.Function):
    """``fastrnn::cell`` without torch.library, as `_Layer`."""

    @staticmethod
    def forward(ctx, cell, n_states, x, *tensors):
        arguments = (cell, x, list(tensors[:n_states]), list(tensors[n_states:]), cpu.ALL)
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.fastrnn.cell(*arguments)
        _cell_setup(ctx, arguments, output)
        return tuple(output[0])

    @staticmethod
    def backward(ctx, *d_new_state):
        needs_x, *needs = ctx.needs_input_grad[2:]
        needs_weights = any(needs[len(d_new_state) :])
        dx, d_state, d_weights = _cell_gradients(ctx, d_new_state, needs_x, needs_weights)
        return None, None, dx, *d_state, *d_weights


def _backward_setup(ctx, inputs, output):
    (
        ctx.cell, dy, d_final, d_traces, x, state, weights, batch_sizes, ctx.bidirectional,
        marks, fresh, noise, saved, _, _, groups,
    ) = inputs  # fmt: skip
    assert not groups, "only for torch.func, which takes another way"
    ctx.n_saved = len(saved)
    _save(ctx, (dy,), d_final, d_traces, (x,), state, weights, (batch_sizes, marks), fresh, noise)


def _backward_gradients(ctx, g_dx, g_d_state, g_d_fresh, g_d_weights, wanted):
    """Differentiate the gradients: run the reference twice through torch's own autograd.

    What the forward saved is an input here as well, but it is a function of x, state and
    weights, through which the whole derivative is taken.
    """
    (dy,), d_final, d_traces, (x,), state, weights, (batch_sizes, marks), fresh, noise = _load(ctx)
    flow = Flow(marks, fresh, noise)
    arguments = (x, state, weights, batch_sizes, ctx.bidirectional, flow)
    gs = [g_dx, *g_d_state, *g_d_fresh, *(g_d_weights or [None] * len(weights))]
    return gradients.second(ctx.cell, dy, d_final, d_traces, *arguments, gs, wanted)


def _backward_autograd(ctx, g_dx, g_d_state, g_d_fresh, g_d_weights):
    needs = ctx.needs_input_grad
    groups = ([needs[1]], needs[2], needs[3], [needs[4]], needs[5], needs[10], needs[6])
    wanted = [needed for group in groups for needed in group]
    grads = _backward_gradients(ctx, g_dx, g_d_state, g_d_fresh, g_d_weights, wanted)
    (d_dy,), d_d_final, d_d_traces, (d_x,), d_state, d_fresh, d_weights = _groups(
        grads, [len(group) for group in groups]
    )
    d_noise, d_saved = [None] * len(needs[11]), [None] * ctx.n_saved
    return (
        None, d_dy, d_d_final, d_d_traces, d_x, d_state, d_weights, None, None, None, d_fresh,
        d_noise, d_saved, None, None, None,
    )  # fmt: skip


class _LayerBackward(torch.autograd.Function):
    """``fastrnn::layer_backward`` without torch.library, as `_Layer`.

    Beside tensors its arguments are groups of what has no gradient.
    """

    @staticmethod
    def forward(ctx, cell, sizes, others, saved, asked, *tensors):
        (dy,), d_final, d_traces, (x,), state, fresh, weights = _groups(tensors, sizes)
        batch_sizes, bidirectional, marks, noise = others
        arguments = (
            cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks,
            fresh, noise, saved, *asked, 0,
        )  # fmt: skip
        _backward_setup(ctx, arguments, None)
        with torch._C._AutoDispatchBelowAutograd():
            dx, *groups = torch.ops.fastrnn.layer_backward(*arguments)
        ctx.sizes = [len(group) for group in groups]
        # Autograd forbids to overwrite a view that comes of an operator with other results.
        return dx.detach(), *(part for group in groups for part in group)

    @staticmethod
    def backward(ctx, g_dx, *gs):
        g_d_state, g_d_fresh, g_d_weights = _groups(gs, ctx.sizes)
        wanted = ctx.needs_input_grad[5:]
        grads = _backward_gradients(ctx, g_dx, g_d_state, g_d_fresh, g_d_weights, wanted)
        return *[None] * 5, *grads


def _layer_backward(
    cell, dy, d_final, d_traces, x, state, weights, batch_sizes, bidirectional, marks, fresh, noise,
    saved, needs_x, needs_weights, _,
):  # fmt: skip
    """``fastrnn::layer_backward`` through `_LayerBackward`."""
    groups = ([dy], d_final, d_traces, [x], state, fresh, weights)
    others = (batch_sizes, bidirectional, marks, noise)
    dx, *grads = _LayerBackward.apply(
        cell, [len(group) for group in groups], others, saved, (needs_x, needs_weights),
        *(part for group in groups for part in group),
    )  # fmt: skip
    return dx, *_groups(grads, (len(state), len(fresh), len(weights) if needs_weights else 0))


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


# What looks at operators beyond the dispatcher.


def _register_fallbacks(lowering: Any) -> None:
    """Tell inductor to call the operators, also where it may not find that out by itself."""
    for name in _SCHEMAS:
        lowering.make_fallback(getattr(torch.ops.fastrnn, name).default, warn=False)


flops.register()
when_imported("torch._inductor.lowering", _register_fallbacks)


# torch.jit.


def is_traced() -> bool:
    """Whether torch.jit records what is called."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


Function = TypeVar("Function", bound=Callable)


def untraced(function: Function) -> Function:
    """Let a function run unseen by torch.jit's tracer, which warns of sizes that decide."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not is_traced():
            return function(*args, **kwargs)
        tracer: Any = torch._C
        state = tracer._get_tracing_state()
        tracer._set_tracing_state(None)
        try:
            return function(*args, **kwargs)
        finally:
            tracer._set_tracing_state(state)

    return call  # type: ignore[return-value]


# Autocast.


def autocasts(device: str) -> bool:
    """Whether an autocast region is active that our operators follow."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast_dtypes(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    is_whole: bool = True,
) -> tuple[torch.dtype, torch.dtype] | None:
    """What an enclosing ``torch.autocast`` region asks for, as torch.nn would have it.

    `is_whole` is false of a step, and of packed sequences of different lengths.

    Returns
    -------
    (compute, h) : tuple of torch.dtype, or None outside of autocast
        The dtype to compute in and of the cell state, and that of the output and h. On
        CUDA both are the autocast dtype. On the CPU torch.nn autocasts the GEMMs only, so
        that LSTM and GRU keep the wider dtype of their state, an Elman network does not,
        and a projected h, being the result of a GEMM, does not either. A whole LSTM is one
        operation of oneDNN, if this CPU has it in the autocast dtype.
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
    is_projected = (len(weights) - len(CELLS[cell].extras)) % 2
    is_whole = is_whole and not is_projected and (is_traced() or x.numel() > 0)
    if cell == "lstm" and is_whole and _is_one_operation(low, x.dtype):
        return low, low
    return compute, low if is_projected else compute


def _is_one_operation(low: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether oneDNN runs torch's LSTM as a whole in `low`, from an input of `dtype`."""
    settings: Any = torch.backends.mkldnn.enabled, torch.is_grad_enabled()
    return _try_one_operation(low, dtype, *settings)


# For compilers; by torch.compiler.assume_constant_result it would import all of Dynamo.
_is_one_operation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
@untraced
def _try_one_operation(
    low: torch.dtype, dtype: torch.dtype, is_enabled: bool, is_recorded: bool
) -> bool:
    """Try it: it depends on the CPU, and on the settings that a result is remembered for."""
    with _python_dispatch._disable_current_modes(), torch.autocast("cpu", low):
        like: Any = {"device": "cpu"}
        x, state = torch.zeros(1, 1, 1, dtype=dtype, **like), torch.zeros(1, 1, 1, **like)
        weights = [torch.zeros(4, 1, **like)] * 2
        options = (False, 1, 0.0, True, False, False)
        try:
            y, *_ = _VF.lstm(x, (state, state), weights, *options)
        except RuntimeError:  # not on this CPU
            return False
    return y.dtype == low


def _autocast(
    op: Any, is_whole: bool, cell: str, x: Tensor, state: Any, weights: Any, *rest: Any
) -> Any:
    dtypes = autocast_dtypes(cell, x, state, weights, is_whole=is_whole and x.dim() == 3)
    with torch.autocast(x.device.type, enabled=False):
        if dtypes is None:
            return op(cell, x, state, weights, *rest)
        # What is in lists is floating: state, weights, fresh and noise.
        others = (
            [t.to(dtypes[0]) for t in part] if isinstance(part, (list, tuple)) else part
            for part in (state, weights, *rest)
        )
        return op(cell, x.to(dtypes[0]), *others)


def _as_in_forward(
    cell: str, dy: Tensor | None, d_final: Any, d_traces: Any, x: Tensor, *rest: Any
):
    """Backward computes in the dtypes that the forward left, whatever region it is called in."""
    with torch.autocast(x.device.type, enabled=False):
        return torch.ops.fastrnn.layer_backward(cell, dy, d_final, d_traces, x, *rest)


for _key in ("AutocastCPU", "AutocastCUDA"):
    for _name in ("layer", "cell"):
        _op = getattr(torch.ops.fastrnn, _name).default
        torch.library.impl(f"fastrnn::{_name}", _key)(partial(_autocast, _op, _name == "layer"))
    torch.library.impl("fastrnn::layer_backward", _key)(_as_in_forward)


# The operators as Python functions.


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    bidirectional: bool = False,
    flow: Flow = PLAIN,
    *,
    recompute: bool = False,
    traced: bool = False,
) -> reference.Result:
    """``reference.layer`` through the operator; `state` may be empty for a padded batch.

    `recompute` saves memory between forward and backward: on a GPU only h and c are kept, on a CPU
    nothing. Traces are there if `traced`.
    """
    save = cpu.NOTHING
    # What torch.jit traces is mostly for inference; with gradients, backward begins with a forward.
    if differentiated(x, *state, *weights, *flow.fresh) and not is_traced():
        save = cpu.STATES if recompute else cpu.ALL
    arguments = (cell, x, state, weights, batch_sizes, bidirectional)
    if transform() == "func" and not torch.compiler.is_compiling():
        # Who will be asked for gradients is not known here.
        return transforms.layer(*arguments, flow, cpu.STATES if recompute else cpu.ALL, traced)
    if not is_plain(x, *state, *weights, *flow.fresh):
        y, final, traces, _ = torch.ops.fastrnn.layer(*arguments, *flow, save, traced)
    elif save == cpu.NOTHING:
        y, final, traces, _ = _backend(x).layer_forward(*arguments, flow, save, traced)
    else:
        counts = len(state), len(flow.fresh)
        y, *others = _Layer.apply(
            cell, counts, batch_sizes, bidirectional, flow.marks, flow.noise, save, traced, x,
            *state, *flow.fresh, *weights,
        )  # fmt: skip
        n_states = CELLS[cell].n_states
        final, traces = others[:n_states], others[n_states:]
    return reference.Result(y, final, traces)


def cell_step(
    cell: str, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """``reference.cell_step`` through the operator."""
    save = cpu.ALL if differentiated(x, *state, *weights) else cpu.NOTHING
    if save == cpu.ALL and is_plain(x, *state, *weights):
        return list(_Cell.apply(cell, len(state), x, *state, *weights))
    return torch.ops.fastrnn.cell(cell, x, state, weights, save)[0]


_PLAIN = (Tensor, torch.nn.Parameter)
_ORDINARY = {*_PLAIN, type(None)}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd wants to know of an operation on these.

    Operators are for what looks at them: compilers, modes, subclasses of Tensor, transforms.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_traced()
        and all(t is None or (type(t) in _PLAIN and not t.is_neg()) for t in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not transformed()
        and not autocasts("cpu")
        and not autocasts("cuda")
    )


def are_known(*tensors: Tensor | None) -> bool:
    """Whether our operators take these for what they are.

    What a subclass of Tensor that overrides operations makes of ours, it does not say; of torch's
    own it does.
    """
    classes = set(map(type, tensors))
    return classes <= _ORDINARY or all(map(_is_known, classes - _ORDINARY))


@functools.cache
def _is_known(cls: Any) -> bool:
    if issubclass(cls, (FakeTensor, FunctionalTensor)):
        return True
    is_left_alone = cls.__torch_dispatch__ is Tensor.__torch_dispatch__
    return is_left_alone and cls.__torch_function__ is torch._C._disabled_torch_function_impl


def transformed() -> bool:
    """Whether a ``torch.func`` transform or forward-mode AD is active.

    An autograd formula registered through torch.library works in neither.
    """
    return torch._C._are_functorch_transforms_active() or forward_mode()


def transform() -> str | None:
    """Name what `transformed` found, for the planner."""
    return "forward" if forward_mode() else "func" if transformed() else None


def forward_mode() -> bool:
    """Whether forward-mode AD is active, by ``torch.func`` or without."""
    return forward_ad._current_level >= 0


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def device_type(tensor: Tensor) -> str:
    """``tensor.device.type``, sooner on a CPU."""
    return "cpu" if tensor.is_cpu else tensor.device.type
