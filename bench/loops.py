"""A layer as a loop of torch's operators: what one would write where torch.nn has no such layer.

The product with the input is one GEMM for all steps. A step consists of one product, which also
adds the input part, and torch's fused operators where available; heads, or the members of an
ensemble, form a batch of such products. Weights are stored in the layout of these products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, logsigmoid

from ..options import Options
from ..paths import _mask
from .built import Built, Tensors, named_weights
from .registry import VARIANTS, Case

State = tuple[Tensor, ...]
Weights = Mapping[str, Tensor]

# On a CPU, compiling a graph of this many steps takes about ten seconds forward and half a minute
# with backward.
_MAX_UNROLLED = 16


# One step of each cell, from the input part of its gates and h as the product's operand.


def _affine(added: Tensor, h: Tensor, w: Weights) -> Tensor:
    product = torch.addmm if h.dim() == 2 else torch.baddbmm
    return product(added, h, w["recurrent"])


def _rnn(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    return (torch.tanh(_affine(wx, h, w)),)


def _lstm(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    i, f, g, o = _affine(wx, h, w).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    return _reset_after(wx, _affine(w["bias_hh"], h, w), state)


def _reset_after(wx: Tensor, rh: Tensor, state: State) -> State:
    early = 2 * state[0].shape[-1]
    r, z = torch.sigmoid(wx[..., :early] + rh[..., :early]).chunk(2, -1)
    n = torch.tanh(torch.addcmul(wx[..., early:], r, rh[..., early:]))
    return (torch.lerp(n, state[0], z),)


def _reset_before(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    early = 2 * state[0].shape[-1]
    recurrent = w["recurrent"]
    r, z = torch.sigmoid(torch.addmm(wx[:, :early], h, recurrent[:, :early])).chunk(2, -1)
    n = torch.tanh(torch.addmm(wx[:, early:], r * h, recurrent[:, early:]))
    return (torch.lerp(n, state[0], z),)


def _layernorm_lstm(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    i, f, g, o = (wx + _normal(h @ w["recurrent"], w["gain_hh"])).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(_normal(c, w["gain_c"], w["bias_c"])), c


def _layernorm_gru(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    return _reset_after(wx, _normal(h @ w["recurrent"], w["gain_hh"], w["bias_hh"]), state)


def _normal(v: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    return layer_norm(v, gain.shape, gain, bias)


def _peephole_lstm(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    i, f, g, o = _affine(wx, h, w).chunk(4, -1)
    p_i, p_f, p_o = w["weight_peephole"].chunk(3)
    c = state[1]
    i, f = torch.addcmul(i, p_i, c), torch.addcmul(f, p_f, c)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(torch.addcmul(o, p_o, c)) * torch.tanh(c), c


def _slstm(wx: Tensor, h: Tensor, state: State, w: Weights) -> State:
    i, f, z, o = _affine(wx, h, w).chunk(4, -1)
    _, c, n, m = state
    kept = logsigmoid(f) + m
    new_m = torch.maximum(i, kept)
    old, new = torch.exp(kept - new_m), torch.exp(i - new_m)
    c, n = old * c + new * torch.tanh(z), old * n + new
    return torch.sigmoid(o) * c / n, c, n, new_m


# The number of states of each cell, and its step.
_STEPS: dict[str, tuple[int, Callable[..., State]]] = {
    "lstm": (2, _lstm),
    "gru": (1, _gru),
    "rnn_tanh": (1, _rnn),
    "layernorm_lstm": (2, _layernorm_lstm),
    "layernorm_gru": (1, _layernorm_gru),
    "gru_reset_before": (1, _reset_before),
    "peephole_lstm": (2, _peephole_lstm),
    "slstm": (4, _slstm),
}
# Cells whose recurrent part has a separate bias.
_BIASED = ("gru", "layernorm_gru")


def gap(case: Case, device: torch.device) -> str | None:
    """Return why there is no loop for a case; see ``providers.Provider``."""
    if case.is_step or case.ragged or case.num_layers > 1:
        return "one layer, plain except for what torch.nn does not provide, only"
    is_plain = case.cell not in VARIANTS and not case.is_noisy
    if case.parts > 1 and not (is_plain and case.directions == 1 and not case.proj_size):
        return "heads and ensembles of plain layers only"
    return None


def compiled_gap(case: Case, device: torch.device) -> str | None:
    """Return why ``torch.compile`` has no loop or step to compile; see ``providers.Provider``."""
    reason = None if case.is_step else gap(case, device)
    return reason or (_compiler_gap() if device.type == "cpu" else None)


@functools.cache
def _compiler_gap() -> str | None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler, and finds none"
    return None


def build(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, is_compiled: bool = False
) -> Built:
    """Build the loop of a case; see ``providers.Provider``.

    Parameters
    ----------
    case : Case
    baseline : torch.nn.Module
    inputs : sequence of Tensor
    is_compiled : bool, default False
        Whether ``torch.compile`` compiles the steps, several at a time, since a graph contains them
        unrolled.

    Returns
    -------
    Built
    """
    leaves = {
        name: _own(case, name, weight.detach())
        .clone(memory_format=torch.contiguous_format)
        .requires_grad_()
        for name, weight in named_weights(case, baseline).items()
    }
    n_states, step = _STEPS[case.kind]
    walk: Callable[..., Any] = functools.partial(_walk, step)
    unrolled = case.steps
    if is_compiled:
        unrolled = max(n for n in range(1, _MAX_UNROLLED + 1) if case.steps % n == 0)
        # Compile each case from scratch: after some recompilations dynamo silently gives up.
        torch._dynamo.reset()
        walk = torch.compile(walk, dynamic=False, fullgraph=True)

    def run(x: Tensor) -> list[Tensor]:
        drop, zones = _noise(case, x, n_states)
        ys, finals = [], []
        for d in range(case.directions):
            w, wx = _prepared(case, leaves, x, d)
            own_drop, *own_zones = (_piece(part, d) for part in (drop, *zones))
            state, outputs = _initial(case, wx), []
            starts = range(0, case.steps, unrolled)
            for start in reversed(starts) if d else starts:
                some = slice(start, start + unrolled)
                given = [_piece(zone, some) for zone in own_zones]
                y, state = walk(wx[some], state, w, own_drop, given, d == 1)
                outputs.append(y)
            ys.append(_joined(outputs[::-1] if d else outputs, 0))
            finals.append(state)
        states = [torch.stack(parts) for parts in zip(*finals, strict=True)]
        return [_in_torch_layout(case, part) for part in (_joined(ys, -1), *states)]

    def to_torch(gradients: Tensors) -> Tensors:
        dx, *others = gradients
        return [dx, *(_back(case, *pair) for pair in zip(leaves, others, strict=True))]

    return Built(run, inputs, list(leaves.values()), to_torch)


def _walk(
    step: Callable[..., State],
    wx: Tensor,
    state: State,
    w: Weights,
    drop: Tensor | None,
    zones: Sequence[Tensor | float],
    reverse: bool,
) -> tuple[Tensor, State]:
    """Run some steps of a direction."""
    outputs = []
    for t in reversed(range(len(wx))) if reverse else range(len(wx)):
        new = step(wx[t], state[0] if drop is None else state[0] * drop, state, w)
        if "weight_hr" in w:
            new = (new[0] @ w["weight_hr"].t(), *new[1:])
        if zones:
            triples = zip(zones, state, new, strict=True)
            new = tuple(_zoned(_piece(zone, t), *pair) for zone, *pair in triples)
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _zoned(zone: Tensor | float, old: Tensor, new: Tensor) -> Tensor:
    if isinstance(zone, Tensor):
        return torch.where(zone, old, new)
    return torch.lerp(new, old, zone) if zone else new


def _noise(case: Case, x: Tensor, n_states: int) -> tuple[Tensor | None, list[Tensor | float]]:
    """Draw all random numbers, for all directions, in the order in which our layers draw them.

    For zoneout: a mask for each state, or a share in inference.
    """
    directions, batch, is_training = case.directions, case.batch, case.mode == "training"
    drop, zones = None, []
    if case.recurrent_dropout and is_training:
        ones = x.new_ones(directions, batch, case.output_size)
        drop = torch.dropout(ones, case.recurrent_dropout, True)
    rates = Options(zoneout=case.zoneout).zones(n_states) if case.zoneout else []
    widths = [case.output_size] + [case.hidden_size] * (n_states - 1)
    for rate, width in zip(rates, widths, strict=False):
        shape = (directions, case.steps, batch, width)
        zones.append(_mask(shape, rate, x.device) if rate and is_training else rate)
    return drop, zones


def _piece(part: Any, index: Any) -> Any:
    return part[index] if isinstance(part, Tensor) else part


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _prepared(case: Case, leaves: Weights, x: Tensor, d: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights of a direction, and the input part of its gates, (T, B, G * H).

    For heads and members, the latter is (T, parts, B, G * H / parts).
    """
    suffix = "_l0_reverse" if d else "_l0"
    w = {n.removesuffix(suffix): leaf for n, leaf in leaves.items() if n.endswith(suffix)}
    bias = w["bias_ih"] if case.kind in _BIASED else w["bias_ih"] + w["bias_hh"]
    if "gain_ih" in w:
        wx = _normal(linear(x, w["weight_ih"]), w["gain_ih"], bias)
    else:
        wx = linear(x, w["weight_ih"], bias)
    if case.parts == 1:
        w["recurrent"] = w["weight_hh"].t()
        return w, wx
    w["recurrent"], w["bias_hh"] = w["weight_hh"], w["bias_hh"].view(case.parts, 1, -1)
    return w, wx.unflatten(-1, (case.parts, -1)).transpose(1, 2)


def _initial(case: Case, wx: Tensor) -> State:
    """Return the state before the first step, with the rows of a product."""
    n_states, _ = _STEPS[case.kind]
    rows = wx.shape[1:-1]
    h = wx.new_zeros(*rows, case.output_size // case.num_heads)
    others = [wx.new_zeros(*rows, case.hidden_size // case.num_heads) for _ in range(n_states - 1)]
    if case.kind == "slstm":  # an empty memory has weight zero
        others[2].fill_(-torch.inf)
    return (h, *others)


# Convert weights of heads and members, and results, between the layouts of the loop and torch.nn.


def _own(case: Case, name: str, weight: Tensor) -> Tensor:
    """Convert a weight for the products: that of h to (parts, U, G * U); others part after part.

    U is the number of units of a head, or H for members.
    """
    if case.parts == 1:
        return weight
    if case.num_heads > 1:
        weight = weight.unflatten(0, (case.gates, case.num_heads, -1)).transpose(0, 1).flatten(1, 2)
    return weight.transpose(1, 2) if name.startswith("weight_hh") else weight.flatten(0, 1)


def _back(case: Case, name: str, gradient: Tensor) -> Tensor:
    """Convert a gradient back; the inverse of `_own`."""
    if case.parts == 1:
        return gradient
    if name.startswith("weight_hh"):
        gradient = gradient.transpose(1, 2)
    else:
        gradient = gradient.unflatten(0, (case.parts, -1))
    if case.num_heads > 1:
        gradient = gradient.unflatten(1, (case.gates, -1)).transpose(0, 1).flatten(0, 2)
    return gradient


def _in_torch_layout(case: Case, part: Tensor) -> Tensor:
    """Convert a result (·, N, B, U) to (·, B, H), or (·, M, B, H) to (M, ·, B, H)."""
    if case.num_heads > 1:
        return part.transpose(1, 2).flatten(2)
    return part.transpose(0, 1) if case.members else part
