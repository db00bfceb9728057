"""``fastrnn::layer`` as ``torch.func`` sees it: reverse-mode derivatives and vmap.

An autograd formula of torch.library is unknown to the transforms, so here are autograd functions
that know them. Mapped over inputs, they fold the mapped dimension into the batch and make one call;
the gradients of weights that were not mapped are then those of each group of the batch, without a
loop. Mapped over weights, they make a call for each element.

Forward mode does not come here: ``planner`` sends it to ``reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .flow import Flow


class _Call(NamedTuple):
    """What a call of the operator has beside tensors, and how many of these are what."""

    cell: str
    bidirectional: bool
    save: int
    traced: bool
    counts: tuple[int, ...]  # state, weights, fresh, noise

    @property
    def n_results(self) -> int:
        """How many results there are: y, the final states, the traces."""
        n_states = reference.CELLS[self.cell].n_states
        return 1 + n_states + (n_states - 1 if self.traced else 0)


class _Arguments(NamedTuple):
    """The tensors of a call; those that may be mapped over without a loop have a batch."""

    x: Tensor
    marks: Tensor | None
    batch_sizes: Tensor | None
    state: Sequence[Tensor]
    weights: Sequence[Tensor]
    fresh: Sequence[Tensor]
    noise: Sequence[Tensor]

    @classmethod
    def of(cls, call: _Call, tensors: Sequence[Any]) -> _Arguments:
        """Group a flat list."""
        return cls(*tensors[:3], *_split(tensors[3:], call.counts))

    def flat(self) -> list[Tensor | None]:
        return [*self[:3], *self.state, *self.weights, *self.fresh, *self.noise]

    def for_operator(self, bidirectional: bool) -> tuple[Any, ...]:
        """In the order of the schema, from `x` on."""
        state, fresh, noise = list(self.state), list(self.fresh), list(self.noise)
        weights = list(self.weights)
        return self.x, state, weights, self.batch_sizes, bidirectional, self.marks, fresh, noise

    def for_reference(self, bidirectional: bool) -> tuple[Any, ...]:
        flow = Flow(self.marks, self.fresh, self.noise)
        return self.x, self.state, self.weights, self.batch_sizes, bidirectional, flow


# Where the batch is, in the order of `_Arguments.flat`: the dimension for x, marks, every state,
# fresh state, and noise.
def _batch_dims(arguments: _Arguments) -> list[int | None]:
    noise = [1 if k == 0 else 2 for k in range(len(arguments.noise))]
    return [
        1, 2, None, *[1] * len(arguments.state), *[None] * len(arguments.weights),
        *[1] * len(arguments.fresh), *noise,
    ]  # fmt: skip


def _split(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    groups, start = [], 0
    for count in counts:
        groups.append(list(flat[start : start + count]))
        start += count
    return groups


def layer(
    cell: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    bidirectional: bool,
    flow: Flow,
    save: int,
    traced: bool,
) -> reference.Result:
    """``reference.layer`` inside of ``torch.func`` transforms.

    Parameters
    ----------
    cell, x, state, weights, batch_sizes, bidirectional, flow
        As there.
    save : int
        What to keep for backward.
    traced : bool
        Whether to return traces.

    Returns
    -------
    Result
    """
    counts = tuple(len(part) for part in (state, weights, flow.fresh, flow.noise))
    call = _Call(cell, bidirectional, save, traced, counts)
    arguments = _Arguments(x, flow.marks, batch_sizes, state, weights, flow.fresh, flow.noise)
    y, *others = _Layer.apply(call, *arguments.flat())
    n_states = reference.CELLS[cell].n_states
    return reference.Result(y, others[:n_states], others[n_states : call.n_results - 1])


class _Layer(torch.autograd.Function):
    """The operator; its results are y, the final states, the traces, and what backward needs.

    What backward needs belongs to the batch as it was folded, so it is never mapped.
    """

    @staticmethod
    def forward(call, *tensors):
        arguments = _Arguments.of(call, tensors).for_operator(call.bidirectional)
        outputs = torch.ops.fastrnn.layer(call.cell, *arguments, call.save, call.traced)
        y, final, traces, saved = outputs
        return y, *final, *traces, *saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.n_results = ctx.call.n_results
        saved = output[ctx.n_results :]
        ctx.mark_non_differentiable(*saved)
        # On a GPU backward needs the output too.
        saved = (output[0], *saved) if output[0].is_cuda and saved else saved
        ctx.n_saved = len(saved)
        ctx.results = [(part.shape, part.dtype, part.device) for part in output[: ctx.n_results]]
        ctx.save_for_backward(*tensors, *saved)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        count = len(tensors) - ctx.n_saved
        cotangents = [
            torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
            for grad, (shape, dtype, device) in zip(grads, ctx.results, strict=False)
        ]
        arguments = _Arguments.of(ctx.call, tensors[:count])
        numbers = (len(cotangents), ctx.n_saved)
        dx, *rest = _Backward.apply(
            ctx.call, numbers, 0, *cotangents, *tensors[count:], *arguments.flat()
        )
        return None, dx, None, None, *rest, *[None] * len(arguments.noise)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        arguments = _Arguments.of(call, tensors)
        if _needs_loop(call, in_dims[1:]):
            return _loop(info, in_dims[1:], tensors, lambda *part: _Layer.apply(call, *part))
        parts = _fold(info.batch_size, tensors, in_dims[1:], _batch_dims(arguments))
        outputs = _Layer.apply(call, *parts)
        n_results = call.n_results
        results = [part.unflatten(1, (info.batch_size, -1)) for part in outputs[:n_results]]
        saved = outputs[n_results:]
        return (*results, *saved), (*[1] * n_results, *[None] * len(saved))


class _Backward(torch.autograd.Function):
    """``fastrnn::layer_backward``; its own derivatives are the reference's.

    With `groups` the batch consists of so many parts, one after another, and the gradients of the
    weights are those of each part.
    """

    @staticmethod
    def forward(call, numbers, groups, *tensors):
        return _backward(call, numbers, groups, tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, (ctx.n_results, ctx.n_saved), ctx.groups, *tensors = inputs
        ctx.save_for_backward(*tensors[: ctx.n_results], *tensors[ctx.n_results + ctx.n_saved :])

    @staticmethod
    def backward(ctx, *grads):
        tensors, call, n_results = ctx.saved_tensors, ctx.call, ctx.n_results
        arguments = _Arguments.of(call, tensors[n_results:])
        inputs = (arguments.x, *arguments.state, *arguments.weights, *arguments.fresh)

        def first(*variables):
            outputs, inputs = variables[:n_results], variables[n_results:]
            return _by_reference(call, ctx.groups, arguments, inputs, outputs)

        results, pull = torch.func.vjp(first, *tensors[:n_results], *inputs)  # type: ignore[misc]
        found = pull(
            tuple(
                torch.zeros_like(result) if grad is None else grad
                for result, grad in zip(results, grads, strict=True)
            )
        )
        d_cotangents, (dx, *rest) = found[:n_results], found[n_results:]
        d_noise = [None] * len(arguments.noise)
        return (
            None, None, None, *d_cotangents, *[None] * ctx.n_saved, dx, None, None, *rest, *d_noise
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, call, numbers, groups, *tensors):
        (n_results, n_saved), dims, size = numbers, in_dims[3:], info.batch_size
        kept = slice(n_results + n_saved, None)
        if _needs_loop(call, dims[kept]):
            return _loop(
                info, dims, tensors, lambda *part: _Backward.apply(call, numbers, groups, *part)
            )
        # Saved is what forward left for the folded batch, if it was folded.
        was_folded = any(dim is not None for dim in dims[kept])
        saved = tensors[n_results : n_results + n_saved] if was_folded else ()
        parts = _fold(
            size,
            [*tensors[:n_results], *tensors[kept]],
            [*dims[:n_results], *dims[kept]],
            [*[1] * n_results, *_batch_dims(_Arguments.of(call, tensors[kept]))],
        )
        dx, *rest = _Backward.apply(
            call, (n_results, len(saved)), size * max(1, groups),
            *parts[:n_results], *saved, *parts[n_results:],
        )  # fmt: skip
        d_state, d_weights, d_fresh = _split(rest, _n_gradients(call))

        def unfold(parts, dim=1):
            return [part.unflatten(dim, (size, -1)) for part in parts]

        if groups:
            d_weights = unfold(d_weights, 0)
        results = (*unfold([dx]), *unfold(d_state), *d_weights, *unfold(d_fresh))
        mapped = (1, *[1] * len(d_state), *[0] * len(d_weights), *[1] * len(d_fresh))
        return results, mapped


def _n_gradients(call: _Call) -> tuple[int, ...]:
    """How many gradients there are of state, weights and fresh states."""
    return call.counts[:3]


def _by_reference(
    call: _Call,
    groups: int,
    arguments: _Arguments,
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """The gradients of `inputs`, those of arguments that have some, by the reference."""

    def gradients(marks, noise, inputs, cotangents):
        def run(x, *others):
            state, weights, fresh = _split(others, _n_gradients(call))
            chosen = _Arguments(x, marks, arguments.batch_sizes, state, weights, fresh, noise)
            result = reference.layer(call.cell, *chosen.for_reference(call.bidirectional))
            return (result.y, *result.final, *(result.traces if call.traced else ()))

        return torch.func.vjp(run, *inputs)[1](tuple(cotangents))

    if not groups:
        return gradients(arguments.marks, arguments.noise, inputs, cotangents)

    def split(tensors, dims):
        return [
            t if t is None or d is None or not t.numel() else t.unflatten(d, (groups, -1))
            for t, d in zip(tensors, dims, strict=True)
        ]

    n_state, n_weights, n_fresh = _n_gradients(call)
    dims: list[int | None] = [1, *[1] * n_state, *[None] * n_weights, *[1] * n_fresh]
    of_noise = [
        (1 if k == 0 else 2) if part.numel() else None for k, part in enumerate(arguments.noise)
    ]
    (marks,) = split([arguments.marks], [2])
    mapped = torch.func.vmap(
        gradients,
        in_dims=(None if marks is None else 2, of_noise, dims, [1] * len(cotangents)),
        out_dims=tuple(0 if d is None else d for d in dims),
    )
    found = mapped(
        marks, split(arguments.noise, of_noise), split(inputs, dims),
        split(cotangents, [1] * len(cotangents)),
    )  # fmt: skip
    return tuple(
        part if d is None else part.flatten(d, d + 1) for part, d in zip(found, dims, strict=True)
    )


def _backward(call: _Call, numbers: tuple[int, int], groups: int, tensors: Sequence[Any]) -> Any:
    n_results, n_saved = numbers
    n_states = reference.CELLS[call.cell].n_states
    dy, *rest = tensors[:n_results]
    saved = list(tensors[n_results : n_results + n_saved])
    arguments = _Arguments.of(call, tensors[n_results + n_saved :])
    operands = arguments.for_operator(call.bidirectional)
    dx, d_state, d_fresh, d_weights = torch.ops.fastrnn.layer_backward(
        call.cell, dy, rest[:n_states], rest[n_states:], *operands, saved, True, True, groups
    )
    return dx, *(d_state if arguments.state else ()), *d_weights, *d_fresh


def _needs_loop(call: _Call, dims: Sequence[int | None]) -> bool:
    """Whether something is mapped that has no batch: weights, or sizes of a packed batch."""
    grouped = _Arguments.of(call, dims)
    return grouped.batch_sizes is not None or any(dim is not None for dim in grouped.weights)


def _fold(
    size: int, tensors: Sequence[Any], dims: Sequence[int | None], batch_dims: Sequence[int | None]
) -> list[Any]:
    """Fold the mapped dimension of every tensor into its batch."""
    parts = []
    for tensor, dim, batch in zip(tensors, dims, batch_dims, strict=True):
        if tensor is None or batch is None or (dim is None and not tensor.numel()):
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


def _loop(
    info: Any, dims: Sequence[int | None], tensors: Sequence[Any], function: Callable[..., Any]
) -> tuple[Any, Any]:
    """A call for each element, the results stacked."""
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
