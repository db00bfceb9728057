"""Autograd functions for single steps with gradients, cached for repeated calls.

The gradient of a weight is a sum over all steps that share it. Autograd would compute a matrix for
every step and add them up, which for few rows takes longer than the rest of the step. Instead,
steps whose state comes from another step store their rows, and a single product sums them once all
steps have.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpu, ops
from .call import Asked, Call
from .context import is_plain


class _Weights(Function):
    """The weights of steps, as an empty tensor: a graph node whose backward runs after all steps.

    `rows` holds the rows that the steps stored, keyed by the backward pass they belong to.
    """

    @staticmethod
    def forward(ctx, stepping, rows, *weights):
        ctx.stepping, ctx.rows = stepping, rows
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx, _):
        rows, needs = ctx.rows.pop(_this_pass(), None), ctx.needs_input_grad[2:]
        found = [None] * len(needs) if rows is None else ctx.stepping.d_weights(rows, needs)
        return None, None, *found


class _Step(Function):
    """A step run by the result of ``cpu.prepared_step``; `shared` is `_Weights`' output, or None.

    Second derivatives are those of a layer.
    """

    @staticmethod
    def forward(ctx, stepping, shared, x, *tensors):
        state, weights = tensors[: stepping.n_states], tensors[stepping.n_states :]
        final, kept = stepping.forward(x, state, weights)
        ctx.stepping, ctx.shared = stepping, shared
        ctx.save_for_backward(x, *tensors, kept)
        ctx.set_materialize_grads(False)
        return tuple(final)

    @staticmethod
    def backward(ctx, *d_final):
        stepping, shared, needs = ctx.stepping, ctx.shared, ctx.needs_input_grad[2:]
        x, *tensors, kept = ctx.saved_tensors
        state, weights = tensors[: stepping.n_states], tensors[stepping.n_states :]
        of_weights = needs[1 + stepping.n_states :]
        if not _is_simple(x, *tensors, kept, *d_final):
            call = Call(stepping.cell, x, state, weights)
            found = ops.cell_step_backward(call, d_final, Asked(needs[0], any(of_weights)))
            return None, None, found.dx, *found.d_state, *found.d_weights
        found, rows = stepping.backward(x, state, weights, kept, d_final, needs)
        if shared is None:
            return None, None, *found, *stepping.d_weights([rows], of_weights)
        d_shared = None
        if torch._C._will_engine_execute_node(shared.grad_fn):
            left = shared.rows.setdefault(_this_pass(), [])
            # One empty gradient, so that the engine runs the node.
            d_shared = None if left else x.new_empty(0)
            left.append(rows)
        return None, d_shared, *found, *[None] * len(weights)


# Bypasses what Function.apply does for torch.func; no step is prepared inside a transform.
_step, _weights = super(Function, _Step).apply, super(Function, _Weights).apply
_this_pass = torch._C._current_graph_task_id


def _is_simple(x: Tensor, *others: Tensor | None) -> bool:
    """Whether backward may take the fast path: nothing intercepts it, and there are kernels."""
    batched = torch._C._functorch.is_legacy_batchedtensor  # of autograd's is_grads_batched
    return (
        not torch.is_grad_enabled()
        and is_plain(x, *others)
        and not any(batched(part) for part in others if part is not None)
        and cpu.kernel_gap(x.dtype) is None
    )


class _Prepared:
    """Runs steps; a ``paths.Prepared``."""

    def __init__(self, stepping: Any) -> None:
        self.stepping = stepping
        # Outputs of `_Weights` that the graph of a step still holds.
        self.shared: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()

    def __call__(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        stepping, shared = self.stepping, None
        state = state or [x.new_zeros(stepping.sizes)] * stepping.n_states
        if state[0].requires_grad and weights[0].requires_grad:
            shared = self._shared(weights)
        final = _step(stepping, shared, x, *state, *weights)
        return final[0], final

    def _shared(self, weights: Sequence[Tensor]) -> Tensor:
        # A tensor that was changed in place is another node of the graph.
        key = tuple([(id(part), part._version, part.requires_grad) for part in weights])
        found = self.shared.get(key)
        if found is None:
            rows: dict[int, list[Any]] = {}
            found = _weights(self.stepping, rows, *weights)
            found.rows, found.weights = rows, weights  # kept alive while the key is in use
            self.shared[key] = found
        return found


def prepared(call: Call) -> _Prepared | None:
    """Make or look up a function for steps like this one with gradients; None if there is none."""
    known = call.known
    assert known is not None, "only of calls that were checked"
    if not all(map(Tensor.is_contiguous, call.weights)):
        return None
    key = call.x.dtype, cpu.target(), torch.get_num_threads()
    found = known.steps.get(key)
    if found is None and (stepping := cpu.prepared_step(call)) is not None:
        found = known.steps[key] = _Prepared(stepping)
    return found
