"""The forms in which a module of layers is called: packed, unbatched, recorded by torch.fx."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import context
from . import functional as F
from .options import Options, States


def run_packed(module: Any, packed: PackedSequence, hx: Any, options: Options) -> Any:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_indices)

    def sort(part: Any, dims: int) -> Any:
        # What has another batch is refused later, in words.
        fits = isinstance(part, Tensor) and part.dim() == dims
        fits = fits and part.shape[1] == int(batch_sizes[0])
        if sorted_indices is None or not fits:
            return part
        return part.index_select(1, sorted_indices)

    reset, reset_state = options.reset, options.reset_state
    if isinstance(reset, PackedSequence):
        longest = max(len(batch_sizes), len(reset.batch_sizes))
        reset, _ = pad_packed_sequence(reset, total_length=longest)
    elif module.batch_first and isinstance(reset, Tensor):
        reset = reset.transpose(0, -1)
    if reset_state is not None:
        reset_state = map_state(lambda part: sort(part, 3), reset_state)
    options = options._replace(
        batch_first=False, batch_sizes=batch_sizes, reset=sort(reset, 2), reset_state=reset_state
    )
    output, hidden, *states = run_checked(module, data, hx, options)
    if unsorted_indices is not None:
        states = [map_states(lambda s: s.index_select(2, unsorted_indices), s) for s in states]
    result = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return result, module.permute_hidden(hidden, unsorted_indices), *states


def with_batch(options: Options, batch_dim: int) -> Options:
    """The options of an unbatched call with a batch of one."""
    lengths, reset, state = options.lengths, options.reset, options.reset_state
    if lengths is not None and not isinstance(lengths, Tensor):
        lengths = torch.tensor([lengths], device="cpu")
    elif lengths is not None:
        lengths = lengths.reshape(1) if lengths.dim() == 0 else lengths
    if isinstance(reset, Tensor):
        reset = reset.unsqueeze(batch_dim)
    if state is not None:
        state = map_state(lambda part: part.unsqueeze(1), state)
    return options._replace(lengths=lengths, reset=reset, reset_state=state)


def map_states(function: Callable[[Tensor], Tensor], states: States) -> States:
    h, *others = states
    return States(function(h), *(None if part is None else function(part) for part in others))


def run_checked(module: Any, input: Tensor, hx: Any, options: Options) -> Any:
    """`run` after torch.nn's own checks."""
    if torch.compiler.is_compiling():
        # What is stored on the module would leak out of the graph.
        weights = [getattr(module, name) for name in module._flat_weights_names]
        return run(module, weights, input, hx, options)
    module._update_flat_weights()
    if hx is None:
        context.untraced(module.check_input)(input, options.batch_sizes)
    else:
        context.untraced(module.check_forward_args)(input, hx, options.batch_sizes)
    return run(module, module._flat_weights, input, hx, options)


def run(module: Any, weights: list[Tensor], input: Tensor, hx: Any, options: Options) -> Any:
    """Call the function of ``fastrnn.functional``."""
    if module.weight_dropout and module.training:
        weights = [
            torch.dropout(weight, module.weight_dropout, True) if "weight_hh" in name else weight
            for name, weight in zip(module._flat_weights_names, weights, strict=True)
        ]
    cell = module._definition
    paired = len(cell.states) > 1
    if options.reset_state is not None and not paired:
        options = options._replace(reset_state=[options.reset_state])  # type: ignore[list-item]
    state = hx if hx is None or paired else [hx]
    output, final, *states = F.sequence(cell.name, input, state, weights, options)
    return output, tuple(final) if paired else final[0], *states


def states_in(hx: Any) -> Sequence[Any]:
    """The states that were given, as a sequence."""
    return () if hx is None else (hx,) if isinstance(hx, Tensor) else hx


def check_state_dims(module: Any, hx: Any, batched: bool) -> None:
    kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
    if isinstance(hx, Tensor):
        if hx.dim() != dims:
            raise RuntimeError(
                f"For {kind} input, hx should also be {dims}-D but got {hx.dim()}-D tensor"
            )
        return
    if not module._is_paired:
        name = type(module).__name__
        raise TypeError(f"hx of {name} must be a tensor, got {type(hx).__name__}")
    # An LSTM's tuple of one is an IndexError, as in torch.nn, which looks at the first two.
    count = module._definition.n_states
    found = [part.dim() for part in (hx[0], hx[1], *hx[2:count])]
    if any(count != dims for count in found):
        names = "hx and cx" if len(found) == 2 else "all parts of hx"
        raise RuntimeError(
            f"For {kind} input, {names} should also be {dims}-D "
            f"but got ({', '.join(f'{count}-D' for count in found)}) tensors"
        )


def map_state(function: Callable[[Tensor], Tensor], hx: Any) -> Any:
    """Apply a function to every tensor of a state."""
    return function(hx) if isinstance(hx, Tensor) else tuple(function(part) for part in hx)


def is_leaf(module: torch.nn.Module, input: Any) -> bool:
    """Whether torch.fx traces a model that the module is part of."""
    return isinstance(input, Proxy) and getattr(input.tracer, "root", None) is not module


def leaf_call(
    module: torch.nn.Module, input: Any, hx: Any, given: dict[str, Any] | None = None
) -> Any:
    """Record a call of the module in a torch.fx graph, as torch.fx does for torch.nn's own."""
    tracer = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, arguments, given or {})
