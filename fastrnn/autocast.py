"""What an enclosing ``torch.autocast`` region asks for, as torch.nn would have it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import _VF
from torch.utils import _python_dispatch

from .call import Call
from .context import autocasts, is_ragged, is_traced, untraced


class Dtypes(NamedTuple):
    """The dtype to compute in and of the states beyond h, and that of the output and h."""

    compute: torch.dtype
    of_h: torch.dtype


def dtypes(call: Call, *, is_step: bool = False) -> Dtypes | None:
    """Say in which dtypes a call is computed, None outside of autocast.

    On CUDA both are the autocast dtype. On the CPU torch.nn autocasts the GEMMs only, so that LSTM
    and GRU keep the wider dtype of their state, an Elman network does not, and a projected h, being
    the result of a GEMM, does not either. A whole LSTM is one operation of oneDNN, if this CPU has
    it in the autocast dtype.
    """
    if not torch._C._is_any_autocast_enabled():
        return None
    x, state = call.x, call.state
    device = x.device.type
    if not autocasts(device):
        return None
    low = torch.get_autocast_dtype(device)
    tensors = (x, *state, *call.weights[: call.n_weights])
    if any(not t.is_floating_point() or t.dtype == torch.float64 for t in tensors):
        return None  # autocast leaves these as they are
    if device != "cpu" or call.cell.name.startswith("rnn"):
        return Dtypes(low, low)
    compute = torch.promote_types(low, state[-1].dtype if state else x.dtype)
    is_projected = call.is_projected
    is_whole = not is_step and not is_projected and not is_ragged(call.batch_sizes)
    is_whole = is_whole and (is_traced() or x.numel() > 0)
    if call.cell.name == "lstm" and is_whole and is_one_operation(low, x.dtype):
        return Dtypes(low, low)
    return Dtypes(compute, low if is_projected else compute)


def to(call: Call, dtype: torch.dtype) -> Call:
    """Make the call in another dtype."""
    state, weights, fresh, noise = (
        [part if part.dtype == torch.bool else part.to(dtype) for part in parts]
        for parts in (call.state, call.weights, call.flow.fresh, call.flow.noise)
    )
    flow = call.flow._replace(fresh=fresh, noise=noise)
    return call._replace(x=call.x.to(dtype), state=state, weights=weights, flow=flow)


def is_one_operation(low: torch.dtype, dtype: torch.dtype) -> bool:
    """Tell whether oneDNN runs torch's LSTM as a whole in `low`, from an input of `dtype`."""
    settings: Any = torch.backends.mkldnn.enabled, torch.is_grad_enabled()
    return _try_one_operation(low, dtype, *settings)


# For compilers; by torch.compiler.assume_constant_result it would import all of Dynamo.
is_one_operation._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
