"""The building blocks of the compiled kernels, and code generated for other CPUs."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrnn.cells import CELLS
from fastrnn.cpu import machine

pytest.importorskip("numpy")
pytest.importorskip("llvmlite")
if machine.target() is None:
    pytest.skip("no kernels for this CPU", allow_module_level=True)

import llvmlite.binding as llvm
import numpy
from llvmlite import ir

from fastrnn.bench import activation_errors
from fastrnn.bench.activation_errors import ACTIVATIONS
from fastrnn.cpu import activations, engine, vector
from fastrnn.cpu.tiles import Writer

HOST = machine.target()
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ADDRESS, INT = vector.ADDRESS, vector.INT


def loaded(module: Any) -> Any:
    """Optimize and compile a module, dropping functions it does not call."""
    optimized, for_ = llvm.parse_assembly(str(module)), engine.target_machine()
    builder = llvm.create_pass_builder(for_, llvm.create_pipeline_tuning_options(speed_level=1))
    builder.getModulePassManager().run(optimized, builder)
    owner = llvm.create_mcjit_compiler(optimized, for_)
    owner.finalize_object()
    return owner


def entry(owner: Any, name: str, parameters: Sequence[Any]) -> Callable[..., None]:
    """A compiled function that takes tensors and integers."""
    types = [ctypes.c_void_p if p == ADDRESS else ctypes.c_int64 for p in parameters]
    function = ctypes.CFUNCTYPE(None, *types)(owner.get_function_address(name))

    def call(*arguments: Tensor | int) -> None:
        assert owner  # keeps the code alive
        function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments))

    return call


# Packing and products. The numbers are small integers, so sums are exact in any order.

TARGETS = [
    *(target._replace(dtype=dtype) for target in (machine.NEON, machine.AVX2, machine.AVX512)
      for dtype in (F32, F64)),
    machine.AVX512_BF16._replace(dtype=BF16),
]  # fmt: skip
# Packing needs only shuffles, which LLVM supports on every CPU.
PACKED = [*TARGETS, machine.AVX2._replace(pairs="none", dtype=BF16)]


TILE = [INT, ADDRESS, INT, ADDRESS, INT, ADDRESS, INT]
PIECES = {
    "pack": [ADDRESS, INT, INT, ADDRESS],
    "copy": [ADDRESS, INT, INT, INT, INT, ADDRESS],
    "multiply": TILE,
    "multiply_columns": TILE,
    "multiply_unpacked": [INT, ADDRESS, INT, ADDRESS, INT, INT, ADDRESS, INT],
}


@functools.cache
def pieces(target: machine.Target) -> dict[str, Callable[..., None]]:
    """The building blocks of kernels for a target that this CPU can run."""
    module = ir.Module("pieces")
    writer = Writer(module, target)
    can_multiply = target.pairs in ("", HOST.pairs)
    chosen = {name: of for name, of in PIECES.items() if can_multiply or name in ("pack", "copy")}
    for name, parameters in chosen.items():
        code = vector.Code(module, f"test_{name}", parameters, writer.format)
        if name == "copy":
            b, *numbers, panel = code.parameters
            panel = panel.of(writer.factors.word)
            writer.copy_panel(code, b.of(code.element), *numbers, panel)
        else:
            code.call(getattr(writer, name), *code.parameters)
        code.finish()
    owner = loaded(module)
    return {name: entry(owner, f"test_{name}", of) for name, of in chosen.items()}


def piece(target: machine.Target, name: str) -> Callable[..., None]:
    if name not in pieces(target):
        pytest.skip("this CPU does not multiply pairs of bfloat16")
    return pieces(target)[name]


def named(target: machine.Target) -> str:
    return f"{target.name}-{str(target.dtype).removeprefix('torch.')}"


def integers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype)


def depths(target: machine.Target) -> Sequence[int]:
    """Lengths of sums, including partial vectors, partial pairs and partial iterations."""
    lanes = target.units // 2
    return 1, 2, 3, lanes - 1, lanes, 2 * lanes + 1, 3 * lanes + 2, 4 * lanes, 67


def panel_of(columns: Tensor, units: int) -> Tensor:
    """Columns (k, n) as a panel, (depth, units, numbers in a lane), padded with zeros."""
    group = 2 if columns.dtype == BF16 else 1
    k, n = columns.shape
    padded = columns.new_zeros(-(-k // group) * group, units)
    padded[:k, :n] = columns
    return padded.view(-1, group, units).transpose(1, 2).contiguous()


def canvas(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Space for a result surrounded by sevens, and the whole buffer."""
    size = torch.Size(shape).numel()
    whole = torch.full((size + 128,), 7.0, dtype=dtype)
    return whole[64 : 64 + size].view(shape), whole


def is_framed(whole: Tensor) -> bool:
    return bool((whole[:64] == 7).all() and (whole[-64:] == 7).all())


@pytest.mark.sweep(3)
@pytest.mark.parametrize("target", PACKED, ids=named)
def test_rows_of_weights_are_packed_by_transposing(target):
    call = piece(target, "pack")
    lanes = target.units // 2
    for k in depths(target):
        for units in {1, lanes - 1, lanes, lanes + 1, 2 * lanes - 1, 2 * lanes} - {0}:
            w = integers(units, k, dtype=target.dtype)
            right = panel_of(w.t(), target.units)
            panel, whole = canvas(*right.shape, dtype=target.dtype)
            call(w, k, units, panel)
            assert torch.equal(panel, right), (k, units)
            assert is_framed(whole)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("target", PACKED, ids=named)
def test_columns_of_weights_are_packed_by_copying(target):
    call = piece(target, "copy")
    for k in depths(target):
        for columns in (1, target.units, target.units + 1, 2 * target.units - 1):
            b = integers(k, columns + 3, dtype=target.dtype)
            for first in range(0, columns, target.units):
                right = panel_of(b[:, first : min(first + target.units, columns)], target.units)
                panel, whole = canvas(*right.shape, dtype=target.dtype)
                call(b, columns + 3, k, columns, first // target.units, panel)
                assert torch.equal(panel, right), (k, columns, first)
                assert is_framed(whole)


def exact_dtype(target: machine.Target) -> torch.dtype:
    return F64 if target.dtype == F64 else F32


@pytest.mark.sweep(3)
@pytest.mark.parametrize("name", ["multiply", "multiply_columns"])
@pytest.mark.parametrize("target", TARGETS, ids=named)
def test_products_with_packed_weights(target, name):
    """Products of a few rows or columns; columns of pairs are never multiplied."""
    by_columns = name == "multiply_columns"
    if by_columns and target.pairs:
        pytest.skip("columns are not pairs")
    call = piece(target, name)
    for k in depths(target):
        w = integers(target.units, k, dtype=target.dtype)
        for rows in range(1, target.tile_rows + 1):
            a = integers(rows, k, dtype=target.dtype)
            frame = a.new_full((k + 3, rows + 3), float("nan"))
            frame[:k, :rows] = a.t()
            frame = frame if by_columns else frame.t().contiguous()
            c, whole = canvas(rows, target.units + 5, dtype=exact_dtype(target))
            panel = panel_of(w.t(), target.units)
            call(rows, frame, frame.shape[1], panel, k, c, target.units + 5)
            right = a.double() @ w.double().t()
            assert torch.equal(c[:, : target.units].double(), right), (k, rows)
            assert (c[:, target.units :] == 7).all()
            assert is_framed(whole)


@pytest.mark.parametrize("target", TARGETS, ids=named)
def test_products_with_weights_as_they_are(target):
    call = piece(target, "multiply_unpacked")
    for k in depths(target):
        for units in {1, 2, 3, target.units - 1, target.units}:
            # Data past the last row must not be used; test_cpu_kernels.py checks for reads.
            w = torch.full((units + 1, k), float("nan"), dtype=target.dtype)
            w[:units] = integers(units, k, dtype=target.dtype)
            for rows in range(1, Writer.dot_rows + 1):
                a = torch.full((rows, k + 3), float("nan"), dtype=target.dtype)
                a[:, :k] = integers(rows, k, dtype=target.dtype)
                width = -(-units // 4) * 4
                c, whole = canvas(rows, width + 5, dtype=exact_dtype(target))
                call(rows, a, k + 3, w, units, k, c, width + 5)
                right = a[:, :k].double() @ w[:units].double().t()
                assert torch.equal(c[:, :units].double(), right), (k, units, rows)
                assert (c[:, width:] == 7).all()
                assert is_framed(whole)


# Activations.


def activation(function: Callable[[Any], Any], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Compile an activation function to run over a tensor."""
    run = activation_errors.compiled(function, dtype)

    def apply(values: Tensor) -> Tensor:
        result = torch.full((len(values) + 1,), 7.0, dtype=dtype)
        run(values.numpy(), result.numpy()[:-1])
        assert result[-1] == 7, "stored beyond the end"
        return result[:-1]

    return apply


def exactly(name: str, values: Tensor) -> Any:
    with numpy.errstate(all="ignore"):
        return ACTIVATIONS[name].exact(values.numpy().astype(numpy.longdouble))


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_to_the_last_digits(name, dtype):
    if dtype == F64 and numpy.finfo(numpy.longdouble).eps > 1e-18:
        pytest.skip("no numbers of more digits than float64 has")
    limit, unit = activation_errors.LIMITS[dtype], torch.finfo(dtype)
    values = torch.cat([
        torch.linspace(-limit - 3, limit + 3, 100_001, dtype=dtype),
        torch.linspace(-40, 40, 100_001, dtype=dtype),
        torch.logspace(-30, 1, 50_001, dtype=dtype),
        torch.randn(99_999, dtype=dtype),
    ])  # fmt: skip
    values = torch.cat([values, -values])
    if name == "exp":
        values = -values.abs()
    exact, mine = exactly(name, values), activation(getattr(activations, name), dtype)(values)
    error = numpy.abs(mine.numpy().astype(numpy.longdouble) - exact)
    # Relative, with a floor of one unit of the smallest normal number, lost in 1 - sigmoid.
    units = error / numpy.maximum(numpy.abs(exact) * unit.eps, unit.tiny)
    inside = (values.abs() < limit).numpy()
    assert units[inside].max() < 2.1
    beyond = error[~inside] / numpy.maximum(numpy.abs(exact[~inside]), 1)
    assert beyond.max() < 2 * unit.tiny


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_special_values(name, dtype):
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0], dtype=dtype)
    special = special[1:] if name == "exp" else special
    mine = activation(getattr(activations, name), dtype)(special)
    if name == "log_sigmoid":
        right = torch.nn.functional.logsigmoid(special)
    else:
        right = torch.from_numpy(exactly(name, special).astype(numpy.float64)).to(dtype)
    unit = torch.finfo(dtype)
    torch.testing.assert_close(mine, right, rtol=unit.eps, atol=2 * unit.tiny, equal_nan=True)
    if name == "tanh":
        assert torch.equal(mine.signbit()[-2:], special.signbit()[-2:])
    if name == "exp":
        assert (mine[-2:] == 1).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("name", ["relu", "maximum"])
def test_what_is_not_a_number_stays_so(name, dtype):
    values = torch.tensor(
        [float("nan"), float("inf"), -float("inf"), -2.0, -0.0, 0.0, 3.0], dtype=dtype
    )
    if name == "relu":
        found = activation(activations.relu, dtype)(values)
        torch.testing.assert_close(found, torch.relu(values), equal_nan=True)
        return
    for other in values.tolist():
        for swapped in (False, True):

            def of_two(x, other=other, swapped=swapped):
                pair = (x, x.code.constant(other))
                return activations.maximum(*(pair[::-1] if swapped else pair))

            right = torch.maximum(values, torch.full_like(values, other))
            found = activation(of_two, dtype)(values)
            torch.testing.assert_close(found, right, equal_nan=True)


# Code for other CPUs.

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
OTHERS = [
    (X86, "x86-64-v3", machine.AVX2, "ymm"),
    (X86, "znver4", machine.AVX512_BF16, "zmm"),
    (X86, "sapphirerapids", machine.AVX512_BF16, "zmm"),
    (X86, "skylake-avx512", machine.AVX512, "zmm"),
    (ARM, "neoverse-n1", machine.NEON, ".4s"),
    (ARM, "neoverse-v2", machine.NEON, ".4s"),
]
PRODUCT = {F32: r"vfmadd\w+ps|fmla\s.*\.4s", F64: r"vfmadd\w+pd|fmla\s.*\.2d", BF16: "vdpbf16ps"}


def assembly_for(triple: str, cpu: str, cell: str, target: machine.Target) -> str:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        of = llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"LLVM without {triple}")
    for_ = of.create_target_machine(cpu=cpu, opt=3)
    return for_.emit_assembly(engine.optimized(CELLS[cell], target, for_))


def inner_loops(assembly: str, product: str) -> list[tuple[int, str]]:
    """Basic blocks that jump to themselves, with the number of products in each."""
    parts = re.split(r"^(\.LBB\w+):", assembly, flags=re.MULTILINE)[1:]
    blocks = zip(parts[::2], parts[1::2], strict=True)
    loops = [re.match(rf".*\s{re.escape(label)}$", body, re.M | re.S) for label, body in blocks]
    counted = [(len(re.findall(product, loop[0])), loop[0]) for loop in loops if loop]
    return [(count, body) for count, body in counted if count]


def spilled(body: str) -> bool:
    """Whether a vector, or more than one address, is spilled to the stack."""
    lines = re.findall(r".*(?:\(%rsp|\[sp).*", body)
    return len(lines) > 1 or any(re.search(r"mm\d|\b[qvdz]\d", line) for line in lines)


@pytest.mark.sweep(7)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
@pytest.mark.parametrize(("triple", "cpu", "target", "sign"), OTHERS, ids=[o[1] for o in OTHERS])
def test_products_of_other_cpus_stay_in_registers(triple, cpu, target, sign, dtype):
    if dtype == BF16 and not target.pairs:
        pytest.skip("does not multiply pairs of bfloat16")
    target = target._replace(dtype=dtype)
    loops = inner_loops(assembly_for(triple, cpu, "lstm", target), PRODUCT[dtype])
    # One iteration for a full tile.
    assert max(count for count, _ in loops) == max(24, 2 * target.tile_rows)
    for count, body in loops:
        assert not spilled(body), f"a spill among {count} products"
        assert dtype == F64 or sign in body


@pytest.mark.parametrize("cell", ["rnn_tanh", "peephole_lstm", "slstm"])
def test_products_of_other_cells_stay_in_registers(cell):
    loops = inner_loops(assembly_for(X86, "x86-64-v3", cell, machine.AVX2), PRODUCT[F32])
    assert loops
    for count, body in loops:
        assert not spilled(body), f"a spill among {count} products"
