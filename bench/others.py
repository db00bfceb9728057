"""Third-party libraries with the same layers, where installed.

Each has its own gate order and layout. The runtimes for trained models receive the layers as ONNX
operators, specified at github.com/onnx/onnx/blob/main/docs/Operators.md.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import convert
from .built import CLASSES, Built, Tensors, flat
from .registry import LAYERS, Case


def plain_gap(
    package: str,
    cells: Sequence[str],
    dtypes: Sequence[str],
    case: Case,
    device: torch.device,
    *,
    has_heads: bool = False,
) -> str | None:
    """Return why a library for plain layers on CUDA cannot run a case.

    Parameters
    ----------
    package : str
        The library's package, which must be installed.
    cells, dtypes : sequence of str
        Those that the library supports.
    case : Case
    device : torch.device
    has_heads : bool, default False

    Returns
    -------
    str or None
        A clause, or None if it can run the case.
    """
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    case = dataclasses.replace(case, num_heads=1) if has_heads else case
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

    hidden, batch, heads = case.hidden_size, case.batch, case.num_heads
    units = hidden // heads
    w_ih, w_hh, b_ih, b_hh = (weight.detach() for weight in baseline.parameters())
    # Gates in torch.nn's order; R[gate, head, out, in].
    parameters = [
        _leaf(w_ih),
        _leaf(w_hh.view(4, heads, units, units)),
        _leaf((b_ih + b_hh).view(4, heads, units)),
    ]
    zeros = w_ih.new_zeros(2, batch, 1, heads, units)

    def run(x: Tensor) -> list[Tensor]:
        w_ih, r, b = parameters
        wx = torch.nn.functional.linear(x, w_ih).view(batch, case.steps, 4, heads, units)
        states, last = flashrnn(
            wx, r, b, states=zeros, function="lstm", backend=backend, dtype=case.dtype
        )
        h_n, c_n = last.reshape(2, 1, batch, hidden)
        return [states[0].reshape(batch, case.steps, hidden).transpose(0, 1), h_n, c_n]

    def to_torch(gradients: Tensors) -> Tensors:
        dx, d_w_ih, d_r, d_b = gradients
        d_b = d_b.reshape(-1)
        return [dx.transpose(0, 1), d_w_ih, d_r.reshape(4 * hidden, units), d_b, d_b]

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


def build_haste(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build a case for haste (github.com/lmnt-com/haste)."""
    import haste_pytorch

    assert isinstance(baseline, torch.nn.RNNBase)
    values = convert.to_haste(baseline)
    module = getattr(haste_pytorch, CLASSES[case.cell])(case.input_size, case.hidden_size)
    module.to(inputs[0].device)
    parameters = [getattr(module, name) for name in values]
    with torch.no_grad():
        for parameter, value in zip(parameters, values.values(), strict=True):
            parameter.copy_(value)

    def to_torch(gradients: Tensors) -> Tensors:
        dx, *others = gradients
        found = copy.deepcopy(baseline)
        convert.from_haste(found, dict(zip(values, others, strict=True)))
        named = {name: weight.detach() for name, weight in found.named_parameters()}
        if "recurrent_bias" not in values:  # one bias is the sum of torch.nn's
            named["bias_hh_l0"] = named["bias_ih_l0"]
        return [dx, *named.values()]

    return Built(lambda x: flat(module(x)), inputs, parameters, to_torch)


# Runtimes for trained models, on a CPU.

# Indices into torch.nn's gates, in the order of ONNX's: i, o, f, c and z, r, h.
_ONNX_GATES = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2], "RNN": [0]}
_ONNX_OPSET, _ONNX_IR = 17, 8


def runtime_gap(package: str, case: Case, device: torch.device) -> str | None:
    """Return why a runtime for trained models cannot run a case.

    Parameters
    ----------
    package : str
        The runtime's package.
    case : Case
    device : torch.device

    Returns
    -------
    str or None
        A clause, or None if it can run the case.
    """
    for needed in (package, "onnx"):
        if importlib.util.find_spec(needed) is None:
            return f"{needed} is not installed"
    if device.type != "cpu":
        return "on a CPU only"
    if case.mode != "forward":
        return "inference only"
    is_other = case.is_beyond_torch or case.members > 0
    is_other = is_other or case.cell not in LAYERS or case.dtype != "float32"
    if is_other or case.ragged or case.proj_size:
        return "torch.nn's layers in float32 only, without projections, of sequences of one length"
    return None


def onnx_model(module: torch.nn.RNNBase, steps: int, batch: int, has_state: bool = False) -> bytes:
    """Export a torch.nn module as an ONNX model.

    Parameters
    ----------
    module : torch.nn.RNNBase
        In float32, with biases and without projections.
    steps, batch : int
        Sizes of the input.
    has_state : bool, default False
        Whether ``h0`` and, for an LSTM, ``c0`` are inputs too; otherwise the state starts as zeros.

    Returns
    -------
    bytes
        The model, with input ``x`` and outputs ``y``, ``h_n`` and, for an LSTM, ``c_n``, in
        torch.nn's shapes; except that with one direction ``y`` is (T, 1, B, H), as the ONNX
        operator writes it.
    """
    from onnx import helper, numpy_helper

    def declared(shapes: Mapping[str, Sequence[int]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, helper.TensorProto.FLOAT, shape)
            for name, shape in shapes.items()
        ]

    hidden, directions = module.hidden_size, 1 + module.bidirectional
    y = (steps, 1, batch, hidden) if directions == 1 else (steps, batch, 2 * hidden)
    state = (module.num_layers * directions, batch, hidden)
    states = _onnx_states(module)
    given = {f"{name}0": state for name in states} if has_state else {}
    nodes = _onnx_nodes(module, steps, batch, has_state)
    weights = {
        f"{name}.{layer}": weight.numpy()
        for layer in range(module.num_layers)
        for name, weight in _onnx_weights(module, layer).items()
    }
    graph = helper.make_graph(
        [
            helper.make_node(operator, inputs, outputs, **attributes)
            for operator, inputs, outputs, attributes in nodes
        ],
        module.mode,
        declared({"x": (steps, batch, module.input_size), **given}),
        declared({"y": y, **{f"{name}_n": state for name in states}}),
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    opset = helper.make_opsetid("", _ONNX_OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_ONNX_IR)
    return bytes(model.SerializeToString())


def _onnx_kind(module: torch.nn.RNNBase) -> str:
    return module.mode.partition("_")[0]


def _onnx_states(module: torch.nn.RNNBase) -> list[str]:
    return ["h", "c"] if module.mode == "LSTM" else ["h"]


_Node = tuple[str, list[str], list[str], dict[str, Any]]


def _onnx_nodes(
    module: torch.nn.RNNBase, steps: int, batch: int, has_state: bool
) -> Iterator[_Node]:
    """Generate operator, inputs, outputs and attributes of the nodes, named "name.layer"."""
    layers, states, attributes = module.num_layers, _onnx_states(module), _onnx_attributes(module)

    def of_layers(name: str) -> list[str]:
        return [f"{name}.{k}" for k in range(layers)]

    for name in states if has_state else []:
        yield "Split", [f"{name}0"], of_layers(f"{name}0"), {"axis": 0}
    x = "x"
    for k in range(layers):
        inputs = [x, f"W.{k}", f"R.{k}", f"B.{k}"]
        if has_state:
            inputs += ["", *(f"{name}0.{k}" for name in states)]  # "": no lengths
        is_last = k == layers - 1
        is_y = is_last and not module.bidirectional
        y = "y" if is_y else f"y.{k}"
        yield _onnx_kind(module), inputs, [y, *(f"{name}_n.{k}" for name in states)], attributes
        if not is_y:
            # From (T, D, B, H) to the layout that the next layer, or the user, expects.
            x = "y" if is_last else f"x.{k}"
            yield "Transpose", [y], [f"rows.{k}"], {"perm": [0, 2, 1, 3]}
            yield "Constant", [], [f"shape.{k}"], {"value_ints": [steps, batch, -1]}
            yield "Reshape", [f"rows.{k}", f"shape.{k}"], [x], {}
    for name in states:
        yield "Concat", of_layers(f"{name}_n"), [f"{name}_n"], {"axis": 0}


def _onnx_attributes(module: torch.nn.RNNBase) -> dict[str, Any]:
    directions = 1 + module.bidirectional
    attributes: dict[str, Any] = {
        "hidden_size": module.hidden_size,
        "direction": ("forward", "bidirectional")[directions - 1],
    }
    if module.mode == "GRU":
        attributes["linear_before_reset"] = 1
    if module.mode.startswith("RNN"):
        attributes["activations"] = [module.mode.partition("_")[2].capitalize()] * directions
    return attributes


def _onnx_weights(module: torch.nn.RNNBase, layer: int) -> dict[str, Tensor]:
    """Return W, R and B of a layer, with stacked directions and the gates in ONNX's order."""
    order = _ONNX_GATES[_onnx_kind(module)]
    found: dict[str, list[Tensor]] = {"W": [], "R": [], "B": []}
    for suffix in ("", "_reverse")[: 1 + module.bidirectional]:
        w_ih, w_hh, b_ih, b_hh = (
            getattr(module, f"{name}_l{layer}{suffix}")
            .detach()
            .unflatten(0, (len(order), -1))[order]
            .flatten(0, 1)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        for name, weight in (("W", w_ih), ("R", w_hh), ("B", torch.cat([b_ih, b_hh]))):
            found[name].append(weight)
    return {name: torch.stack(weights) for name, weights in found.items()}


def onnxruntime_call(model: bytes, inputs: dict[str, Tensor]) -> tuple[Callable[[], Any], Tensors]:
    """Load a model into onnxruntime.

    Input and output are bound once, which is faster than passing and returning arrays: 11 instead
    of 16 us for a step of an LSTM with 128 units.

    Parameters
    ----------
    model : bytes
    inputs : dict of str to Tensor
        Read by each call.

    Returns
    -------
    call : callable
    outputs : sequence of Tensor
        Written by each call.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = {output.name: torch.empty(output.shape) for output in session.get_outputs()}
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, tensor in tensors.items():
            array = tensor.numpy()
            bind(name, "cpu", 0, array.dtype, array.shape, tensor.data_ptr())
    # The binding itself does not keep the tensors alive.
    kept = inputs, outputs

    def call() -> Any:
        session.run_with_iobinding(binding)
        return kept

    return call, list(outputs.values())


def openvino_call(model: bytes, inputs: dict[str, Tensor]) -> tuple[Callable[[], Any], Tensors]:
    """Load a model into OpenVINO; see `onnxruntime_call`.

    Parameters
    ----------
    model : bytes
    inputs : dict of str to Tensor
        Read by each call.

    Returns
    -------
    call : callable
    outputs : sequence of Tensor
        Written by each call.
    """
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # otherwise bfloat16, on CPUs that support it
    }
    compiled = core.compile_model(core.read_model(model), "CPU", options)
    request = compiled.create_infer_request()
    for name, tensor in inputs.items():
        request.set_tensor(name, openvino.Tensor(tensor.numpy(), shared_memory=True))
    outputs = [request.get_output_tensor(k).data for k in range(len(compiled.outputs))]
    return (
        lambda: request.infer(share_outputs=True),
        [torch.from_numpy(output) for output in outputs],
    )


def _build_runtime(
    load: Callable[[bytes, dict[str, Tensor]], tuple[Callable[[], Any], Tensors]],
    case: Case,
    baseline: torch.nn.Module,
    inputs: Tensors,
) -> Built:
    assert isinstance(baseline, torch.nn.RNNBase)
    call, (y, *states) = load(onnx_model(baseline, case.steps, case.batch), {"x": inputs[0]})
    y = y.view(case.steps, case.batch, -1)

    def run(x: Tensor) -> list[Tensor]:
        call()  # x is the tensor that was bound
        return [y, *states]

    return Built(run, inputs, [], has_threads=True)


def build_onnxruntime(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build a case for onnxruntime (onnxruntime.ai); see ``providers.Provider``."""
    return _build_runtime(onnxruntime_call, case, baseline, inputs)


def build_openvino(case: Case, baseline: torch.nn.Module, inputs: Tensors) -> Built:
    """Build a case for OpenVINO (github.com/openvinotoolkit/openvino)."""
    return _build_runtime(openvino_call, case, baseline, inputs)
