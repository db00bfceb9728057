"""An independent implementation of the layers: the oracle of ``fastrnn verify``.

It uses nothing from the rest of the package, so that it does not share its mistakes. A layer
consists of formulas for one step, and a walk over the steps of every row in the order of its
direction. Heads are computed as separate layers. Random numbers are drawn by the caller.

Everything is differentiable. Every tensor has a leading dimension of K draws: slightly different
inputs and weights, which are computed together. In shapes, T, B, I, H, P, G, L and D are those of
``call.py``; N is the number of heads, and U = H / N that of their units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

State = tuple[Tensor, ...]
Extras = Mapping[str, Tensor]
#: The recurrent part of all gates as a function of h, or of r * h for one of the cells.
Recur = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Walk:
    """How all layers walk over their steps; its tensors have no dimension of draws.

    Attributes
    ----------
    lengths : int64 Tensor of shape (B,)
    reset : bool Tensor of shape (T, B)
        Whether a sequence starts at the step.
    bptt : int or None
        Steps after which gradients are cut.
    drop : Tensor of shape (L * D, B, P), or None
        Factors of h in the recurrent product.
    zones : sequence of (Tensor of shape (L * D, T, B, ·), or None)
        Fraction of its previous value that each state keeps.
    dropout : sequence of Tensor of shape (T, B, D * P)
        Factors of the output of every layer but the last; empty for none.
    """

    lengths: Tensor
    reset: Tensor
    bptt: int | None
    drop: Tensor | None
    zones: Sequence[Tensor | None]
    dropout: Sequence[Tensor]


@dataclass(frozen=True)
class Results:
    """The results of `layers`, K draws of each.

    Attributes
    ----------
    output : Tensor of shape (K, T, B, D * P)
    final : list of Tensor of shape (K, L * D, B, ·)
    states : list of Tensor of shape (K, T, L * D, B, ·)
    gates : Tensor of shape (K, T, L * D, B, G * H), or None
    """

    output: Tensor
    final: list[Tensor]
    states: list[Tensor]
    gates: Tensor | None


# One step of each cell: returns the new states, and the activations of its gates or None. `wx` is
# the input part of the gates, with its bias.


def _lstm(wx: Tensor, recur: Recur, h: Tensor, state: State, extras: Extras) -> Any:
    i, f, g, o = (wx + recur(h)).chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * state[1] + i * g
    shown = c
    if "gain_c" in extras:
        shown = _normalized(c) * extras["gain_c"] + extras["bias_c"]
    return (o * shown.tanh(), c), (i, f, g, o)


def _gru(wx: Tensor, recur: Recur, h: Tensor, state: State, extras: Extras) -> Any:
    (r, z, n), (r_h, z_h, n_h) = wx.chunk(3, -1), recur(h).chunk(3, -1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + r * n_h).tanh()
    return ((1 - z) * n + z * state[0],), (r, z, n)


def _gru_reset_before(wx: Tensor, recur: Recur, h: Tensor, state: State, extras: Extras) -> Any:
    (r, z, n), (r_h, z_h, _) = wx.chunk(3, -1), recur(h).chunk(3, -1)
    r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
    n = (n + recur(r * h).chunk(3, -1)[2]).tanh()
    return ((1 - z) * n + z * state[0],), None


def _peephole_lstm(wx: Tensor, recur: Recur, h: Tensor, state: State, extras: Extras) -> Any:
    i, f, g, o = (wx + recur(h)).chunk(4, -1)
    p_i, p_f, p_o = extras["weight_peephole"].chunk(3, -1)
    c = (f + p_f * state[1]).sigmoid() * state[1] + (i + p_i * state[1]).sigmoid() * g.tanh()
    return ((o + p_o * c).sigmoid() * c.tanh(), c), None


def _slstm(wx: Tensor, recur: Recur, h: Tensor, state: State, extras: Extras) -> Any:
    i, f, z, o = (wx + recur(h)).chunk(4, -1)
    _, c, n, m = state
    kept = logsigmoid(f) + m
    new_m = torch.where(n == 0, i, torch.maximum(i, kept))
    # Above 0 only where n = 0; c is 0 there too, unless zoneout keeps only one of the two.
    old, new = (kept - new_m).clamp(max=80.0).exp(), (i - new_m).exp()
    c, n = old * c + new * z.tanh(), old * n + new
    return (o.sigmoid() * c / n, c, n, new_m), None


def _elman(phi: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    return lambda wx, recur, h, state, extras: ((phi(wx + recur(h)),), None)


# The number of gates of a cell, and its step.
_CELLS: dict[str, tuple[int, Callable[..., Any]]] = {
    "lstm": (4, _lstm),
    "gru": (3, _gru),
    "rnn_tanh": (1, _elman(torch.tanh)),
    "rnn_relu": (1, _elman(torch.relu)),
    "rnn_identity": (1, _elman(lambda pre: pre)),
    "layernorm_lstm": (4, _lstm),
    "layernorm_gru": (3, _gru),
    "gru_reset_before": (3, _gru_reset_before),
    "peephole_lstm": (4, _peephole_lstm),
    "slstm": (4, _slstm),
}


def _normalized(v: Tensor) -> Tensor:
    mean = v.mean(-1, keepdim=True)
    variance = ((v - mean) ** 2).mean(-1, keepdim=True)
    return (v - mean) / (variance + 1e-5).sqrt()


def layers(
    cell: str,
    num_heads: int,
    x: Tensor,
    state: Sequence[Tensor],
    fresh: Sequence[Tensor],
    weights: Sequence[Sequence[Mapping[str, Tensor]]],
    walk: Walk,
) -> Results:
    """Compute all layers.

    Parameters
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    num_heads : int
    x : Tensor of shape (K, T, B, I)
    state, fresh : sequence of Tensor of shape (K, L * D, B, ·)
        States before the first step, and after a reset.
    weights : sequence of sequence of mapping of str to Tensor
        For every layer and direction, keyed by names without suffix; each has the dimension K.
    walk : Walk
    """
    found: list[tuple[Any, ...]] = []
    for k, of_layer in enumerate(weights):
        if k and walk.dropout:
            x = x * walk.dropout[k - 1]
        outputs = []
        for d, w in enumerate(of_layer):
            n = k * len(of_layer) + d
            begin, anew = ([part[:, n] for part in parts] for parts in (state, fresh))
            found.append(_direction(cell, num_heads, x, (begin, anew), w, walk, n, d == 1))
            outputs.append(found[-1][0][0])
        x = torch.cat(outputs, -1)
    states, final, gates = zip(*found, strict=True)
    return Results(
        x,
        [torch.stack(parts, 1) for parts in zip(*final, strict=True)],
        [torch.stack(parts, 2) for parts in zip(*states, strict=True)],
        None if gates[0] is None else torch.stack(gates, 2),
    )


def _direction(
    cell: str,
    num_heads: int,
    x: Tensor,
    given: tuple[Sequence[Tensor], Sequence[Tensor]],
    w: Mapping[str, Tensor],
    walk: Walk,
    n: int,
    reverse: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Compute states of all steps (K, T, B, ·), final states (K, B, ·), gates (K, T, B, G * H).

    `given` holds the states before the first step, and those after a reset.
    """
    state, fresh = given
    n_gates, step = _CELLS[cell]
    steps, heads = x.shape[1], num_heads

    # The steps of every row in the order of the walk, with padding at the end.
    time = torch.arange(steps, device=x.device)[:, None]
    there = time < walk.lengths
    order = torch.where(there & reverse, walk.lengths - 1 - time, time)
    marks = [walk.reset, there & (time > 0) & (time % (walk.bptt or steps) == 0)]
    if reverse:  # a boundary before step t is crossed on entering step t - 1
        marks = [
            torch.cat([part[1:], torch.zeros_like(part[:1])]) & (time < walk.lengths - 1)
            for part in marks
        ]
    begins, stops = (part.gather(0, order) if part.any() else None for part in marks)
    held = None if there.all() else ~there

    def in_order(part: Tensor) -> Tensor:
        """Reorder the steps of (..., T, B, ·); applied twice, it restores the original order."""
        return part.gather(-3, order[..., None].expand(part.shape))

    def by_head(part: Tensor) -> Tensor:
        """(..., N, B, U) from (..., B, H)."""
        return part.unflatten(-1, (heads, -1)).transpose(-3, -2)

    def rows(part: Tensor) -> Tensor:
        """(K, N, blocks * U, ...) from (K, blocks * H, ...)."""
        blocks = part.unflatten(1, (-1, heads, w["weight_ih"].shape[1] // n_gates // heads))
        return blocks.transpose(1, 2).flatten(2, 3)

    matrices = {name: rows(w[name]) for name in ("weight_ih", "weight_hh")}
    extras = {name: rows(part)[:, :, None] for name, part in w.items() if part.dim() == 2}

    def product(part: Tensor, kind: str) -> Tensor:
        """W part + b, for a part of shape (K, N, ..., ·), normalized if there is a gain."""
        found = part @ matrices[f"weight_{kind}"].transpose(-2, -1)
        if f"gain_{kind}" in extras:
            found = _normalized(found) * extras[f"gain_{kind}"]
        return found + extras[f"bias_{kind}"] if f"bias_{kind}" in extras else found

    # (K, N, T, B, G * U); the product is over the rows of all steps.
    wx = product(in_order(x).flatten(1, 2)[:, None], "ih").unflatten(2, (steps, -1))
    s = tuple(by_head(part) for part in state)
    anew = tuple(by_head(part) for part in fresh)
    drop = None if walk.drop is None else by_head(walk.drop[n])
    zones = [None if zone is None else by_head(in_order(zone[n])) for zone in walk.zones]
    states, gates = [], []
    for t in range(steps):
        before = s
        if stops is not None:
            s = _where(stops[t], [part.detach() for part in s], s)
        if begins is not None:
            s = _where(begins[t], anew, s)
        h = s[0] if drop is None else s[0] * drop
        new, shown = step(wx[:, :, t], lambda h: product(h, "hh"), h, s, extras)
        if "weight_hr" in w:
            new = (new[0] @ w["weight_hr"][:, None].transpose(-2, -1), *new[1:])
        new = tuple(
            after if zone is None else zone[t] * old + (1 - zone[t]) * after
            for zone, old, after in zip(zones, s, new, strict=True)
        )
        s = new if held is None else _where(held[t], before, new)
        zeros = [torch.zeros_like(part) for part in new]
        states.append(new if held is None else _where(held[t], zeros, new))
        if shown is not None:
            of_step = torch.stack(shown, -2)
            gates.append(
                of_step if held is None else of_step.masked_fill(held[t][:, None, None], 0.0)
            )

    def joined(part: Tensor) -> Tensor:
        """(..., B, H) from (..., N, B, U)."""
        return part.transpose(-3, -2).flatten(-2)

    found = [
        in_order(torch.stack([joined(part) for part in parts], 1))
        for parts in zip(*states, strict=True)
    ]
    activations = None
    if gates:  # (K, T, N, B, G, U) to (K, T, B, G * N * U)
        activations = in_order(torch.stack(gates, 1).movedim(2, -2).flatten(-3))
    return found, [joined(part) for part in s], activations


def _where(condition: Tensor, parts: Sequence[Tensor], others: Sequence[Tensor]) -> State:
    """Select rows of `parts` where the condition holds, else of `others`, for every state."""
    chosen = zip(parts, others, strict=True)
    return tuple(torch.where(condition[:, None], part, other) for part, other in chosen)
