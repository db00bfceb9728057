"""Compile a kernel as a launch would, for a GPU that need not be present.

Triton's wheel has all that is needed. A launch on meta tensors yields the arguments of a real one,
and with them their types, the constants and the options.
"""

from __future__ import annotations

import csv
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

from ..cells import CELLS
from ..kernels import configs, launch, launch_staged
from ..kernels.configs import Config, Device, Shape
from . import sass, step_time

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


#: Names of the launches of a staged step, forward and backward.
LAUNCHES = ("recurrent", "late", "cell", "project"), ("receive", "through", "cell")


class Variant(NamedTuple):
    """What determines the compiled code; the last fields are those of `configs.Config`.

    Words in `run`: with 'training', forward saves what 'backward' reads; 'recompute' is backward
    from the gates; 'marked' has lengths, resets or truncated gradients; 'fresh' also has states
    after a reset and gradients of the traces; 'noisy' has recurrent dropout, and zoneout by masks;
    'projected' has an h with half as many columns. A staged variant is one launch of a step, of
    `LAUNCHES`, named by the last word.
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

    def has(self, *words: str) -> bool:
        """Return whether any of some words is in the run."""
        return not {*words}.isdisjoint(self.run.split())

    @property
    def is_marked(self) -> bool:
        return self.has("marked", "fresh")

    @property
    def is_involved(self) -> bool:
        """Whether a step is more than a product and arithmetic on single units."""
        is_pointwise = CELLS[self.cell].is_pointwise
        return self.has("projected") or not is_pointwise or self.dtype == "float64"

    @property
    def launch(self) -> str:
        """Which launch of a step this is; other schedules have only one kind."""
        return self.run.split()[-1] if self.schedule == "staged" else "cell"

    @property
    def has_tensor_cores(self) -> bool:
        """Whether its products, if any, use matrix instructions."""
        is_product = self.schedule != "staged" or self.launch != "cell"
        return is_product and self.precision != "ieee" and self.dtype != "float64"

    @property
    def size_h(self) -> int:
        """Columns of h; H without a projection."""
        return -(-self.hidden_size // 2) if self.has("projected") else self.hidden_size

    @property
    def columns(self) -> int:
        """Columns of the recurrent product."""
        return self.hidden_size * (CELLS[self.cell].n_gates if self.is_backward else 1)

    @property
    def tiles(self) -> int:
        """How many batch tiles a program alternates between."""
        return self.block_b // 16 if self.schedule == "persistent" else 1

    def shape(self, batch: int, directions: int = 1) -> Shape:
        """Return the problem as the kernels see it."""
        itemsize = DTYPES[self.dtype].itemsize
        others = batch, self.hidden_size, directions, itemsize, self.precision
        return Shape.of(CELLS[self.cell], *others)._replace(
            marked=self.is_marked,
            noisy=self.has("noisy"),
            staged=self.is_involved,
            projected=self.has("projected"),
        )

    def of(self, config: Config) -> Variant:
        """Return the variant with another configuration."""
        return Variant(*self[:6], *config[:6])

    def launches(self, config: Config) -> list[Variant]:
        """Return the variants of a configuration: for a staged one, each launch of a step."""
        if config.schedule != "staged":
            return [self.of(config)]
        cell, projected = CELLS[self.cell], self.has("projected")
        has_late = cell.late is not None
        there = {"late": has_late, "project": projected, "through": has_late or projected}
        found = []
        for name in LAUNCHES[self.is_backward]:
            if there.get(name, True):
                of_launch = config
                if name == "cell":
                    rows, units, num_warps = launch_staged.row_tile(cell, self.hidden_size)
                    of_launch = Config("staged", rows, units, 0, num_warps, 0, 1)
                found.append(self._replace(run=f"{self.run} {name}").of(of_launch))
        return found


def problem(
    cell: str, run: str, dtype: str, precision: str, hidden_size: int, device: str
) -> Variant:
    """Make a variant that has no configuration yet.

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
    """Compile the kernel of a launch with the types, constants and options of a real launch.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    triton.compiler.CompiledKernel
    """
    kernel, arguments = launched(variant)[variant.launch]
    target = GPUTarget("cuda", variant.gpu.capability, 32)
    if variant.gpu.target == "hip":
        target = GPUTarget("hip", f"gfx{variant.gpu.capability}", 64)
        arguments.pop("maxnreg", None)
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def kind(value: Any, path: tuple[int, ...], is_constant: bool) -> Any:
        """Return the type of an argument, or of the part of a tuple found by `path`."""
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


def launched(variant: Variant) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the kernels that a layer launches, and their arguments, on meta tensors.

    Parameters
    ----------
    variant : Variant

    Returns
    -------
    dict of str to (triton.JITFunction, dict of str to object)
        Keyed by `Variant.launch`; of the last step.
    """
    launches: dict[str, tuple[Any, dict[str, Any]]] = {}

    def record(kernel: Any, grid: Any) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            name = kernel.__name__.removesuffix("_kernel")
            if name in ("forward", "backward"):
                name = "cell"
            elif name == "recurrent" and arguments["LATE"]:
                name = "late"
            launches[name] = kernel, arguments

        return launch

    with mock.patch.object(KernelInterface, "__getitem__", record):
        (_launch_involved if variant.is_involved else _launch)(variant)
    return launches


def _tensor(variant: Variant, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype or DTYPES[variant.dtype], device="meta")


_STEPS = 2


def _operands(variant: Variant) -> dict[str, Any]:
    """Make the operands common to all schedules."""
    cell, hidden, batch = CELLS[variant.cell], variant.hidden_size, variant.block_b
    of_step = 1, _STEPS, batch
    widths = [variant.size_h, *[hidden] * (cell.n_states - 1)]
    states = [_tensor(variant, 1, batch, width) for width in widths]
    zones = [_tensor(variant, *of_step, width, dtype=torch.uint8) for width in widths]
    return {
        "r": _tensor(variant, 1, cell.n_gates * hidden, variant.size_h),
        "b": _tensor(variant, 1, cell.n_gates * hidden),
        "extra": _tensor(variant, 1, cell.n_extra * hidden) if cell.n_extra else None,
        "initial": states,
        "marks": _tensor(variant, *of_step, dtype=torch.uint8) if variant.is_marked else None,
        "fresh": states if variant.has("fresh") else (),
        "drop": states[0] if variant.has("noisy") else None,
        "zones": zones if variant.has("noisy") else (),
    }


def _launch(variant: Variant) -> None:
    """Launch a plain layer with everything that a call would pass to its kernels."""
    cell, hidden, batch = CELLS[variant.cell], variant.hidden_size, variant.block_b
    y = _tensor(variant, _STEPS, batch, hidden)
    gates = _tensor(variant, 1, _STEPS, batch, cell.n_gates * hidden)
    fresh_rh = gates[:, 0] if variant.has("fresh") else None
    operands = launch.Operands(**_operands(variant), fresh_rh=fresh_rh)
    layer = cell, variant.config, variant.precision
    again = variant.has("recompute", "noisy")  # with zoneout, activations are not saved
    if variant.is_backward:
        saved = _tensor(variant, 1, _STEPS, batch, cell.n_saved * hidden)
        traces = [y.new_empty(y.shape, dtype=torch.float32)] * (cell.n_states - 1)
        past = launch.Past(y, traces, (gates, gates) if again else (saved,))
        d_traces = [y] * (cell.n_states - 1) if variant.has("fresh") else []
        launch.backward(*layer, operands, past, (y, operands.initial, d_traces))
    else:
        is_training = variant.has("training")
        save = is_training and not again
        launch.forward(*layer, gates, operands, traced=is_training, save=save)


def _launch_involved(variant: Variant) -> None:
    """Launch a layer whose step is more than a product and arithmetic on single units."""
    cell, hidden, batch = CELLS[variant.cell], variant.hidden_size, variant.block_b
    wx = _tensor(variant, 1, _STEPS, batch, cell.n_gates * hidden)
    w_hr = _tensor(variant, 1, variant.size_h, hidden) if variant.has("projected") else None
    operands = launch_staged.Operands(**_operands(variant), w_hr=w_hr, n_ahead=1)
    layer = cell, variant.config, variant.precision
    if variant.is_backward:
        past = launch_staged.Past.empty(cell, wx, variant.size_h)
        # In the dtype of y, like gradients of the traces.
        others = past.afters[:1] * (cell.n_states - 1) if variant.has("fresh") else []
        launch_staged.backward(*layer, operands, past, (past.befores[0], operands.initial, others))
    else:
        launch_staged.forward(*layer, wx, operands, traced=variant.has("fresh"), save=True)


def resources(cubin: bytes) -> tuple[int, int]:
    """Read the registers and bytes of stack per thread from a cubin.

    These kernels use the stack for spills only.

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
    """Simulate a step of a compiled variant; for a stepwise one, a launch.

    Parameters
    ----------
    variant : Variant
        For one of `step_time.DEVICES`.
    compiled : triton.compiler.CompiledKernel

    Returns
    -------
    alone, full : step_time.Step
        With one group of programs alone on the GPU, and with such programs on all multiprocessors,
        which share the L2 bandwidth.
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
    """Return how many iterations of the longest loop ptxas unrolled into one, by its products.

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
        Defined at module level.
    items : sequence
    jobs : int

    Yields
    ------
    object
        The function's results, in the order of `items`.
    """
    # Forking a process with threads, as torch has, may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        yield from pool.map(function, items)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Replace a table atomically, so that an interruption loses nothing.

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
    """Read the rows of a table, if it exists, keyed by their first fields.

    Parameters
    ----------
    path : pathlib.Path
    n_key : int
        How many fields form the key.

    Returns
    -------
    dict of tuple of str to list of str
    """
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return {tuple(row[:n_key]): row for row in rows}
