"""Run one of our modules and its torch.nn counterpart on the same numbers, and compare.

Errors are measured against an oracle: the torch.nn module in float64, with the same (rounded)
weights and inputs. A result passes if its largest error is at most twice that of torch.nn in
the dtype under test, plus a floor of a few units. A unit is the machine epsilon of that dtype
times the largest element of the exact tensor, or times 1 (the scale of the inputs and
cotangents) if cancellation makes that element smaller. The floor is needed because torch.nn's
own error can be small by luck, while summing in another order is equally valid.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

import fastrnn
import fastrnn.call
from fastrnn.cells import CELLS as DEFINITIONS
from fastrnn.planner import use_path

#: In units. In float64 torch.nn is itself the oracle, so the floor is the whole bound; in half
#: precision most sums are accumulated in a wider dtype and rounded once.
FLOOR = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}

PATHS = (None, "kernels", "operators", "reference", "torch")


class IdentityRNN(torch.nn.RNN):
    """torch.nn.RNN without a nonlinearity, one sequence and one step at a time."""

    def forward(self, input: Any, hx: Tensor | None = None) -> Any:
        packed = isinstance(input, PackedSequence)
        if packed:
            sequences = unpack_sequence(input)
        elif input.dim() == 2:
            sequences = [input]
            hx = hx if hx is None else hx.unsqueeze(1)
        else:
            sequences = list(input.unbind(0 if self.batch_first else 1))
        if hx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            hx = sequences[0].new_zeros(rows, len(sequences), self.hidden_size)
        finals: list[Tensor] = []
        for weights in self._by_layer():
            if finals:
                sequences = self._drop(sequences, packed)
            passes = []
            for reverse, w in enumerate(weights):
                states = hx[len(finals)].unbind(0)
                outputs = [
                    self._run(x, h, w, reverse) for x, h in zip(sequences, states, strict=True)
                ]
                finals.append(torch.stack([y[0 if reverse else -1] for y in outputs]))
                passes.append(outputs)
            sequences = [torch.cat(ys, dim=1) for ys in zip(*passes, strict=True)]
        h_n = torch.stack(finals)
        if packed:
            data = pack_sequence(sequences, enforce_sorted=input.sorted_indices is None).data
            return input._replace(data=data), h_n
        if input.dim() == 2:
            return sequences[0], h_n.squeeze(1)
        return torch.stack(sequences, dim=0 if self.batch_first else 1), h_n

    def _by_layer(self) -> Iterator[list[list[Tensor]]]:
        self._update_flat_weights()
        weights, per_direction = iter(self._flat_weights), 4 if self.bias else 2
        for _ in range(self.num_layers):
            yield [
                list(itertools.islice(weights, per_direction))
                for _ in range(2 if self.bidirectional else 1)
            ]

    @staticmethod
    def _run(x: Tensor, h: Tensor, w: list[Tensor], reverse: int) -> Tensor:
        outputs = []
        for x_t in x.flip(0) if reverse else x:
            h = w[0] @ x_t + w[1] @ h + sum(w[2:])
            outputs.append(h)
        return torch.stack(outputs[::-1] if reverse else outputs)

    def _drop(self, sequences: list[Tensor], packed: bool) -> list[Tensor]:
        if packed:
            joined = pack_sequence(sequences, enforce_sorted=False)
            dropped = torch.dropout(joined.data, self.dropout, self.training)
            return unpack_sequence(joined._replace(data=dropped))
        joined = torch.stack(sequences, dim=1)
        return list(torch.dropout(joined, self.dropout, self.training).unbind(1))


class IdentityRNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell without a nonlinearity."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        new = torch.nn.functional.linear(input, self.weight_ih, self.bias_ih)
        if hx is None:
            return new if self.bias_hh is None else new + self.bias_hh
        return new + torch.nn.functional.linear(hx, self.weight_hh, self.bias_hh)


#: Our class and its options, by test id.
LAYERS: dict[str, tuple[type, dict[str, Any]]] = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 2}),
    "gru": (fastrnn.GRU, {}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
    "rnn_identity": (fastrnn.RNN, {"nonlinearity": "identity"}),
}
CELLS: dict[str, tuple[type, dict[str, Any]]] = {
    "lstm_cell": (fastrnn.LSTMCell, {}),
    "gru_cell": (fastrnn.GRUCell, {}),
    "rnn_tanh_cell": (fastrnn.RNNCell, {}),
    "rnn_relu_cell": (fastrnn.RNNCell, {"nonlinearity": "relu"}),
    "rnn_identity_cell": (fastrnn.RNNCell, {"nonlinearity": "identity"}),
}
KINDS = LAYERS | CELLS
CLASSES = (fastrnn.RNN, fastrnn.LSTM, fastrnn.GRU)
CELL_CLASSES = (fastrnn.RNNCell, fastrnn.LSTMCell, fastrnn.GRUCell)
FORMS = ("batched", "unbatched", "packed", "packed_unsorted")


def stock_class(ours: type) -> type:
    return getattr(torch.nn, ours.__name__)


def paths_of(kind: str) -> tuple[str | None, ...]:
    """The paths that run a kind; torch has no identity activation."""
    return PATHS[:-1] if "identity" in kind else PATHS


def on_paths(kinds: Sequence[str]) -> Any:
    """Parametrize a test with `kind` and `path`."""
    return pytest.mark.parametrize(
        ("kind", "path"),
        [
            pytest.param(kind, path, id=f"{kind}-{path or 'planned'}")
            for kind in kinds
            for path in paths_of(kind)
        ],
    )


def pair(
    kind: str, input_size: int = 5, hidden_size: int = 4, **options: Any
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Build our module and its counterpart from the same seed."""
    cls, own = KINDS[kind]
    stock, of_stock = stock_class(cls), dict(own)
    if of_stock.get("nonlinearity") == "identity":
        stock = IdentityRNN if cls is fastrnn.RNN else IdentityRNNCell
        del of_stock["nonlinearity"]
    torch.manual_seed(20)
    ours = cls(input_size, hidden_size, **own, **options)
    torch.manual_seed(20)
    return ours, stock(input_size, hidden_size, **of_stock, **options)


def oracle_of(module: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(module).double()


class Call:
    """The arguments of one call and the cotangents of its results, rounded to a dtype."""

    def __init__(
        self,
        module: Any,
        form: str = "batched",
        *,
        steps: int = 4,
        batch: int = 3,
        hx: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int = 1,
        layout: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.form, self.dtype, self.layout = form, dtype, layout
        self.generator = torch.Generator().manual_seed(seed)
        self.cotangents: dict[str, Tensor] = {}
        self.is_cell = isinstance(module, torch.nn.RNNCellBase)
        self.steps = 0 if self.is_cell else steps
        self.batch_first = not self.is_cell and module.batch_first
        widths = [module.hidden_size] * (2 if "LSTM" in type(module).__name__ else 1)
        if self.is_cell:
            leading, shape = [], [batch, module.input_size]
        else:
            widths[0] = module.proj_size or module.hidden_size
            leading = [module.num_layers * (2 if module.bidirectional else 1)]
            shape = [*([batch, steps] if self.batch_first else [steps, batch]), module.input_size]
        if form == "unbatched":
            shape.pop(0 if self.is_cell or self.batch_first else 1)
        else:
            leading.append(batch)
        self.x = self.random(shape)
        self.hx = [self.random([*leading, width]) for width in widths] if hx else None
        longest_last = [max(1, steps - (batch - 1 - b) * 2) for b in range(batch)]
        self.lengths = longest_last if form == "packed_unsorted" else longest_last[::-1]

    def random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def cotangent(self, name: str, like: Tensor) -> Tensor:
        if name not in self.cotangents:
            self.cotangents[name] = self.random(like.shape)
        return self.cotangents[name].to(like.dtype)

    def wrap(self, x: Tensor) -> Any:
        """The input as a tensor or a PackedSequence, according to the form."""
        if not self.form.startswith("packed"):
            return x
        return pack_padded_sequence(
            x, self.lengths, self.batch_first, enforce_sorted=self.form == "packed"
        )

    def forward(
        self, module: Any, dtype: torch.dtype | None = None
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Return the results by name, and the leaves they were computed from."""
        x, *hx = (
            tensor.to(dtype or self.dtype).clone().requires_grad_()
            for tensor in (self.x, *(self.hx or ()))
        )
        state = tuple(self.layout(part) for part in hx)
        args = [state[0] if len(state) == 1 else state] if state else []
        torch.manual_seed(2)  # for dropout
        result = module(self.wrap(self.layout(x)), *args)
        if self.is_cell:
            parts = result if isinstance(result, tuple) else (result,)
            return dict(zip(("h_n", "c_n"), parts, strict=False)), [x, *hx]
        output, states = result
        states = states if isinstance(states, tuple) else (states,)
        if isinstance(output, PackedSequence):
            assert output.batch_sizes.equal(self.wrap(x).batch_sizes)
            output = pad_packed_sequence(output, self.batch_first)[0]
        return dict(zip(("output", "h_n", "c_n"), (output, *states), strict=False)), [x, *hx]

    def run(
        self,
        module: Any,
        dtype: torch.dtype | None = None,
        *,
        used: Sequence[str] = ("output", "h_n", "c_n"),
        order: int = 1,
    ) -> dict[str, Tensor]:
        """Results, and gradients of the `used` ones with respect to all leaves and parameters.

        Up to `order`, also the derivatives of those gradients, contracted with random numbers.
        """
        results, leaves = self.forward(module, dtype)
        named = dict(zip(("input", "h_0", "c_0"), leaves, strict=False))
        named |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        used = [name for name in used if name in results]
        for k in range(1, order + 1):
            grads = torch.autograd.grad(
                [results[name] for name in used],
                list(named.values()),
                [self.cotangent(name, results[name]) for name in used],
                create_graph=k < order,
                allow_unused=True,
                materialize_grads=True,
            )
            used = [f"{'d' * k}_{name}" for name in named]
            results |= dict(zip(used, grads, strict=True))
            # A constant gradient has no further derivatives.
            used = [name for name in used if results[name].requires_grad]
        return {name: tensor.detach() for name, tensor in results.items()}


def call_of(cell: str, *arguments: Any, **fields: Any) -> fastrnn.call.Call:
    """Create the record of a call to a layer or a step from the name of its cell."""
    return fastrnn.call.Call(DEFINITIONS[cell], *arguments, **fields)


def assert_accurate(
    ours: dict[str, Tensor],
    stock: dict[str, Tensor],
    oracle: dict[str, Tensor],
    what: object = "",
    terms: int = 0,
) -> None:
    """Compare with the oracle; `terms` is the length of the longest sum, if it is long.

    Rounding a sum of n terms step by step is a random walk of sqrt(n) half units.
    """
    units_of = {dtype: units + math.sqrt(terms) / 2 for dtype, units in FLOOR.items()}
    assert ours.keys() == stock.keys() == oracle.keys()
    for name, exact in oracle.items():
        mine, theirs = ours[name], stock[name]
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype), f"{name} {what}"
        if exact.numel() == 0:
            continue
        error, error_of_stock = ((t.double() - exact).abs().max() for t in (mine, theirs))
        unit = torch.finfo(mine.dtype).eps * exact.abs().max().clamp(min=1)
        assert error <= 2 * error_of_stock + units_of[mine.dtype] * unit, (
            f"{name} {what}: error {error:.3g} ({error / unit:.3g} units), "
            f"of torch.nn {error_of_stock:.3g}"
        )


def assert_same(ours: dict[str, Tensor], stock: dict[str, Tensor], what: object = "") -> None:
    """Equal up to rounding, for results in float64."""
    assert_accurate(ours, stock, stock, what)


def check(
    ours: Any,
    stock: Any,
    call: Call,
    paths: Sequence[str | None],
    what: object = "",
    terms: int = 0,
    **options: Any,
) -> None:
    """Compare outputs and all gradients of one call, on each path, against the oracle.

    Autograd differentiates the reference, summing the gradients of a weight step by step.
    """
    exact = call.run(oracle_of(stock), torch.float64, **options)
    theirs = call.run(stock, **options)
    for path in paths:
        with use_path(path):
            mine = call.run(ours, **options)
        steps = call.steps if path == "reference" else 0
        assert_accurate(mine, theirs, exact, f"on path {path}, {what}", max(terms, steps))


def outcome(function: Callable[[], Any]) -> tuple[type, str]:
    """The class and message of the exception that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - compared with torch's
        function()
    return caught.type, str(caught.value)
