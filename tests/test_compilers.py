"""Compilers, exporters and other tools, applied to modules with all options."""

from __future__ import annotations

import io
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import fastrnn
from fastrnn import autocast

CLASSES = (fastrnn.LSTM, fastrnn.GRU, fastrnn.RNN)
INPUT_SIZE, HIDDEN_SIZE = 11, 6  # unlike T and B, so that mixed-up sizes fail
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")


@pytest.fixture(autouse=True)
def _compiling():
    torch._dynamo.reset()
    fastrnn.allow_compile()
    yield
    torch._dynamo.reset()


def make(cls: Any, num_layers: int = 2, bidirectional: bool = True, **options: Any) -> Any:
    return cls(
        INPUT_SIZE, HIDDEN_SIZE, num_layers=num_layers, bidirectional=bidirectional, **options
    )


def batch_of(steps: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Input, lengths and resets."""
    x = torch.randn(steps, batch, INPUT_SIZE, requires_grad=True)
    lengths = (torch.arange(batch) * 3 + steps) % (steps + 1)
    return x, lengths, torch.rand(steps, batch) < 0.3


def reset_state(module: Any) -> Any:
    count = module.num_layers * (2 if module.bidirectional else 1)
    parts = torch.randn(2, count, 1, HIDDEN_SIZE)
    return tuple(parts) if isinstance(module, fastrnn.LSTM) else parts[0]


def tensors_of(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [t for part in results if part is not None for t in tensors_of(part)]


def gradients(results: Any, x: Tensor, module: torch.nn.Module) -> tuple[Tensor, ...]:
    loss = sum(t.float().square().sum() for t in tensors_of(results))
    return torch.autograd.grad(loss, [x, *module.parameters()])


def check(ours: Any, expected: Any, x: Tensor, module: torch.nn.Module) -> None:
    """Compare results, and gradients with respect to the input and the parameters."""
    torch.testing.assert_close(tensors_of(ours), tensors_of(expected))
    torch.testing.assert_close(gradients(ours, x, module), gradients(expected, x, module))


# torch.compile.

ALL = ("lengths", "reset", "reset_state", "return_states", "bptt", "recompute")
CASES = [
    *((cls, ALL) for cls in CLASSES),
    (fastrnn.GRU, ("return_states",)),
    (fastrnn.RNN, ("bptt",)),
    (fastrnn.LSTM, ("recompute",)),
]


@pytest.mark.sweep(5)
@pytest.mark.parametrize(
    ("cls", "names"), CASES, ids=lambda v: "+".join(v) if isinstance(v, tuple) else v.__name__
)
def test_options_in_one_graph_for_all_sizes(cls: Any, names: tuple[str, ...]) -> None:
    module = make(cls)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    fresh = reset_state(module)
    for steps, batch in ((7, 3), (9, 4)):
        x, lengths, reset = batch_of(steps, batch)
        for tensor, dims in ((x, (0, 1)), (lengths, (0,)), (reset, (0, 1))):
            torch._dynamo.mark_dynamic(tensor, dims)
        given = {
            "lengths": lengths, "reset": reset, "reset_state": fresh, "return_states": True,
            "bptt": 3, "recompute": True,
        }  # fmt: skip
        options = {name: given[name] for name in names}
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = compiled(x, **options)
        check(ours, module(x, **options), x, module)


@pytest.mark.parametrize("cls", CLASSES)
def test_one_step_of_a_policy_in_a_graph(cls: Any) -> None:
    module = make(cls, bidirectional=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in (3, 4):
        x, _, reset = batch_of(1, batch)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(reset, 1)
        with torch._dynamo.config.patch(error_on_recompile=True):
            ours = compiled(x, reset=reset)
        check(ours, module(x, reset=reset), x, module)


def test_export_of_resets_alone() -> None:
    """Python treats one step with resets as a special case, which must not restrict T."""
    net = make(fastrnn.GRU, bidirectional=False).eval()
    x, _, reset = batch_of(7, 3)
    dims = {0: torch.export.Dim("T", min=2, max=64)}
    program = torch.export.export(
        net, (x.detach(),), {"reset": reset}, dynamic_shapes={"input": dims, "reset": dims}
    )
    x, _, reset = batch_of(2, 3)
    torch.testing.assert_close(program.module()(x, reset=reset), net(x, reset=reset))


@pytest.mark.parametrize("cls", [fastrnn.LSTM, fastrnn.GRU])
def test_gates_in_a_graph(cls: Any) -> None:
    module = make(cls, num_layers=1)
    x, lengths, reset = batch_of(7, 3)
    options = {"lengths": lengths, "reset": reset, "return_states": "gates"}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    check(compiled(x, **options), module(x, **options), x, module)


@pytest.mark.long
def test_chunks_are_unrolled() -> None:
    """Every T has its own graph."""
    module = make(fastrnn.RNN, num_layers=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for count, steps in enumerate((7, 9), start=1):
        x, lengths, _ = batch_of(steps, 3)
        options = {"lengths": lengths, "recompute": 4}
        check(compiled(x, **options), module(x, **options), x, module)
        assert counter.frame_count == count


@pytest.mark.sweep(5)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_noise_in_a_graph(cls: Any, training: bool) -> None:
    """In a graph, backward is the reference's, which autograd must be able to record."""
    module = make(cls, num_layers=1, zoneout=0.3, recurrent_dropout=0.4).train(training)
    x, lengths, _ = batch_of(7, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    ours = compiled(x, lengths=lengths)
    torch.manual_seed(1)
    check(ours, module(x, lengths=lengths), x, module)


@NEEDS_COMPILER
def test_inductor() -> None:
    """Generated code relies on the sizes and strides that the operators' fakes report."""
    module = make(fastrnn.LSTM, num_layers=1, bidirectional=False, zoneout=0.3).eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for steps, batch in ((7, 3), (9, 4)):
        x, lengths, _ = batch_of(steps, batch)
        options = {"lengths": lengths, "return_states": True, "bptt": 3, "recompute": True}
        check(compiled(x, **options), module(x, **options), x, module)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_autocast(cls: Any, compiling: bool) -> None:
    """As in torch.nn, an LSTM has the autocast dtype where oneDNN supports it."""
    is_narrow = cls is fastrnn.RNN
    if cls is fastrnn.LSTM:
        is_narrow = autocast.is_one_operation(torch.bfloat16, torch.float32)
    module = make(cls, num_layers=1)
    x, lengths, reset = batch_of(7, 3)
    options = {"lengths": lengths, "reset": reset, "return_states": True}
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiling else module
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(x, **options)
        with fastrnn.planner.use_path("reference"):
            expected = module(x, **options)
    low = torch.bfloat16 if is_narrow else torch.float32
    for a, b in zip(tensors_of(ours), tensors_of(expected), strict=True):
        assert a.dtype == b.dtype == low
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
    both = (gradients(results, x, module) for results in (ours, expected))
    for a, b in zip(*both, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05 * float(b.abs().max()))


def test_transforms_in_a_graph() -> None:
    """``torch.func.vmap`` and ``grad`` over a functional call with options."""
    module = make(fastrnn.RNN, num_layers=1, bidirectional=False)
    x, lengths, _ = batch_of(7, 3)
    params = {name: p.detach() for name, p in module.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        options = {"lengths": lengths}
        return functional_call(module, params, (x,), options)[0].square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))
    inputs = torch.stack([x.detach(), torch.randn_like(x)])
    ours = torch.compile(each, fullgraph=True, backend="aot_eager")(params, inputs)
    torch.testing.assert_close(ours, each(params, inputs))


# torch.export and tools that build on it.


class Tagger(torch.nn.Module):
    def __init__(self, cls: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = make(cls, **options)
        self.head = torch.nn.LazyLinear(2)
        self(*batch_of(2, 2))

    def forward(self, x: Tensor, lengths: Tensor, reset: Tensor) -> Any:
        y, _, states = self.rnn(x, lengths=lengths, reset=reset, return_states=True)
        return self.head(y).relu(), states.h


def export(net: torch.nn.Module, strict: bool = False) -> Any:
    steps, batch = (torch.export.Dim(name, min=2, max=4096) for name in ("T", "B"))
    x, lengths, reset = batch_of(7, 3)
    shapes = ({0: steps, 1: batch}, {0: batch}, {0: steps, 1: batch})
    return torch.export.export(
        net, (x.detach(), lengths, reset), dynamic_shapes=shapes, strict=strict
    )


def check_on_other_sizes(ours: Any, net: Any) -> None:
    for steps, batch in ((7, 3), (12, 5)):
        x, lengths, reset = batch_of(steps, batch)
        torch.testing.assert_close(ours(x, lengths, reset), net(x, lengths, reset))


@pytest.mark.sweep(2)
@pytest.mark.parametrize(
    ("cls", "strict"), [(fastrnn.LSTM, False), (fastrnn.GRU, False), (fastrnn.RNN, True)]
)
def test_export(cls: Any, strict: bool, tmp_path: Any) -> None:
    net = Tagger(cls).eval()
    program = export(net, strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("fastrnn.layer.default") == 2
    torch.export.save(program, tmp_path / "net.pt2")
    check_on_other_sizes(torch.export.load(tmp_path / "net.pt2").module(), net)


@NEEDS_COMPILER
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # in torch
@pytest.mark.long
def test_ahead_of_time(tmp_path: Any) -> None:
    """AOTInductor's loader finds the operator if the process has imported fastrnn."""
    net = Tagger(fastrnn.LSTM, num_layers=1, bidirectional=False).eval()
    path = torch._inductor.aoti_compile_and_package(
        export(net),
        package_path=str(tmp_path / "net.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    check_on_other_sizes(torch._inductor.aoti_load_package(path), net)


@pytest.mark.filterwarnings("ignore")  # from torch's exporter
@pytest.mark.parametrize("cls", CLASSES)
def test_onnx(cls: Any) -> None:
    """Any T and B with torch's trace-based exporter; the newer one fixes T, as for torch.nn."""
    runtime = pytest.importorskip("onnxruntime")
    module, file = make(cls).eval(), io.BytesIO()
    example = torch.randn(7, 3, INPUT_SIZE)
    torch.onnx.export(
        module.to_torch(), (example,), file, dynamo=False, input_names=["x"],
        dynamic_axes={"x": {0: "T", 1: "B"}},
    )  # fmt: skip
    session = runtime.InferenceSession(file.getvalue())
    for x in (example, torch.randn(12, 5, INPUT_SIZE)):
        y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        torch.testing.assert_close(y, module(x)[0], rtol=1e-4, atol=1e-5)


# Tools that trace or rerun.


@pytest.mark.parametrize("cls", CLASSES)
def test_jit_trace_records_the_operator(cls: Any) -> None:
    """With options torch has no kernel for; other sizes also run after saving and loading."""
    net, file = Tagger(cls), io.BytesIO()
    torch.jit.save(torch.jit.trace(net, batch_of(7, 3)), file)
    file.seek(0)
    traced = torch.jit.load(file)
    assert str(traced.inlined_graph).count("fastrnn::layer") == 2
    x, lengths, reset = batch_of(12, 5)
    results = [(run, run(x, lengths, reset)) for run in (traced, net)]
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(*(gradients(result, x, run) for run, result in results))


def test_fx_keeps_the_options() -> None:
    net = Tagger(fastrnn.LSTM)
    traced = torch.fx.symbolic_trace(net)
    (call,) = (node for node in traced.graph.nodes if node.op == "call_module" and node.kwargs)
    assert {k for k, v in call.kwargs.items() if v} == {"lengths", "reset", "return_states"}
    arguments = batch_of(7, 3)
    torch.testing.assert_close(traced(*arguments), net(*arguments))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_checkpoint(cls: Any, reentrant: bool) -> None:
    module = make(cls)
    x, lengths, reset = batch_of(7, 3)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        # Reentrant checkpointing ignores tensors in nested results.
        return tuple(
            tensors_of(module(x, lengths=lengths, reset=reset, return_states=True, bptt=3))
        )

    results = checkpoint(run, x, use_reentrant=reentrant)
    sum(t.square().sum() for t in results).backward()  # not grad(), which it rejects
    found = [x.grad, *(p.grad for p in module.parameters())]
    torch.testing.assert_close(found, list(gradients(run(x), x, module)))
