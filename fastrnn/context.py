"""The torch context of a call: autograd, transforms, tracers, autocast, types of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_ORDINARY = {*_PLAIN, type(None)}
Function = TypeVar("Function", bound=Callable)


def is_traced() -> bool:
    """Whether torch.jit is tracing; a constant to compilers."""
    return torch._C._get_tracing_state() is not None


def untraced(function: Function) -> Function:
    """Hide a function from torch.jit's tracer, which warns about control flow on sizes."""

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


def autocasts(device: str) -> bool:
    """Whether an autocast region is active that applies to our operators."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd intercepts operations on these tensors.

    Otherwise the operators must be used: for compilers, modes, subclasses of Tensor, transforms.
    """
    return (
        not torch.compiler.is_compiling()
        and not is_traced()
        and _ORDINARY.issuperset(map(type, tensors))
        and not any(t.is_neg() for t in tensors if t is not None)
        and not torch._C._len_torch_dispatch_stack()
        and not transformed()
        and not autocasts("cpu")
        and not autocasts("cuda")
    )


def is_watched() -> bool:
    """Whether something that a `guard` does not detect intercepts Python calls.

    That is a compiler, torch.jit's tracer, which records reads of sizes, a ``TorchFunctionMode``,
    or forward-mode AD.
    """
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


def guard(tensors: Sequence[Tensor], n_free: int) -> Callable[..., bool]:
    """Make a check of whether a call on other tensors is equivalent to one on these, now.

    Apart from values, it compares everything that an operation on the tensors depends on: types,
    whether gradients are recorded, dtypes, devices, layouts, sizes, strides except those of the
    first `n_free`, and the dispatcher's state for modes, transforms, tracers and autocast. This is
    torch.compile's guard, which is faster than reading these properties of a single tensor. It
    rejects duplicate tensors.
    """
    sizes = [list(part.shape) for part in tensors]
    strides: list[list[Any]] = [list(part.stride()) for part in tensors]
    strides[:n_free] = [[None] * part.dim() for part in tensors[:n_free]]
    guards: Any = TensorGuards
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def are_known(*tensors: Tensor | None) -> bool:
    """Whether our operators treat these tensors correctly.

    A subclass of Tensor that overrides operations need not support ours, as it does torch's.
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
    """Name the active transform for the planner, None if there is none."""
    if forward_ad._current_level >= 0:
        return "forward"
    return "func" if torch._C._are_functorch_transforms_active() else None


def forward_mode() -> bool:
    """Whether forward-mode AD is active, with or without ``torch.func``."""
    return forward_ad._current_level >= 0


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def can_look(tensor: Tensor) -> bool:
    """Tell whether control flow may depend on the values of a tensor, without a device sync."""
    is_recorded = torch.compiler.is_compiling() or is_traced() or transformed()
    return tensor.is_cpu and not is_recorded


def is_ragged(batch_sizes: Tensor | None) -> bool:
    """Tell whether the sequences of a packed batch differ in length.

    False while a compiler or torch.jit traces, because values must not be read then.
    """
    if batch_sizes is None or torch.compiler.is_compiling() or is_traced():
        return False
    return bool(batch_sizes[0] != batch_sizes[-1])
