"""``fastrnn info``: what fastrnn can do on this machine, and what a bug report needs.

`info` collects everything in one record, printed as JSON or by `info_text`. The keys of the JSON
are the fields below, which keep their names and meanings as long as `Info.schema` does not change.
Collecting compiles and writes nothing, and needs neither a GPU nor triton, llvmlite, a cache or a
home directory. Reports are public, so the user's home directory is replaced by ``~`` throughout.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import platform
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache, cpu, crossover, devices, hardware, planner, tuned
from ._arguments import DTYPES
from ._version import __version__
from .bench import environment
from .cpu import machine
from .kernels import configs
from .problem import Problem

_log = logging.getLogger("fastrnn")


class Versions(NamedTuple):
    """Installed versions; None for what is not installed.

    Attributes
    ----------
    fastrnn : str
    commit : str or None
        Short hash, if fastrnn runs from a checkout.
    modified : bool
        Whether the checkout has uncommitted changes.
    python, system : str
    torch : str
    cuda, hip, cudnn : str or None
        The CUDA or HIP that torch was built for, and the cuDNN that it loads.
    triton, llvmlite, llvm : str or None
    blas, onednn : str or None
        torch's libraries for matrix products and layers on a CPU.
    """

    fastrnn: str
    commit: str | None
    modified: bool
    python: str
    system: str
    torch: str
    cuda: str | None
    hip: str | None
    cudnn: str | None
    triton: str | None
    llvmlite: str | None
    llvm: str | None
    blas: str | None
    onednn: str | None


class Cpu(NamedTuple):
    """The CPU, and how torch and the kernels use it.

    Attributes
    ----------
    name, family : str
    instructions : str
        Instruction set that the kernels use, or torch if there are no kernels.
    lanes : int or None
        float32 elements per vector in the kernels; None if there are none for this CPU.
    caches : list of int
        Sizes of one core's data caches in bytes, from level 1 up; empty if unknown.
    cores : int
        Number of CPUs that this process may use.
    threads, interop_threads : int
        torch's intra-op and inter-op threads.
    openmp : str or None
        Path of the OpenMP runtime that torch loaded.
    openmp_gap : str or None
        Why the kernels cannot use that runtime, and run on one thread; None if they can.
    narrow_blas : list of str
        Dtypes in which torch's matrix products leave part of each vector unused, so that
        the kernels compute those products too.
    onednn : bool
        Whether torch may use oneDNN.
    onednn_half : list of str
        Half-precision dtypes for which oneDNN has fast products on this CPU.
    """

    name: str
    family: str
    instructions: str
    lanes: int | None
    caches: tuple[int, ...]
    cores: int
    threads: int
    interop_threads: int
    openmp: str | None
    openmp_gap: str | None
    narrow_blas: tuple[str, ...]
    onednn: bool
    onednn_half: tuple[str, ...]


class Format(NamedTuple):
    """The kernels of a GPU in one dtype.

    Attributes
    ----------
    dtype : str
    precision : str or None
        How float32 products are computed under torch's settings; None for other dtypes.
    gap : str or None
        Why there are no kernels; None if there are.
    schedules : dict of str to (str or None)
        For each schedule, why no layer can use it; None if some can.
    """

    dtype: str
    precision: str | None
    gap: str | None
    schedules: dict[str, str | None]


class Gpu(NamedTuple):
    """A GPU, and what the planner knows about it.

    Attributes
    ----------
    number : int
        N in torch's ``cuda:N``.
    name : str
    capability : str
        Compute capability, or the architecture of an AMD GPU.
    memory : int
        Bytes.
    processors : int
        Streaming multiprocessors or compute units.
    driver : str
    alike : list of str
        Names for ``fastrnn plan --device`` with the same architecture and number of processors.
    simulated : bool
        Whether the planner has simulated step times for this architecture.
    formats : list of Format
    """

    number: int
    name: str
    capability: str
    memory: int
    processors: int
    driver: str
    alike: tuple[str, ...]
    simulated: bool
    formats: tuple[Format, ...]


class Triton(NamedTuple):
    """The state of Triton.

    Attributes
    ----------
    gap : str or None
        Why it cannot be imported; None if it can.
    interpreter : bool
        Whether kernels run in its interpreter.
    cache : str or None
        Folder of its compiled kernels, if it can be imported.
    compiler : str or None
        The C compiler that builds its launchers.
    """

    gap: str | None
    interpreter: bool
    cache: str | None
    compiler: str | None


class Cache(NamedTuple):
    """The folder in which fastrnn keeps compiled kernels and tables.

    Attributes
    ----------
    folder : str or None
        None if there is no home directory for it.
    source : str
        The environment variable that sets the folder, or 'home'.
    exists : bool
    kernels, tables, bytes : int
        Number of files of each kind, and the total size of all files.
    read_gap : str or None
        Why no file is read from the folder; None if files are read.
    refused : list of str
        Why individual files are not read.
    write_gap : str or None
        Why nothing can be written to the folder; None if files can.
    """

    folder: str | None
    source: str
    exists: bool
    kernels: int
    tables: int
    bytes: int
    read_gap: str | None
    refused: tuple[str, ...]
    write_gap: str | None


class TableInForce(NamedTuple):
    """What decides between torch's and fastrnn's paths on a device.

    Attributes
    ----------
    device : str
    machine : str
        The device as named in tables.
    source : str
        The table in use and its date, or 'model'.
    date, torch, fastrnn : str or None
        When and with which versions it was measured; None for a model.
    """

    device: str
    machine: str
    source: str
    date: str | None
    torch: str | None
    fastrnn: str | None


class PathState(NamedTuple):
    """Whether one of the planner's paths is available on a device.

    Attributes
    ----------
    path : str
        One of ``planner.PATHS``.
    device : str
        'cpu', 'cuda' if there is no GPU, 'cuda:0' and so on, or 'any'.
    dtype : str
        Or 'any'.
    how : str or None
        What runs on the path, if it is available.
    gap : str or None
        Why it is unavailable; None if it is available.
    remedy : str or None
        What would make it available, if anything.
    """

    path: str
    device: str
    dtype: str
    how: str | None
    gap: str | None
    remedy: str | None


class Info(NamedTuple):
    """Everything that ``fastrnn info`` prints.

    Attributes
    ----------
    schema : int
        Version of this set of fields; it changes when the name or meaning of a field does.
    versions : Versions
    cpu : Cpu
    gpus : list of Gpu
    gpu_gap : str or None
        Why there are no GPUs; None if there are.
    triton : Triton
    cache : Cache
    tables : list of TableInForce
    paths : list of PathState
    settings : dict of str to (str or bool or int)
        torch settings that affect what runs or how accurate it is.
    environment : dict of str to str
        Environment variables with such effects, if they are set.
    warnings : list of str
        Warnings from fastrnn and torch while this was collected.
    """

    schema: int
    versions: Versions
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    gpu_gap: str | None
    triton: Triton
    cache: Cache
    tables: tuple[TableInForce, ...]
    paths: tuple[PathState, ...]
    settings: dict[str, Any]
    environment: dict[str, str]
    warnings: tuple[str, ...]


def info() -> Info:
    """Collect all information about this process and its machine.

    Returns
    -------
    Info

    Examples
    --------
    >>> from fastrnn.info import info
    >>> {path.path for path in info().paths if path.device == "any"} == {"operators", "reference"}
    True
    """
    with _collected() as warned:
        gpu_gap, remedy = _gpu_gap()
        compiler_gap = _compiler_gap()
        triton, version = _triton()
        gpus: tuple[Gpu, ...] = ()
        if gpu_gap is None:
            try:
                gpus = _gpus()
            except RuntimeError as error:  # from CUDA, for instance for a device in exclusive use
                gpu_gap = f"torch cannot use the GPU: {str(error).partition(chr(10))[0]}"
        found = Info(
            1,
            _versions(version),
            _cpu(),
            gpus,
            gpu_gap,
            triton,
            _cache(),
            tuple(_tables(gpus)),
            _paths([*_cpu_paths(compiler_gap), *_gpu_paths(gpus, gpu_gap, remedy, triton)]),
            _settings(),
            {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            (),
        )
    return _without_home(found._replace(warnings=tuple(dict.fromkeys(warned))))


def as_json(value: Any) -> Any:
    """Convert a record to types that ``json.dumps`` accepts.

    Parameters
    ----------
    value : Info
        Or a part of one.

    Returns
    -------
    dict
        With a key for each field; tuples become lists.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: as_json(each) for key, each in value.items()}
    return [as_json(each) for each in value] if isinstance(value, tuple) else value


@contextlib.contextmanager
def _collected() -> Iterator[list[str]]:
    """Collect warnings instead of showing them, because they may contain the home directory."""
    messages: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        messages.append(record.getMessage())
        return False

    _log.addFilter(keep)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            yield messages
        messages += [str(each.message).partition("\n")[0] for each in caught]
    finally:
        _log.removeFilter(keep)


def _without_home(value: Any) -> Any:
    """Replace the home directory by ``~`` in all strings of a record."""
    try:
        home = Path.home()
        homes = {str(home), str(home.resolve())}
    except (OSError, RuntimeError):  # no home directory, or one in a loop of links
        return value
    names = "|".join(re.escape(each) for each in homes if len(Path(each).parts) > 1)
    whole = re.compile(rf"(?<![\w./\\-])(?:{names})(?![\w.-])") if names else None

    def replaced(value: Any) -> Any:
        if isinstance(value, str) and whole is not None:
            return whole.sub("~", value)
        if isinstance(value, dict):
            return {key: replaced(each) for key, each in value.items()}
        if isinstance(value, tuple):
            each = map(replaced, value)
            return type(value)(*each) if hasattr(value, "_asdict") else tuple(each)
        return value

    return replaced(value)


# Collecting the facts.

ENVIRONMENT = (
    "FASTRNN_CACHE_DIR", "XDG_CACHE_HOME",
    "TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET", "TRITON_PTXAS_PATH", "CC",
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT", "KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS",
    "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "LD_PRELOAD",
)  # fmt: skip


def _import_gap(name: str) -> str | None:
    """Import a module; return why that fails, or None if it succeeds."""
    package = name.partition(".")[0]
    try:
        importlib.import_module(package)
        importlib.import_module(name)
    except Exception as error:  # a broken installation may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"{package} is not installed"
        text = str(error).strip().partition("\n")[0]
        return f"{package} cannot be imported: {type(error).__name__}: {text}"
    return None


def _compiler_gap() -> str | None:
    with machine.compiling:
        return _import_gap("llvmlite.binding")


def _versions(triton: str | None) -> Versions:
    commit, modified = environment.checkout()
    config = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version ([\d.]+)", config)
    blas = re.search(r"BLAS_INFO=(\w+)", config)
    onednn = re.search(r"MKL-DNN v(\S+)", config)
    return Versions(
        __version__,
        None if commit == "unknown" else commit,
        modified,
        platform.python_version(),
        platform.platform(),
        torch.__version__,
        torch.version.cuda,
        torch.version.hip,
        _cudnn(),
        triton,
        _none(environment.version("llvmlite")),
        _llvm(),
        f"MKL {mkl[1]}" if mkl else blas[1] if blas else None,
        onednn[1] if onednn else None,
    )


def _none(version: str) -> str | None:
    return None if version == "none" else version


def _cudnn() -> str | None:
    try:
        version = torch.backends.cudnn.version()
    except RuntimeError as error:  # a version that torch cannot use
        return str(error).partition("\n")[0]
    return None if version is None else str(version)


def _llvm() -> str | None:
    if _compiler_gap() is not None:
        return None
    binding = importlib.import_module("llvmlite.binding")
    return ".".join(map(str, binding.llvm_version_info))


def _cpu() -> Cpu:
    here, target = hardware.cpu(), machine.target()
    floats = (torch.float32, torch.float64)
    return Cpu(
        here.name,
        here.family,
        here.vectors,
        None if target is None else target.lanes,
        here.caches,
        machine.cores(),
        torch.get_num_threads(),
        torch.get_num_interop_threads(),
        machine.openmp_library() or None,
        machine.openmp_gap(),
        tuple(_name(dtype) for dtype in floats if machine.has_narrow_blas(dtype)),
        torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled),
        tuple(_name(dtype) for dtype in _HALVES if crossover.multiplies(dtype)),
    )


_HALVES = (torch.bfloat16, torch.float16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton() -> tuple[Triton, str | None]:
    """Return the state of Triton, and its version."""
    version = _none(environment.version("triton"))
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    gap = _import_gap("triton")
    if gap is not None:
        return Triton(gap, False, None, compiler), version
    triton = importlib.import_module("triton")
    # The packages for AMD GPUs have other names.
    version = version or getattr(triton, "__version__", None)
    knobs = getattr(triton, "knobs", None)
    try:
        folder = str(knobs.cache.dir) if knobs else None
    except (OSError, RuntimeError):
        folder = None
    interpreter = bool(knobs and knobs.runtime.interpret)
    return Triton(None, interpreter, folder, compiler), version


def _gpu_gap() -> tuple[str | None, str | None]:
    """Return why torch has no GPU, and what may fix that."""
    if torch.cuda.is_available():
        return None, None
    if torch.version.cuda is None and torch.version.hip is None:
        where = "https://pytorch.org/get-started/locally"
        remedy = f"if there is a GPU, install a build of torch that supports it, see {where}"
        return "this build of torch is CPU-only", remedy
    return (
        "torch finds no GPU",
        "if there is one, check its driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
    )


def _gpus() -> tuple[Gpu, ...]:
    driver = environment.driver() if torch.version.hip is None else "unknown"
    return tuple(_gpu(number, driver) for number in range(torch.cuda.device_count()))


def _gpu(number: int, driver: str) -> Gpu:
    facts, known = torch.cuda.get_device_properties(number), devices.gpu(number)
    capability = f"{facts.major}.{facts.minor}"
    if torch.version.hip is not None:
        capability = facts.gcnArchName
    return Gpu(
        number,
        facts.name,
        capability,
        facts.total_memory,
        facts.multi_processor_count,
        driver,
        tuple(name for name, of in configs.DEVICES.items() if known and of[1:4] == known[1:4]),
        known is not None and _is_simulated(known),
        tuple(_format(name, dtype, known) for name, dtype in DTYPES.items()) if known else (),
    )


def _problem(dtype: torch.dtype, device: configs.Device) -> Problem:
    precision = devices.float32_precision() if dtype == torch.float32 else "tf32"
    return Problem(
        "lstm", 64, 8, 128, 128, dtype, "cuda", True, gpu=device, precision=precision
    )  # fmt: skip


def _is_simulated(device: configs.Device) -> bool:
    problem = _problem(torch.bfloat16, device)
    if devices.kernel_gap(problem):
        return False
    return not any(math.isnan(choice.step_us) for choice in devices.choose_kernels(problem))


def _format(name: str, dtype: torch.dtype, device: configs.Device) -> Format:
    problem = _problem(dtype, device)
    precision = problem.precision if dtype == torch.float32 else None
    gap = devices.kernel_gap(problem)
    return Format(name, precision, gap, {} if gap else devices.schedule_gaps(problem))


def _cache() -> Cache:
    source = cache.folder_source()
    try:
        folder = cache.cache_folder()
    except OSError as error:
        gap = str(error)
        return Cache(None, source, False, 0, 0, 0, gap, (), gap)
    read_gap = cache.read_gap(folder)
    files = _files(folder)
    gaps = [] if read_gap else [cache.read_gap(folder, name) for name in files]
    return Cache(
        str(folder),
        source,
        os.path.isdir(folder),
        sum(name.endswith(".o") for name in files),
        sum(name.endswith(".csv") for name in files),
        sum(files.values()),
        read_gap,
        tuple(gap for gap in gaps if gap),
        cache.write_gap(folder),
    )


def _files(folder: Path) -> dict[str, int]:
    """Return the sizes of a folder's entries by name; empty if it cannot be listed."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries}
    except OSError:
        return {}
    return dict(sorted(found.items()))


def _tables(gpus: Iterable[Gpu]) -> Iterator[TableInForce]:
    known = ((f"cuda:{gpu.number}", devices.gpu(gpu.number)) for gpu in gpus)
    found = [(name, hardware.gpu(device)) for name, device in known if device]
    for name, here in [("cpu", hardware.cpu()), *found]:
        table = tuned.table_of(here)
        made = (table.date, table.torch, table.fastrnn) if table else (None, None, None)
        yield TableInForce(name, str(here), tuned.source(here), *made)


def _paths(found: Iterable[PathState]) -> tuple[PathState, ...]:
    """Sort paths in the planner's order."""
    return tuple(sorted(found, key=lambda state: planner.PATHS.index(state.path)))


def _cpu_paths(compiler_gap: str | None) -> Iterator[PathState]:
    is_fused = torch.backends.mkldnn.is_available()
    theirs = "oneDNN for LSTMs, ATen" if is_fused else "ATen"
    yield PathState(planner.PATHS[0], "cpu", "any", theirs, None, None)
    for name, dtype in reversed(DTYPES.items()):
        gap = cpu.kernel_gap(dtype)
        how = None if gap else cpu.describe()
        if how and not machine.multiplies(dtype):
            how += f", computed in {_name(machine.exact_dtype(dtype))}"
        remedy = None if gap is None else _cpu_remedy(compiler_gap)
        yield PathState("kernels", "cpu", name, how, gap, remedy)
    yield PathState("operators", "any", "any", "a loop of torch operators", None, None)
    yield PathState("reference", "any", "any", "a differentiable loop of cells", None, None)


def _cpu_remedy(compiler_gap: str | None) -> str | None:
    if compiler_gap is not None:
        is_missing = compiler_gap.endswith("is not installed")
        command = f"pip install {'' if is_missing else '--force-reinstall '}llvmlite"
        return command if is_missing else f"{command} ({compiler_gap})"
    if machine.target() is None:
        name = "ATEN_CPU_CAPABILITY"
        return f"unset {name}" if name in os.environ else None
    return None


def _gpu_paths(
    gpus: Iterable[Gpu], gap: str | None, remedy: str | None, triton: Triton
) -> Iterator[PathState]:
    if gap is not None:
        yield PathState("kernels", "cuda", "any", None, gap, remedy)
    for gpu in gpus:
        device = f"cuda:{gpu.number}"
        theirs = "MIOpen, ATen" if torch.version.hip else "cuDNN, ATen"
        yield PathState(planner.PATHS[0], device, "any", theirs, None, None)
        if triton.gap is not None:
            on_linux = platform.system() == "Linux"
            what = "pip install triton" if on_linux else None
            yield PathState("kernels", device, "any", None, triton.gap, what)
            continue
        for of in gpu.formats:
            yield PathState("kernels", device, of.dtype, _how(of, triton), of.gap, None)


def _how(format: Format, triton: Triton) -> str | None:
    if format.gap is not None:
        return None
    names = ", ".join(name for name, gap in format.schedules.items() if gap is None)
    products = f"; products in {format.precision}" if format.precision else ""
    return f"{names}{products}" + (
        "; interpreted, not compiled: unset TRITON_INTERPRET" if triton.interpreter else ""
    )


def _settings() -> dict[str, Any]:
    switches: dict[str, Callable[[], Any]] = {
        "default_dtype": lambda: _name(torch.get_default_dtype()),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled,
        "float32_matmul_precision": torch.get_float32_matmul_precision,
        "cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
        "cudnn.enabled": lambda: torch.backends.cudnn.enabled,
        "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
        "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
        "mkldnn.enabled": lambda: torch.backends.mkldnn.enabled,
        "mkldnn.deterministic": lambda: torch.backends.mkldnn.deterministic,
        "float32_precision": devices.float32_precision,
    }
    return {name: _switch(read) for name, read in switches.items()}


def _switch(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # old and new switches for TF32 were used together
        return "unknown, old and new switches are mixed"
