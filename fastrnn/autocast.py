"""The dtypes of a call inside a ``torch.autocast`` region, which match torch.nn's."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import _VF
from torch.utils import _python_dispatch

from .call import Call
from .context import autocasts, is_ragged, is_traced, untraced


class Dtypes(NamedTuple):
    """The dtype of the computation and of the states other than h, and that of h and the output."""

    compute: torch.dtype
    of_h: torch.dtype


def dtypes(call: Call, *, is_step: bool = False) -> Dtypes | None:
    """Return the dtypes of a call, or None outside autocast.

    On CUDA both are the autocast dtype. On the CPU torch.nn autocasts only the GEMMs, so LSTM and
    GRU keep the wider dtype for their state. An Elman network does not, nor does a projected h,
    which is the result of a GEMM. If the CPU supports the autocast dtype, oneDNN runs a whole LSTM
    as one operation in that dtype.
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
    """Convert a call to another dtype."""
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


# For compilers; torch.compiler.assume_constant_result would import all of Dynamo.
is_one_operation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
@untraced
def _try_one_operation(
    low: torch.dtype, dtype: torch.dtype, is_enabled: bool, is_recorded: bool
) -> bool:
    """Find out by a trial run; the answer depends on the CPU and on the arguments."""
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
