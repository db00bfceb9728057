"""What of torch surrounds a call: autograd, transforms, tracers, autocast, kinds of tensors."""

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
    """Whether torch.jit records what is called; a constant to compilers."""
    return torch._C._get_tracing_state() is not None


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


def autocasts(device: str) -> bool:
    """Whether an autocast region is active that our operators follow."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd wants to know of an operation on these.

    Operators are for what looks at them: compilers, modes, subclasses of Tensor, transforms.
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
    """Whether something looks at what is called that a `guard` does not see: Python's affair.

    A compiler, torch.jit's tracer, which records that sizes are asked for, a ``TorchFunctionMode``,
    or forward-mode AD.
    """
    return (
        torch.compiler.is_compiling()
        or is_traced()
        or torch._C._len_torch_function_stack() > 0
        or forward_ad._current_level >= 0
    )


def guard(tensors: Sequence[Tensor], n_free: int) -> Callable[..., bool]:
    """Make a check whether a call of other tensors is as good as one of these, now.

    It compares all but values that an operation on them depends on: kinds and whether a gradient is
    recorded, dtypes, devices, layouts, sizes, strides but those of the first `n_free`, and what the
    dispatcher would do for modes, transforms, tracers and autocast. It is that of torch.compile,
    and takes less than asking a single tensor for so much. A tensor that is there twice fails.
    """
    sizes = [list(part.shape) for part in tensors]
    strides: list[list[Any]] = [list(part.stride()) for part in tensors]
    strides[:n_free] = [[None] * part.dim() for part in tensors[:n_free]]
    guards: Any = TensorGuards
    return guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


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
    if forward_ad._current_level >= 0:
        return "forward"
    return "func" if torch._C._are_functorch_transforms_active() else None


def forward_mode() -> bool:
    """Whether forward-mode AD is active, by ``torch.func`` or without."""
    return forward_ad._current_level >= 0


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an operation on these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def can_look(tensor: Tensor) -> bool:
    """Tell whether the values of a tensor may decide something, now and without waiting."""
    is_recorded = torch.compiler.is_compiling() or is_traced() or transformed()
    return tensor.is_cpu and not is_recorded


def is_ragged(batch_sizes: Tensor | None) -> bool:
    """Tell whether the sequences of a packed batch differ in length.

    False also while a compiler traces, which must not ask for values.
    """
    if batch_sizes is None or torch.compiler.is_compiling() or is_traced():
        return False
    return bool(batch_sizes[0] != batch_sizes[-1])
