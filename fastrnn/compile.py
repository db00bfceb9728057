"""Let ``torch.compile`` trace our sequence modules.

Dynamo breaks the graph at every instance of ``torch.nn.RNN``, ``LSTM`` and ``GRU``, and
ours are instances of these, because programs test for it. `allow_compile` takes ours out
of that rule and leaves torch's own modules under it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._C._dynamo import eval_frame as _eval_frame

from .nn import GRU, LSTM, RNN


def _trace_forward(action: _eval_frame._FrameAction) -> None:
    """Set what Dynamo does when it meets the frame of our forward outside of a graph.

    The three classes share that forward.
    """
    strategy = _eval_frame._FrameExecStrategy(action, action)
    _eval_frame.set_code_exec_strategy(LSTM.forward.__code__, strategy)


# Dynamo never looks into torch's files. Into ours it would, after it broke the graph at the
# module, and would compile piece by piece what is one call of torch's kernels.
_trace_forward(_eval_frame._FrameAction.SKIP)


def allow_compile() -> None:
    """Trace our RNN, LSTM and GRU into ``torch.compile`` graphs, as one operator a layer.

    Call it once, before compiling. Without it ``torch.compile`` still gives right results:
    it breaks the graph at the module, as it does for torch.nn's, and runs it as if it were
    not compiled, so that only ``fullgraph=True`` fails. Cells need nothing. Stock modules
    are compiled as before.

    Every option of a layer is compiled with it, for any T and B in one graph, but ``recompute`` of
    a number of steps: its chunks are unrolled, so that each T has a graph of its own. A length out
    of range is no error there, but makes the row NaN, as on a GPU. ``torch.func`` transforms in
    what is compiled are compiled too. ``torch.export`` needs no opt-in.

    Dynamo has no public setting for this but ``torch._dynamo.config.allow_rnn``, which
    changes torch.nn's modules too; so this wraps the one method in which Dynamo asks.

    Examples
    --------
    >>> import torch, fastrnn
    >>> fastrnn.allow_compile()
    >>> gru = fastrnn.GRU(4, 8)
    >>> compiled = torch.compile(gru, fullgraph=True, backend="aot_eager")
    >>> x = torch.randn(5, 3, 4)
    >>> bool(torch.allclose(compiled(x)[0], gru(x)[0], atol=1e-6))
    True
    """
    from torch._dynamo import config
    from torch._dynamo.variables.builder import VariableBuilder

    _trace_forward(_eval_frame._FrameAction.DEFAULT)
    stock = VariableBuilder.wrap_module
    if getattr(stock, "_fastrnn", False):
        return

    @functools.wraps(stock)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, (RNN, LSTM, GRU)):
            return stock(self, value)
        with config.patch(allow_rnn=True):
            return stock(self, value)

    wrap_module._fastrnn = True  # type: ignore[attr-defined]
    VariableBuilder.wrap_module = wrap_module  # type: ignore[method-assign]
