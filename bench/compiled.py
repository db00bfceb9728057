"""A kernel as a launch would compile it, for a GPU that need not be there.

Triton's wheel has all it takes. A launch on meta tensors gives the arguments of a real one, and so
their types, the constants and the options.
"""

from __future__ import annotations

import csv
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..cells import CELLS
from ..kernels import configs, launch
from ..kernels.configs import Config, Device, Shape
from . import sass, step_time

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


class Variant(NamedTuple):
    """What decides which code is compiled; the last fields are those of `configs.Config`.

    In 'training', forward saves what 'backward' reads; 'recompute' is backward from the gates. What
    is 'marked' has lengths, resets or truncated gradients; 'fresh' also states after a reset, and
    gradients of the traces.
    """

    cell: str
    run: str
    dtype: str
    precision: str
    hidden_size: int
    device: str
    schedule: str
    block_b: int
    block_h: int
    block_k: int
    num_warps: int
    in_registers: int

    @property
    def config(self) -> Config:
        return Config(*self[6:], tiles=1)

    @property
    def gpu(self) -> Device:
        return configs.DEVICES[self.device]

    @property
    def is_backward(self) -> bool:
        return self.run.startswith(("backward", "recompute"))

    @property
    def is_marked(self) -> bool:
        return self.run.endswith(("marked", "fresh"))

    @property
    def columns(self) -> int:
        """Of the recurrent product."""
        return self.hidden_size * (CELLS[self.cell].n_gates if self.is_backward else 1)

    @property
    def tiles(self) -> int:
        """How many tiles of the batch a program takes turns with."""
        return self.block_b // 16 if self.schedule == "persistent" else 1

    def shape(self, batch: int, directions: int = 1) -> Shape:
        """The problem as the kernels see it."""
        itemsize = DTYPES[self.dtype].itemsize
        others = batch, self.hidden_size, directions, itemsize, self.precision
        return Shape.of(CELLS[self.cell], *others)._replace(marked=self.is_marked)

    def of(self, config: Config) -> Variant:
        """The variant of another configuration."""
        return Variant(*self[:6], *config[:6])


def problem(
    cell: str, run: str, dtype: str, precision: str, hidden_size: int, device: str
) -> Variant:
    """Make a variant without a configuration yet.

    Parameters
    ----------
    cell, run, dtype, precision : str
    hidden_size : int
    device : str

    Returns
    -------
    Variant
    """
    return Variant(cell, run, dtype, precision, hidden_size, device, "", 0, 0, 0, 0, 0)


def compile_variant(variant: Variant) -> Any:
    """Compile the kernel of a launch with the types, constants and options that it would have.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    triton.compiler.CompiledKernel
    """
    kernel, arguments = _recorded(variant)
    target = GPUTarget("cuda", variant.gpu.capability, 32)
    if variant.gpu.target == "hip":
        target = GPUTarget("hip", f"gfx{variant.gpu.capability}", 64)
        arguments.pop("maxnreg", None)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def kind(value: Any, path: tuple[int, ...], is_constant: bool) -> Any:
        """The type of an argument, or of a part of a tuple, that is found by `path`."""
        if is_constant or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(kind(part, (*path, j), False) for j, part in enumerate(value))
        if not isinstance(value, torch.Tensor):
            return "i32"
        attributes[path] = [["tt.divisibility", 16]]
        return _POINTERS[value.dtype]

    for i, parameter in enumerate(kernel.params):
        value = arguments.pop(parameter.name)
        signature[parameter.name] = kind(value, (i,), parameter.is_constexpr)
    source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    found = source(kernel, signature, constants, attributes)
    return triton.compile(found, target=target, options=arguments)


def _recorded(variant: Variant) -> tuple[Any, dict[str, Any]]:
    """The kernel that a launch would run, and its arguments, on meta tensors."""
    cell, hidden, steps, batch = CELLS[variant.cell], variant.hidden_size, 2, variant.block_b

    def tensor(*sizes: int, dtype: torch.dtype = DTYPES[variant.dtype]) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    config = variant.config
    y = tensor(steps, batch, hidden)
    r = tensor(1, cell.n_gates * hidden, hidden)
    gates = tensor(1, steps, batch, cell.n_gates * hidden)
    states = [tensor(1, batch, hidden)] * cell.n_states
    # What Triton's interpreter does not take is imported where it is compiled only.
    module = import_module(f"..kernels.{variant.schedule}", __package__)
    name = "backward_kernel" if variant.is_backward else "forward_kernel"
    kernel = getattr(module, name)
    way, _, flow = variant.run.partition(" ")
    operands = launch.Operands(
        r,
        tensor(1, cell.n_gates * hidden),
        tensor(1, cell.n_extra * hidden) if cell.n_extra else None,
        states,
        tensor(1, steps, batch, dtype=torch.uint8) if flow else None,
        states if flow == "fresh" else (),
        tensor(1, batch, cell.n_gates * hidden) if flow == "fresh" else None,
    )
    with mock.patch.object(module, name, mock.MagicMock()) as stand_in:
        if variant.is_backward:
            saved = tensor(1, steps, batch, cell.n_saved * hidden)
            traces = [tensor(*y.shape, dtype=torch.float32)] * (cell.n_states - 1)
            past = launch.Past(y, traces, (saved,) if way == "backward" else (gates, gates))
            given = y, states, [y] * (cell.n_states - 1) if flow == "fresh" else []
            launch.backward(cell, config, variant.precision, operands, past, given)
        else:
            keep = {"traced": way == "training", "save": way == "training"}
            launch.forward(cell, config, variant.precision, gates, operands, **keep)
    return kernel, dict(stand_in.__getitem__.return_value.call_args.kwargs)


def resources(cubin: bytes) -> tuple[int, int]:
    """Read off registers, and bytes of stack, of a thread.

    These kernels spill to the stack, and have nothing else there.

    Parameters
    ----------
    cubin : bytes

    Returns
    -------
    (int, int)
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(sass.tool("cuobjdump")), "-res-usage", file.name]
        text = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage
    return int(usage[1]), int(usage[2])


def simulated(variant: Variant, compiled: Any) -> tuple[step_time.Step, step_time.Step]:
    """Simulate a step of a compiled variant; of a stepwise one, a launch.

    Parameters
    ----------
    variant : Variant
        For one of `step_time.DEVICES`.
    compiled : triton.compiler.CompiledKernel

    Returns
    -------
    alone, full : step_time.Step
        Of one group of programs that has the GPU for itself, and where all multiprocessors run such
        programs and share the bytes from L2.
    """
    cubin, trips = compiled.asm["cubin"], 0
    slices = -(-variant.hidden_size // variant.block_h)
    if variant.schedule == "stepwise":
        trips = -(-variant.columns // variant.block_k)
        trips = max(1, trips // unrolled(compiled.asm["ptx"], sass.read(cubin)))
    alone, full = (
        step_time.simulate(
            *(cubin, variant.device, variant.num_warps),
            programs=programs,
            trips=trips,
            tiles=variant.tiles,
        )
        for programs in (min(slices, variant.gpu.processors), variant.gpu.processors)
    )
    return alone, full


_PTX_PRODUCT = re.compile(r"\s*(mma\.sync|wgmma\.mma|fma\.rn\.f32)")
_SASS_PRODUCT = re.compile("HMMA|HGMMA|FFMA")


def unrolled(ptx: str, code: Sequence[sass.Instruction]) -> int:
    """Tell how many turns of the longest loop ptxas made one, by the products in it.

    Parameters
    ----------
    ptx : str
    code : sequence of sass.Instruction

    Returns
    -------
    int
    """
    lines = ptx.splitlines()
    labels = {line.split(":")[0]: n for n, line in enumerate(lines) if line.startswith("$L")}
    jumps = ((n, re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)) for n, line in enumerate(lines))
    loops = [(labels[jump[1]], n) for n, jump in jumps if jump and labels[jump[1]] < n]
    edges = sass.back_edges(code)
    if not loops or not edges:
        return 1
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    once = sum(bool(_PTX_PRODUCT.match(line)) for line in lines[first:last])
    first, last = edges[0]
    many = sum(bool(_SASS_PRODUCT.match(i.name)) for i in code[first:last])
    return max(1, round(many / once)) if once else 1


_T = TypeVar("_T")


def in_processes(function: Callable[[Any], _T], items: Sequence[Any], jobs: int) -> Iterator[_T]:
    """Call a function for each of several items, in several processes.

    Parameters
    ----------
    function : callable
        Of a module.
    items : sequence
    jobs : int

    Yields
    ------
    object
        What the function returned, in the order of `items`.
    """
    # A fork of a process with threads, as torch's is, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(function, items)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table in place of another, of which nothing is lost if this is interrupted.

    Parameters
    ----------
    path : pathlib.Path
    header : sequence of str
    rows : iterable of sequences of str
    """
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    new.replace(path)


def read_table(path: Path, n_key: int) -> dict[tuple[str, ...], list[str]]:
    """Read the rows of a table, if there is one, by their first fields.

    Parameters
    ----------
    path : pathlib.Path
    n_key : int
        How many fields are the key.

    Returns
    -------
    dict of tuple of str to list of str
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return {tuple(row[:n_key]): row for row in rows}
