"""Let ``torch.compile`` trace our sequence modules.

Dynamo breaks the graph at every instance of ``torch.nn.RNN``, ``LSTM`` and ``GRU``. Our modules
are instances of these classes, because user code tests for them. `allow_compile` exempts our
modules from the rule and leaves it in force for torch's.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._C._dynamo import eval_frame as _eval_frame

from .nn import GRU, LSTM, RNN


def _trace_forward(action: _eval_frame._FrameAction) -> None:
    """Set what Dynamo does with the frame of our forward outside a graph.

    The three classes share one forward.
    """
    strategy = _eval_frame._FrameExecStrategy(action, action)
    _eval_frame.set_code_exec_strategy(LSTM.forward.__code__, strategy)


# Dynamo skips torch's files. After a graph break at one of our modules it would trace into ours,
# and compile in pieces what would otherwise be a single call.
_trace_forward(_eval_frame._FrameAction.SKIP)


def allow_compile() -> None:
    """Trace fastrnn's RNN, LSTM and GRU into ``torch.compile`` graphs, as one operator per layer.

    Call it once, before compiling. Without it, ``torch.compile`` still computes correct results:
    it breaks the graph at the module, as it does for torch.nn's, and runs the module eagerly, so
    only ``fullgraph=True`` fails. Cells do not need it. torch.nn's modules are compiled as before.

    All options of a layer are compiled, and one graph serves any T and B, with one exception: a
    number for ``recompute`` unrolls the chunks, so each T needs its own graph. In a compiled graph
    a length out of range does not raise an error but sets that sequence's results to NaN, as on a
    GPU. ``torch.func`` transforms inside the compiled function are compiled too. ``torch.export``
    needs no opt-in.

    Dynamo's only public setting for this, ``torch._dynamo.config.allow_rnn``, also affects
    torch.nn's modules, so this function wraps the one Dynamo method that reads the setting.

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
