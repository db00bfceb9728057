"""Libraries that do the same job, if they are installed.

Each has an order of gates and a layout of its own.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from .built import Built, Tensors, flat
from .registry import Case


def plain_gap(
    package: str, cells: Sequence[str], dtypes: Sequence[str], case: Case, device: torch.device
) -> str | None:
    """Say why a library for plain layers on CUDA cannot run a case.

    Parameters
    ----------
    package : str
        That must be installed.
    cells, dtypes : sequence of str
        That it has.
    case : Case
    device : torch.device

    Returns
    -------
    str or None
        A clause, or None if it can.
    """
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if device.type != "cuda":
        return "on CUDA devices only"
    if case.cell not in cells or case.stack or case.dtype not in dtypes:
        return f"one plain layer of {' or '.join(cells)} in {' or '.join(dtypes)} only"
    return None


def _batch_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().contiguous().requires_grad_()


def build_flashrnn(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, backend: str = "triton_fused"
) -> Built:
    """Build a case for FlashRNN (github.com/NX-AI/flashrnn); see ``providers.Provider``."""
    from flashrnn import flashrnn

    hidden, batch = case.hidden_size, case.batch
    w_ih, w_hh, b_ih, b_hh = (weight.detach() for weight in baseline.parameters())
    # Gates in torch.nn's order; R[gate, head, out, in], one head.
    parameters = [
        _leaf(w_ih),
        _leaf(w_hh.view(4, 1, hidden, hidden)),
        _leaf((b_ih + b_hh).view(4, 1, hidden)),
    ]
    zeros = w_ih.new_zeros(2, batch, 1, 1, hidden)

    def run(x: Tensor) -> list[Tensor]:
        w_ih, r, b = parameters
        wx = torch.nn.functional.linear(x, w_ih).view(batch, case.steps, 4, 1, hidden)
        states, last = flashrnn(
            wx, r, b, states=zeros, function="lstm", backend=backend, dtype=case.dtype
        )
        h_n, c_n = last.view(2, 1, batch, hidden)
        return [states[0].view(batch, case.steps, hidden).transpose(0, 1), h_n, c_n]

    def to_torch(gradients: Tensors) -> Tensors:
        dx, d_w_ih, d_r, d_b = gradients
        d_b = d_b.reshape(-1)
        return [dx.transpose(0, 1), d_w_ih, d_r.reshape(4 * hidden, hidden), d_b, d_b]

    return Built(run, [_batch_first(inputs[0])], parameters, to_torch)


def build_torchrl(
    case: Case, baseline: torch.nn.Module, inputs: Tensors, backend: str = "triton"
) -> Built:
    """Build a case for torchrl's recurrent modules (github.com/pytorch/rl)."""
    from tensordict import TensorDict
    from torchrl.modules import GRUModule, LSTMModule

    kind = LSTMModule if case.cell == "lstm" else GRUModule
    states = ["h", "c"] if case.cell == "lstm" else ["h"]
    module = kind(
        case.input_size,
        case.hidden_size,
        in_keys=["x", *states],
        out_keys=["y", *(("next", name) for name in states)],
        recurrent_backend=backend,
        default_recurrent_mode=True,
        device=inputs[0].device,
    )
    inner = getattr(module, case.cell)
    inner.load_state_dict(baseline.state_dict())
    is_init = torch.zeros(case.batch, case.steps, 1, dtype=torch.bool, device=inputs[0].device)

    def run(x: Tensor) -> list[Tensor]:
        data = TensorDict({"x": x, "is_init": is_init}, batch_size=x.shape[:2], device=x.device)
        out = module(data)
        # (B, T, layers, H), the final state at the last step
        final = [out["next", name][:, -1].transpose(0, 1) for name in states]
        return [out["y"].transpose(0, 1), *final]

    def to_torch(gradients: Tensors) -> Tensors:
        return [gradients[0].transpose(0, 1), *gradients[1:]]

    return Built(run, [_batch_first(inputs[0])], list(inner.parameters()), to_torch)


# Which of torch.nn's gates is which of haste's: i, g, f, o and z, r, n.
_HASTE_GATES = {"lstm": [0, 2, 1, 3], "gru": [1, 0, 2]}


def build_haste(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build a case for haste (github.com/lmnt-com/haste)."""
    import haste_pytorch

    order, hidden = _HASTE_GATES[case.cell], case.hidden_size
    inverse = [order.index(k) for k in range(len(order))]

    def reordered(weight: Tensor, order: list[int]) -> Tensor:
        return torch.cat([weight.reshape(len(order), hidden, -1)[k] for k in order])

    module = getattr(haste_pytorch, case.cell.upper())(case.input_size, hidden)
    module.to(inputs[0].device)
    w_ih, w_hh, b_ih, b_hh = (reordered(weight.detach(), order) for weight in baseline.parameters())
    values = {"kernel": w_ih.t(), "recurrent_kernel": w_hh.t(), "bias": b_ih.flatten()}
    if case.cell == "gru":
        values["recurrent_bias"] = b_hh.flatten()
    else:
        values["bias"] = values["bias"] + b_hh.flatten()
    parameters = [getattr(module, name) for name in values]
    with torch.no_grad():
        for parameter, value in zip(parameters, values.values(), strict=True):
            parameter.copy_(value)

    def to_torch(gradients: Tensors) -> Tensors:
        dx, d_kernel, d_recurrent, *d_biases = gradients
        d_biases = [reordered(d, inverse).flatten() for d in d_biases]
        return [
            dx,
            reordered(d_kernel.t(), inverse),
            reordered(d_recurrent.t(), inverse),
            *(d_biases * 2)[:2],
        ]

    return Built(lambda x: flat(module(x)), inputs, parameters, to_torch)
