"""The CPU kernels with threads, processes and cached files."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import fastrnn
from fastrnn.__main__ import main
from fastrnn.cells import CELLS
from fastrnn.cpu import machine
from fastrnn.planner import use_path

pytest.importorskip("llvmlite")
if machine.target() is None:
    pytest.skip("no kernels for this CPU", allow_module_level=True)

from fastrnn.cpu import engine, memory

ROOT = Path(__file__).resolve().parent.parent
can_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def module_and_input(hidden: int = 256) -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    return fastrnn.GRU(40, hidden), torch.randn(30, 4, 40)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_number_of_threads(monkeypatch, two_threads):
    monkeypatch.setattr(machine, "cores", lambda: 16)
    assert engine.threads(10**9, 16) == 2
    assert engine.threads(10**9, 1) == 1, "more threads than parts would have nothing to do"
    assert engine.threads(10**3, 16) == 1, "too little for a barrier after each step"
    torch.set_num_threads(1)
    assert engine.threads(10**9, 16) == 1
    torch.set_num_threads(2)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert engine.threads(10**9, 16) == 1, "more threads than CPUs would wait for each other"
    monkeypatch.setattr(machine, "cores", lambda: 16)
    monkeypatch.setattr(engine, "openmp", lambda: None)
    assert engine.threads(10**9, 16) == 1


def test_without_an_openmp_runtime(monkeypatch):
    model, x = module_and_input()
    with torch.no_grad():
        expected, _ = model(x)
        monkeypatch.setattr(engine, "openmp", lambda: None)
        monkeypatch.setattr(engine, "_loaded", {})
        assert torch.equal(model(x)[0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_threads_may_call_the_same_module(two_threads, training):
    model, x = module_and_input()

    def call(_: int) -> list[torch.Tensor]:
        with torch.set_grad_enabled(training):
            mine = x.clone().requires_grad_(training)
            y, h = model(mine)
            if not training:
                return [y, h]
            return [y, *torch.autograd.grad(y.sum(), [mine, *model.parameters()])]

    expected = call(0)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for results in pool.map(call, range(40)):
            for a, b in zip(results, expected, strict=True):
                torch.testing.assert_close(a, b)


def test_work_space_is_kept_within_limits(monkeypatch):
    torch.use_deterministic_algorithms(False)
    model, x = module_and_input(64)
    with torch.inference_mode():
        expected = model(x)[0].clone()
        kept = memory._kept.work
        assert 0 < kept.nbytes <= memory._MOST
        assert torch.equal(model(x)[0], expected)
    y, _ = model(x)  # work space kept in inference mode is reused outside it
    y.sum().backward()
    assert memory._kept.work is kept
    assert torch.equal(y, expected)
    gradients = memory._kept.gradients
    assert gradients.numel()
    monkeypatch.setattr(memory, "_MOST", 0)
    large, x = module_and_input(256)
    large(x)[0].sum().backward()
    assert memory._kept.work is kept
    assert memory._kept.gradients is gradients


def test_more_threads_than_cores(monkeypatch, two_threads):
    """More OpenMP threads than cores, in each of several Python threads."""
    monkeypatch.setattr(engine, "threads", lambda *sizes: 8)
    model, x = module_and_input()
    with torch.no_grad():
        expected, _ = model(x)
    failures = []

    def work() -> None:
        with torch.no_grad():
            if not all(torch.equal(model(x)[0], expected) for _ in range(3)):
                failures.append(threading.get_ident())

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=240)
        assert not worker.is_alive(), "deadlock"
    assert not failures


@can_fork
def test_forked_processes(two_threads):
    """The threads of the pool do not survive a fork, and the OpenMP runtime does not notice."""
    model, x = module_and_input()
    y, _ = model(x)  # starts the pool
    y.sum().backward()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        # torch would fill memory in parallel and wait for threads that do not exist.
        torch.utils.deterministic.fill_uninitialized_memory = False
        with torch.no_grad():
            queue.put((engine.threads(10**9, 16), model(x)[0].sum().item()))

    children = [context.Process(target=child, daemon=True) for _ in range(3)]
    for process in children:
        process.start()
    for process in children:
        process.join(timeout=60)
        assert process.exitcode == 0
    results = [queue.get() for _ in children]
    assert all(count == 1 for count, _ in results)
    assert {total for _, total in results} == {y.sum().item()}


@can_fork
def test_forked_before_our_first_call(two_threads):
    """torch alone may have started the pool."""
    code = (
        "import os, torch, fastrnn\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(500, 500) @ torch.randn(500, 500)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    with torch.no_grad(): fastrnn.GRU(40, 256)(torch.randn(30, 4, 40))\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    assert python(code).stdout == "0\n"


FORK = """
import os, signal, sys, threading, torch, fastrnn
from fastrnn.cpu import machine
from fastrnn.planner import use_path

torch.manual_seed(0)
torch.set_num_threads(1)
gru, x = fastrnn.GRU(5, 9), torch.randn(7, 3, 5)
with use_path("torch"):
    expected, _ = gru(x)
busy, forked = threading.Event(), threading.Event()
longest = 1

def linger():
    if not busy.is_set():
        busy.set()
        forked.wait(longest)

{other}
busy.wait()
child = os.fork()
forked.set()
if child == 0:
    child = os.fork()  # and a child of the child
    status = 1
    try:
        signal.alarm(30)
        with use_path("kernels"):
            y, _ = gru(x)
        y.sum().backward()
        torch.testing.assert_close(y, expected)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) if child else 0
        print(machine.kernel_gap(torch.float32), flush=True)
    finally:
        os._exit(status != 0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

IMPORTING = """
class Finder:
    def find_spec(name, *others):
        if name == "llvmlite.binding.module":
            linger()

sys.meta_path.insert(0, Finder)
threading.Thread(target=machine._has_compiler).start()
"""

COMPILING = """
import llvmlite.binding as llvm
from fastrnn.cells import CELLS
from fastrnn.cpu import engine
llvm.ffi.register_lock_callback(linger, lambda: None)
threading.Thread(target=lambda: engine.kernels(CELLS["gru"])).start()
"""

ANOTHER_LIBRARY = """
import llvmlite.binding as llvm
llvm.ffi.register_lock_callback(linger, lambda: None)
threading.Thread(target=llvm.get_process_triple).start()
"""

CUT_OFF = "this process was forked while another thread was compiling kernels"


@pytest.mark.long
@can_fork
@pytest.mark.parametrize(
    ("other", "gap"),
    [
        (IMPORTING, "None"),
        (COMPILING, "None"),
        ("machine._MAX_WAIT, longest = 0.1, 60" + COMPILING, CUT_OFF),
        ("longest = 60" + ANOTHER_LIBRARY, CUT_OFF),
        ("machine.compiling.acquire(); busy.set()", "None"),
    ],
    ids=["importing", "compiling", "compiling for long", "another library", "same thread"],
)
def test_forked_while_a_thread_compiles(other, gap):
    """The locks it holds stay locked in the child."""
    done = python(FORK.format(other=other))
    assert done.stdout.splitlines() == [gap, gap, "0"], done.stderr


class Encoded(Dataset):
    """Run a layer for every item, like an encoder in front of a model."""

    def __init__(self) -> None:
        self.model, self.x = module_and_input()

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model(self.x + index)[0]


@can_fork
def test_workers_of_a_data_loader(two_threads):
    data = Encoded()
    expected = torch.stack([data[k] for k in range(4)])
    loaded = list(DataLoader(data, batch_size=None, num_workers=2, timeout=120))
    torch.testing.assert_close(torch.stack(loaded), expected)


# The cache of compiled kernels.

RUN = """
import sys, torch, fastrnn
from fastrnn.planner import use_path
torch.manual_seed(0)
gru, x = fastrnn.GRU(5, 9), torch.randn(7, 3, 5)
with use_path("kernels"):
    y, _ = gru(x)
y.sum().backward()
print(round(y.sum().item(), 4), round(gru.weight_hh_l0.grad.sum().item(), 4))
"""


def test_first_use_is_visible_and_later_uses_are_not(tmp_path):
    first = python(RUN, FASTRNN_CACHE_DIR=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "compiling the gru kernels" in first.stderr
    assert "compiled the gru kernels for float32 in" in first.stderr
    assert len(list(tmp_path.iterdir())) == 1
    second = python(RUN, FASTRNN_CACHE_DIR=str(tmp_path))
    assert second.stdout == first.stdout
    assert "compil" not in second.stderr


@pytest.mark.long
def test_many_processes_at_first_use(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        runs = list(pool.map(lambda _: python(RUN, FASTRNN_CACHE_DIR=str(tmp_path)), range(6)))
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert len({run.stdout for run in runs}) == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".o"], "a file was left behind"


@pytest.mark.long
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_compiled_again(tmp_path, damage):
    first = python(RUN, FASTRNN_CACHE_DIR=str(tmp_path))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = {"cut": whole[:-100], "empty": b"", "flipped": whole[:-50] + b"\x90" + whole[-49:]}
    path.write_bytes(broken[damage])
    again = python(RUN, FASTRNN_CACHE_DIR=str(tmp_path))
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "compiling" in again.stderr
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    done = python(RUN, FASTRNN_CACHE_DIR=str(file / "below"))
    assert done.returncode == 0, done.stderr
    assert "cannot save compiled kernels" in done.stderr


def test_a_user_without_a_home(monkeypatch, caplog):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("FASTRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(engine, "_loaded", {})
    model, x = module_and_input(16)
    model(x)
    assert "Could not determine home directory" in caplog.text


def test_a_folder_of_nobody(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("FASTRNN_CACHE_DIR", "~no-such-user/kernels")
    monkeypatch.setattr(engine, "_loaded", {})
    monkeypatch.chdir(tmp_path)
    model, x = module_and_input(16)
    model(x)
    assert "cannot save compiled kernels: Could not determine home directory" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_file_depends_on_all_sources(monkeypatch):
    """Otherwise another version could call code that expects different arguments."""
    target = machine.target()
    before = engine._cached(CELLS["gru"], target, False)
    assert engine._cached(CELLS["lstm"], target, False) != before
    assert engine._cached(CELLS["gru"], machine.NEON, False) != before
    assert engine._cached(CELLS["gru"], target, True) != before
    read = Path.read_bytes
    here = Path(engine.__file__).parent
    for source in here.glob("*.py"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda p, source=source: read(p) + b"#" * (p == source)
        )
        assert engine._cached(CELLS["gru"], target, False) != before, source
        monkeypatch.undo()
    for most in ("MOST_STATES", "MOST_SAVED"):  # which another cell may raise
        monkeypatch.setattr(engine, most, 9)
        assert engine._cached(CELLS["gru"], target, False) != before, most
        monkeypatch.undo()
    tanh, relu = (CELLS[name]._replace(name="mine") for name in ("rnn_tanh", "rnn_relu"))
    names = [engine._cached(cell, target, False) for cell in (tanh, relu)]
    assert names[0] != names[1], "functions of one file"
    for name in ("gru_reset_before", "layernorm_lstm"):  # optional records of a cell
        cell = CELLS[name]
        other = cell._replace(late=None, output=None)
        assert engine._cached(cell, target, False) != engine._cached(other, target, False)


def test_cells_of_the_same_name(monkeypatch):
    """Cached results belong to the functions and facts of a cell, not to its name."""
    x, weights = torch.randn(5, 2, 3), [torch.randn(4, 3), torch.randn(4, 4)]
    for like in ("rnn_tanh", "rnn_relu", "rnn_tanh"):
        monkeypatch.setitem(CELLS, "mine", CELLS[like]._replace(name="mine"))
        results = []
        for path in ("kernels", "reference"):
            with use_path(path):
                results.append(fastrnn.functional.sequence("mine", x, None, weights)[0])
        torch.testing.assert_close(*results)
    monkeypatch.setitem(CELLS, "mine", CELLS["gru"]._replace(name="mine"))
    with pytest.raises(ValueError, match="do not make whole mine layers"):
        fastrnn.functional.sequence("mine", x, None, weights)


@pytest.mark.long
def test_warmup(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "_loaded", {})
    assert main(["warmup", "--cells", "gru", "lstm"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path) in out
    assert "gru" in out
    assert "rnn_tanh" not in out
    assert len(list(tmp_path.iterdir())) == 2
    assert main(["warmup", "--cells", "gru", "--dtype", "fp32", "fp64", "fp16"]) == 0
    assert "float64" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3


def test_warmup_where_there_is_nothing_to_compile(capsys, monkeypatch):
    monkeypatch.setattr(machine, "target", lambda: None)
    assert main(["warmup"]) == 1
    assert "fastrnn has no kernels for CPU capability" in capsys.readouterr().out


@pytest.mark.sweep(2)
@pytest.mark.parametrize("module", ["llvmlite", "llvmlite.binding"])
def test_without_llvmlite(module):
    """torch's operators take over, and the planner says why."""
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from fastrnn.__main__ import main\n"
        "main(['plan', '--cell', 'gru', '--H', '64'])\n" + RUN
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    plan, _, *results = done.stdout.splitlines()
    assert plan.startswith("torch: ")
    assert "fastrnn's kernels need llvmlite" in plan
    assert results == python(RUN).stdout.splitlines()


def test_compiling_logs_to_the_library_s_logger(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(engine, "_loaded", {})
    with caplog.at_level(logging.WARNING, logger="fastrnn"):
        engine.kernels(CELLS["rnn_relu"])
        engine.kernels(CELLS["rnn_relu"])
    assert len(caplog.records) == 2


# Weights are packed again in every call.


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.weight_hh_l0.data.mul_(0.5),
        lambda model: model.weight_ih_l0.detach().add_(0.25),
        lambda model: model.bias_hh_l0.data.copy_(torch.ones_like(model.bias_hh_l0)),
        lambda model: setattr(model.weight_hh_l0, "data", torch.zeros_like(model.weight_hh_l0)),
        lambda model: model.weight_hh_l0.numpy(force=True).fill(0.125),
    ],
    ids=["data", "detached", "copied", "replaced", "numpy"],
)
def test_changes_that_no_version_counter_sees(name, change):
    model = getattr(fastrnn, name)(6, 10)
    x = torch.randn(12, 2, 6)
    with torch.no_grad(), use_path("kernels"):
        before = model(x)[0]
        change(model)
        after = model(x)[0]
        assert not torch.equal(before, after)
        with use_path("torch"):
            torch.testing.assert_close(after, model(x)[0])
