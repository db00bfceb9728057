"""The forms of a module call: repeated, packed, unbatched, recorded by torch.fx."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import checks, context, cpu, paths, planner
from . import functional as F
from .options import Options, States

# The attributes of a module that determine how a call is executed. They are read from its dict,
# because attribute lookup on modules is slower.
_NAMES = (
    "mode", "batch_first", "bidirectional", "num_layers", "input_size", "hidden_size", "proj_size",
    "dropout", "training",
)  # fmt: skip
_NUMBERS = operator.itemgetter(*_NAMES)
_ORDINARY = {Tensor, torch.nn.Parameter}

# Functions that run inference calls that pass a guard, keyed by what the guard does not check. For
# steps, the numbers of those that no kernel runs are also keys, with an empty entry.
_prepared: dict[Any, tuple[tuple[Callable[..., bool], paths.Prepared | None], ...]] = {}
_MOST_KEYS, _MOST_GUARDS = 1024, 4


def run_prepared(module: Any, input: Any, hx: Any) -> Any:
    """Run an inference call that is like an earlier one; None if it needs the full path.

    Everything that determines how a call is executed is part of its key or checked by the guard.
    """
    kind, parameters, state = type(hx), module._parameters, hx
    if type(input) is not Tensor:
        return None
    if kind is Tensor:
        state = (hx,)
    elif hx is None:
        state = ()
    elif kind is not tuple and kind is not list:
        return None
    # The same tensor passed for all states, such as zeros, counts once.
    is_same = len(state) > 1 and all(part is state[0] for part in state)
    tensors = (input, *(state[:1] if is_same else state), *parameters.values())
    if not set(map(type, tensors)) <= _ORDINARY:
        return None
    if context.is_watched() or (torch.is_grad_enabled() and context.differentiated(*tensors)):
        return None
    if module.training and _is_drawn(module):
        return None
    cls: Any = type(module)
    if _has_properties(cls):
        return None
    # These are used in the computation; they differ from the parameters if something replaced them.
    weights = module._flat_weights
    if len(weights) != len(parameters) or not all(map(operator.is_, parameters.values(), weights)):
        return None
    forced, n_given = planner.forced, len(tensors) - len(parameters)
    try:
        key = (
            kind, n_given, len(state), input.shape, *_NUMBERS(module.__dict__), module.num_heads,
            module.zoneout, *parameters, torch.get_num_threads(), forced.path, forced.schedule,
            cpu.target(),
        )  # fmt: skip
        known = _known(key, tensors)
    except (KeyError, TypeError):  # a number that is not in the dict, or is not hashable
        return None
    run = _prepare(key, module, tensors, hx) if known is None else known[1]
    if run is None:
        return None
    y, final = run(input, state, tensors[n_given:])
    return y, final[0] if len(final) == 1 else tuple(final)


def _known(key: Any, tensors: Any) -> Any:
    """Look up a call on tensors like these: its guard and the function that runs it."""
    for entry in _prepared.get(key, ()):
        if entry[0](*tensors):
            return entry
    return None


@functools.cache
def _has_properties(cls: Any) -> bool:
    """Whether a class overrides an attribute in the modules' dicts with a property."""
    return any(hasattr(getattr(cls, name, None), "__set__") for name in _NAMES)


def _is_drawn(module: Any) -> bool:
    """Whether a call in training draws random numbers."""
    return bool(module.recurrent_dropout or module.zoneout or module.weight_dropout)


def _prepare(key: Any, module: Any, tensors: Any, hx: Any) -> paths.Prepared | None:
    """Check and plan a call; cache the function that runs others like it."""
    if not module._is_ordinary(tensors[0], hx):
        return None
    options = Options(
        module.batch_first, module.bidirectional, module.dropout, module.training,
        zoneout=module.zoneout, num_heads=module.num_heads,
    )  # fmt: skip
    state = [hx] if type(hx) is Tensor else hx
    weights, name = module._flat_weights, module._definition.name
    call = checks.checked(name, tensors[0], state, weights, options)
    return _remember(key, tensors, len(tensors) - len(weights), paths.prepared(call))


def _remember(
    key: Any, tensors: Any, n_given: int, run: paths.Prepared | None
) -> paths.Prepared | None:
    """Cache the function for calls on tensors like these; the first `n_given` are not weights."""
    if len(set(map(id, tensors))) == len(tensors):  # guards reject duplicates
        others = _prepared.get(key, ())[1 - _MOST_GUARDS :]
        _store(key, (*others, (context.guard(tensors, n_given), run)))
    return run


def _store(key: Any, value: Any) -> None:
    if len(_prepared) >= _MOST_KEYS:
        _prepared.clear()
    _prepared[key] = value


def step_prepared(module: Any, input: Any, hx: Any) -> Any:
    """`run_prepared` for a cell module, with gradients too; a quick None if no kernel runs it."""
    if type(input) is not Tensor or context.is_watched():
        return None
    kind, parameters, forced = type(hx), module._parameters, planner.forced
    given: tuple[Any, ...] = () if hx is None else hx if kind is tuple else (hx,)
    weights = [part for part in parameters.values() if part is not None]
    # The same tensor passed for all states, such as zeros, counts once.
    is_same = len(given) > 1 and all(part is given[0] for part in given)
    tensors = (input, *(given[:1] if is_same else given), *weights)
    if not _ORDINARY.issuperset(map(type, tensors)):
        return None
    differentiated = context.differentiated
    is_chained = differentiated(*given)
    if torch.is_grad_enabled() and not is_chained and forced.path is None and module._aten:
        return None  # torch runs a single step with gradients, see ``crossover``
    numbers = (
        module._title, module.__dict__.get("nonlinearity"), input.shape, input.dtype,
        module.hidden_size, torch.get_num_threads(), forced.path, forced.schedule, cpu.target(),
        differentiated(*tensors), is_chained,
    )  # fmt: skip
    if numbers in _prepared:
        return None
    key = numbers, kind, len(given), is_same, len(weights), *parameters
    known = _known(key, tensors)
    run = _prepare_step(key, module, tensors, hx) if known is None else known[1]
    if run is None:
        return None
    _, final = run(input, given, weights)
    return final[0] if len(final) == 1 else tuple(final)


def _prepare_step(key: Any, module: Any, tensors: Any, hx: Any) -> paths.Prepared | None:
    """`_prepare` for a step; the full path raises the errors."""
    input, parameters = tensors[0], module._parameters
    if input.dim() != 2:
        return None
    state = module._zeros(input) if hx is None else hx
    if not module._is_ordinary(input, state):
        return None
    parts = state if type(state) is tuple else (state,)
    try:
        call = checks.checked_step(module._cell_name, input, parts, [*parameters.values()])
        checks.check_alike(call)
    except (KeyError, RuntimeError, TypeError, ValueError):
        return None
    if not checks.is_step(call):
        return None
    run = paths.prepared(call, is_step=True)
    is_plain = context.is_plain(*call.tensors)
    if run is None and is_plain and planner.path_of(call, is_step=True) != "kernels":
        _store(key[0], ())
        return None
    return _remember(key, tensors, len(tensors) - len(call.weights), run)


def run_packed(module: Any, packed: PackedSequence, hx: Any, options: Options) -> Any:
    data, batch_sizes, sorted_indices, unsorted_indices = packed
    if hx is not None:
        hx = module.permute_hidden(hx, sorted_indices)

    def sort(part: Any, dims: int) -> Any:
        # A wrong batch size raises an error later.
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
    """Add a batch dimension of one to the options of an unbatched call."""
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
        # Tensors stored on the module would leak out of the graph.
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
    """The given states, as a sequence."""
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
    # A tuple of one for an LSTM raises an IndexError, as in torch.nn, which reads the first two.
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
    """Whether torch.fx is tracing a model that contains the module."""
    return isinstance(input, Proxy) and getattr(input.tracer, "root", None) is not module


def leaf_call(
    module: torch.nn.Module, input: Any, hx: Any, given: dict[str, Any] | None = None
) -> Any:
    """Record a call of the module in a torch.fx graph, as torch.fx does for torch.nn's own."""
    tracer = input.tracer
    arguments = (input,) if hx is None else (input, hx)
    path = tracer.path_of_module(module)
    return tracer.create_proxy("call_module", path, arguments, given or {})
