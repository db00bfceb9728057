"""``torch.func`` support for ``fastrnn::layer``: reverse-mode derivatives and vmap.

The transforms ignore autograd formulas of torch.library, so this module has autograd functions
that support them. They fold a mapped dimension into the batch and make a single call. If weights
are mapped, this is a call of an ensemble, each member of which has its part of the batch. If only
inputs are mapped, it is a call with a larger batch, and each group of it gets its own weight
gradients.

Forward mode does not reach this module: ``planner`` sends it to ``reference.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import _add_batch_dim, _unwrap_batched
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_current_functorch_interpreter,
)

from . import dispatch, reference
from .call import Asked, Call, Cotangents, Result, split
from .flow import Flow


class _Kind(NamedTuple):
    """The arguments of an operator call that are not tensors.

    The tensors are passed as one list, that of ``Call.flat``; `call` is the record without them.
    """

    call: Call
    save: int
    traced: bool

    @property
    def n_states(self) -> int:
        return self.call.cell.n_states

    @property
    def n_results(self) -> int:
        """The number of results: y, the final states, the traces."""
        return 1 + self.n_states + (self.n_states - 1 if self.traced else 0)

    def batch_dims(self) -> list[int | None]:
        """The batch dimension of each tensor, None if a mapped dimension is not folded into it."""
        n_state, n_weights, n_fresh, n_noise = self.call.counts
        noise = [1 if k == 0 else 2 for k in range(n_noise)]
        return [1, 2, None, *[1] * n_state, *[None] * n_weights, *[1] * n_fresh, *noise]

    def fold(self, size: int, tensors: Sequence[Any], dims: Sequence[int | None]) -> list[Any]:
        """Fold the mapped dimension of each tensor into its batch, and of weights into members."""
        of_weights: Any = self.call.with_flat(dims).weights
        folded = self.call.with_flat(_fold(size, tensors, dims, self.batch_dims()))
        members = self.members(tensors, dims)
        if members or any(dim is not None for dim in of_weights):
            pairs = zip(folded.weights, of_weights, strict=True)
            weights = [_of_members(size, *pair, bool(members)) for pair in pairs]
            folded = folded._replace(weights=weights)
        return folded.flat()

    def members(self, tensors: Sequence[Any], dims: Sequence[int | None]) -> int:
        """The number of members in each mapped element; 0 without an ensemble."""
        w, dim = (self.call.with_flat(part).weights[0] for part in (tensors, dims))
        sizes = [size for k, size in enumerate(w.shape) if k != dim]
        return sizes[0] if len(sizes) == 3 else 0

    def is_packed(self, tensors: Sequence[Any]) -> bool:
        """Whether the batch is packed, so that nothing can be folded into it."""
        return self.call.with_flat(tensors).batch_sizes is not None


def layer(call: Call, save: int, traced: bool, below: Callable[[Call], Result]) -> Result:
    """``reference.layer`` inside ``torch.func`` transforms.

    `below` runs a call inside all transforms but the innermost; the other arguments are those of
    ``cpu.forward``.
    """
    kind = _Kind(call.without_tensors(), save, traced)
    innermost = retrieve_current_functorch_interpreter()
    if isinstance(innermost, VmapInterpreter) and call.batch_sizes is None:
        return _mapped(innermost, kind, call, below)
    y, *others = _Layer.apply(kind, *call.flat())
    n_states = kind.n_states
    return Result(y, others[:n_states], others[n_states : kind.n_results - 1])


def _mapped(
    innermost: VmapInterpreter, kind: _Kind, call: Call, below: Callable[[Call], Result]
) -> Result:
    """Run a call inside vmap directly, so that its derivatives do not involve vmap.

    vmap does the same with an autograd function, but its machinery takes as long as a short call.
    """
    level, size = innermost.level(), innermost.batch_size()
    pairs = [(t, None) if t is None else _unwrap_batched(t, level) for t in call.flat()]
    tensors, dims = zip(*pairs, strict=True)
    if all(dim is None for dim in dims):
        with innermost.lower():
            return below(call)
    with innermost.lower():
        folded = kind.call.with_flat(kind.fold(size, tensors, dims))
        y, final, traces = below(folded)
        batch = folded.batch // size
        found = [part.unflatten(1, (size, batch)) for part in (y, *final, *traces)]
    y, *others = (_add_batch_dim(part, 1, level) for part in found)
    return Result(y, others[: kind.n_states], others[kind.n_states :])


class _Layer(torch.autograd.Function):
    """The operator; its results are y, the final states, the traces, and the saved tensors.

    The saved tensors belong to the folded batch, so they are never mapped.
    """

    @staticmethod
    def forward(kind, *flat):
        call = kind.call.with_flat(flat)
        (y, final, traces), saved = dispatch.forward(call, kind.save, kind.traced)
        return y, *final, *traces, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, *flat = inputs
        ctx.n_results = ctx.kind.n_results
        saved = output[ctx.n_results :]
        ctx.mark_non_differentiable(*saved)
        # On a GPU backward needs the output too.
        saved = (output[0], *saved) if output[0].is_cuda and saved else saved
        ctx.n_saved = len(saved)
        ctx.results = [(part.shape, part.dtype, part.device) for part in output[: ctx.n_results]]
        ctx.save_for_backward(*flat, *saved)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        count = len(tensors) - ctx.n_saved
        cotangents = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.results, strict=False)
        ]
        needs_x = ctx.needs_input_grad[1]
        numbers = (len(cotangents), ctx.n_saved, needs_x)
        dx, *rest = _Backward.apply(
            ctx.kind, numbers, 0, *cotangents, *tensors[count:], *tensors[:count]
        )
        dx = dx if needs_x else None
        return None, dx, None, None, *rest, *[None] * ctx.kind.call.counts[3]

    @staticmethod
    def vmap(info, in_dims, kind, *flat):
        if kind.is_packed(flat):
            return _loop(info, in_dims[1:], flat, lambda *part: _Layer.apply(kind, *part))
        outputs = _Layer.apply(kind, *kind.fold(info.batch_size, flat, in_dims[1:]))
        n_results = kind.n_results
        results = [part.unflatten(1, (info.batch_size, -1)) for part in outputs[:n_results]]
        saved = outputs[n_results:]
        return (*results, *saved), (*[1] * n_results, *[None] * len(saved))


class _Backward(torch.autograd.Function):
    """``fastrnn::layer_backward``; its derivatives are the reference's.

    With `groups`, the batch is the concatenation of this many parts, one or several per member of
    an ensemble, and each part has its own weight gradients. `numbers` are the counts of results and
    of saved tensors, and whether the gradient of x is needed.
    """

    @staticmethod
    def forward(kind, numbers, groups, *tensors):
        n_results, n_saved, needs_x = numbers
        dy, *rest = tensors[:n_results]
        given = Cotangents(dy, rest[: kind.n_states], rest[kind.n_states :])
        saved = tensors[n_results : n_results + n_saved]
        call = kind.call.with_flat(tensors[n_results + n_saved :])
        asked = Asked(needs_x, True, groups)
        dx, d_state, d_fresh, d_weights = dispatch.backward(call, given, saved, asked)
        dx = call.x.new_empty(0) if dx is None else dx
        d_state = d_state if call.state else []
        return dx, *d_state, *d_weights, *d_fresh

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.kind, (ctx.n_results, ctx.n_saved, ctx.needs_x), ctx.groups, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.n_results], *tensors[ctx.n_results + ctx.n_saved :])

    @staticmethod
    def backward(ctx, *grads):
        tensors, kind, n_results = ctx.saved_tensors, ctx.kind, ctx.n_results
        call = kind.call.with_flat(tensors[n_results:])
        inputs = (call.x, *call.state, *call.weights, *call.flow.fresh)

        def first(*variables):
            outputs, inputs = variables[:n_results], variables[n_results:]
            return _by_reference(kind, ctx.groups, call, inputs, outputs)

        grads = (grads[0] if ctx.needs_x else None, *grads[1:])
        results, pull = torch.func.vjp(first, *tensors[:n_results], *inputs)  # type: ignore[misc]
        found = pull(
            tuple(
                torch.zeros_like(result) if grad is None else grad
                for result, grad in zip(results, grads, strict=True)
            )
        )
        d_cotangents, (dx, *rest) = found[:n_results], found[n_results:]
        d_noise = [None] * call.counts[3]
        return (
            None, None, None, *d_cotangents, *[None] * ctx.n_saved, dx, None, None, *rest, *d_noise
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, kind, numbers, groups, *tensors):
        (n_results, n_saved, needs_x), dims, size = numbers, in_dims[3:], info.batch_size
        kept = slice(n_results + n_saved, None)
        if kind.is_packed(tensors[kept]):
            return _loop(
                info, dims, tensors, lambda *part: _Backward.apply(kind, numbers, groups, *part)
            )
        # The saved tensors are valid only if forward folded the batch in the same way.
        members = kind.members(tensors[kept], dims[kept])
        was_folded = any(dim is not None for dim in dims[kept])
        saved = tensors[n_results : n_results + n_saved] if was_folded else ()
        parts = [
            *_fold(size, tensors[:n_results], dims[:n_results], [1] * n_results),
            *kind.fold(size, tensors[kept], dims[kept]),
        ]
        dx, *rest = _Backward.apply(
            kind, (n_results, len(saved), needs_x), size * max(1, groups, members),
            *parts[:n_results], *saved, *parts[n_results:],
        )  # fmt: skip
        d_state, d_weights, d_fresh = split(rest, kind.call.counts[:3])

        def unfold(parts, dim=1):
            return [part.unflatten(dim, (size, -1)) for part in parts]

        if groups or members:
            d_weights = unfold(d_weights, 0)
        of_x = unfold([dx]) if needs_x else [dx]  # an empty placeholder
        results = (*of_x, *unfold(d_state), *d_weights, *unfold(d_fresh))
        of_x = 1 if needs_x else None
        return results, (of_x, *[1] * len(d_state), *[0] * len(d_weights), *[1] * len(d_fresh))


def _by_reference(
    kind: _Kind, groups: int, call: Call, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Compute the gradients of the differentiable inputs of a call by the reference."""
    counts = call.counts[:3]

    def gradients(marks, noise, inputs, cotangents):
        def run(x, *others):
            state, weights, fresh = split(others, counts)
            flow = Flow(marks, fresh, noise)
            chosen = call._replace(x=x, state=state, weights=weights, flow=flow)
            result = reference.layer(chosen)
            return (result.y, *result.final, *(result.traces if kind.traced else ()))

        return torch.func.vjp(run, *inputs)[1](tuple(cotangents))

    marks, _, noise = call.flow
    if not groups:
        return gradients(marks, noise, inputs, cotangents)

    def unfold(tensors, dims):
        return [
            t if t is None or not d else t.unflatten(d, (groups, -1))
            for t, d in zip(tensors, dims, strict=True)
        ]

    n_state, n_weights, n_fresh = counts
    of_weights = None
    if call.members:
        of_weights, each = 0, groups // call.members
        x, *others = inputs
        parts = split(others, counts)
        parts[1] = [weight.repeat_interleave(each, 0) for weight in parts[1]]
        inputs = [x, *itertools.chain(*parts)]
    dims: list[int | None] = [1, *[1] * n_state, *[of_weights] * n_weights, *[1] * n_fresh]
    of_noise = [None if part.dim() == 1 else 2 if k else 1 for k, part in enumerate(noise)]
    (marks,) = unfold([marks], [2])
    mapped = torch.func.vmap(
        gradients,
        in_dims=(None if marks is None else 2, of_noise, dims, [1] * len(cotangents)),
        out_dims=tuple(0 if d is None else d for d in dims),
    )
    found = mapped(
        marks, unfold(noise, of_noise), unfold(inputs, dims),
        unfold(cotangents, [1] * len(cotangents)),
    )  # fmt: skip
    return tuple(part.flatten(d, d + 1) if d else part for part, d in zip(found, dims, strict=True))


def _fold(
    size: int, tensors: Sequence[Any], dims: Sequence[int | None], batch_dims: Sequence[int | None]
) -> list[Any]:
    """Fold the mapped dimension of every tensor into its batch."""
    parts = []
    for tensor, dim, batch in zip(tensors, dims, batch_dims, strict=True):
        if tensor is None or batch is None or (dim is None and tensor.dim() == 1):
            parts.append(tensor)
            continue
        if dim is None:
            mapped = tensor.unsqueeze(batch)
            shape = [*tensor.shape[:batch], size, *tensor.shape[batch:]]
            mapped = mapped.expand(shape)
        else:
            mapped = tensor.movedim(dim, batch)
        parts.append(mapped.flatten(batch, batch + 1).contiguous())
    return parts


def _of_members(size: int, weight: Tensor, dim: int | None, has_members: bool) -> Tensor:
    """Fold the mapped dimension of a weight into its members."""
    weight = weight.expand(size, *weight.shape) if dim is None else weight.movedim(dim, 0)
    return weight.flatten(0, 1) if has_members else weight


def _loop(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Any], function: Callable[..., Any]
) -> tuple[Any, Any]:
    """Call a function for each element, and stack the results."""
    results = [
        function(
            *(
                t if d is None or t is None else t.select(d, k)
                for t, d in zip(tensors, dims, strict=True)
            )
        )
        for k in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
