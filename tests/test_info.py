"""What ``fastrnn info`` says, whatever is missing, and that it leaves no trace."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_cache import UNSAFE, has_owners

from fastrnn import __main__ as command_line
from fastrnn import cache, devices, hardware, info, planner, tuned
from fastrnn.__main__ import main
from fastrnn.bench import environment
from fastrnn.cpu import machine
from fastrnn.info import Info, as_json
from fastrnn.info_text import text as text_of
from fastrnn.kernels.configs import DEVICES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """The cache's folder, which does not exist yet."""
    folder = tmp_path / "above" / "folder"
    monkeypatch.setenv("FASTRNN_CACHE_DIR", str(folder))
    tuned.forget_what_was_read()
    yield folder
    tuned.forget_what_was_read()
    cache._warn.cache_clear()  # each is given once, and other tests wait for theirs


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def on_gpu(monkeypatch):
    """Let torch find a GPU."""

    def put(device) -> None:
        facts = SimpleNamespace(
            name=f"a {device.name}",
            major=device.capability // 10,
            minor=device.capability % 10,
            total_memory=80 * 2**30,
            multi_processor_count=device.processors,
            gcnArchName="gfx942:sramecc+",
        )
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: facts)
        monkeypatch.setattr(torch.version, "hip", "6.2" if device.target == "hip" else None)
        monkeypatch.setattr(devices, "gpu", lambda _=None: device)
        monkeypatch.setattr(environment, "driver", lambda: "570.1")

    return put


def flat(text: str) -> str:
    """Text in one line: long ones are wrapped."""
    return " ".join(text.split())


def shown(found: Info) -> str:
    return flat(text_of(found))


def kernels(found: Info, device: str) -> dict[str, info.PathState]:
    """The state of the kernels on a device by dtypes."""
    return {of.dtype: of for of in found.paths if (of.path, of.device) == ("kernels", device)}


def leaves(value) -> Iterator[str]:
    """All texts in JSON but those that the printed text has in other words."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key not in ("machine", "source"):
                yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)
    elif isinstance(value, str):
        yield flat(value)


# The record, as text and as JSON.


def test_json_has_the_record(capsys):
    assert main(["info", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == as_json(info.info())
    assert list(printed) == list(Info._fields)
    assert main(["info"]) == 0
    assert capsys.readouterr().out == f"{text_of(info.info())}\n"


@pytest.mark.parametrize("name", [None, "h100", "mi300x"])
def test_text_and_json_say_the_same(folder, monkeypatch, on_gpu, name):
    if name is not None:
        on_gpu(DEVICES[name])
    cache.write(folder / "some.o", b"12345")
    (folder / "some.o").chmod(0o666)
    found = info.info()
    text = shown(found)
    missing = [leaf for leaf in leaves(as_json(found)) if leaf not in text]
    assert not missing
    assert all(len(line) <= 100 for line in text_of(found).splitlines() if "/" not in line)


def test_every_path_is_there(no_gpu):
    found = info.info()
    assert [*dict.fromkeys(of.path for of in found.paths)] == list(planner.PATHS)
    assert kernels(found, "cpu").keys() == {"float16", "bfloat16", "float32", "float64"}
    assert all((of.gap is None) != (of.how is None) for of in found.paths)
    assert all(of.gap is not None for of in found.paths if of.remedy)


def test_every_field_is_documented():
    """By name, in the table of the page on the command line."""
    page = (ROOT / "docs" / "command-line.md").read_text()
    records = [of for of in vars(info).values() if hasattr(of, "_fields")]
    named = {name for of in records if of.__module__ == info.__name__ for name in of._fields}
    assert {name for name in named if f"`{name}`" not in page} == set()


def test_issue_forms_ask_for_commands_that_exist(monkeypatch):
    ran = set()
    for name, (summary, add_arguments, _) in command_line._COMMANDS.items():
        run = (summary, add_arguments, lambda args: ran.add(args.command) or 0)
        monkeypatch.setitem(command_line._COMMANDS, name, run)
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        for command in re.findall(r"`fastrnn ([^`]*)`", flat(path.read_text())):
            name, *options = command.split()
            assert name in command_line._COMMANDS
            if options:
                main([name, *options])
    assert ran == {"plan", "verify", "bench"}


# What is missing. In a process of its own, because modules are imported once.


@pytest.mark.sweep(3)
@pytest.mark.parametrize("hidden", [["triton"], ["llvmlite"], ["triton", "llvmlite", "rich"], []])
def test_without_packages(tmp_path, hidden):
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
        "from fastrnn.__main__ import main\n"
        "status = main(['info', '--json'])\n"
        "print('and as text:')\n"
        "sys.exit(status + main(['info']))"
    )
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    hide = ("FASTRNN_CACHE_DIR", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TRITON_HOME")
    others = {name: value for name, value in os.environ.items() if name not in hide}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, timeout=300, env=others | home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {".nv"}, "only CUDA may write"
    as_json, text = done.stdout.split("and as text:")
    found = json.loads(as_json)
    assert found["cache"]["folder"] == str(Path("~", ".cache", "fastrnn"))
    assert str(tmp_path) not in done.stdout + done.stderr
    if "triton" in hidden:
        assert found["triton"]["gap"] == "triton is not installed"
        assert "triton is not installed" in text
    states = {of["dtype"]: of for of in found["paths"] if of["device"] == "cpu"}
    if "llvmlite" in hidden:
        assert found["versions"]["llvm"] is None
        assert states["float32"]["gap"] == "fastrnn's kernels need llvmlite"
        assert states["float32"]["remedy"] == "pip install llvmlite"
        assert "fix: pip install llvmlite" in text


def test_a_broken_package(monkeypatch, no_gpu):
    def broken(name):
        raise OSError("libLLVM.so: no such file\nand more")

    monkeypatch.setattr(info.importlib, "import_module", broken)
    monkeypatch.setattr(machine, "_has_compiler", lambda: False)
    found = info.info()
    says = "llvmlite cannot be imported: OSError: libLLVM.so: no such file"
    remedy = kernels(found, "cpu")["float32"].remedy
    assert remedy == f"pip install --force-reinstall llvmlite ({says})"
    assert found.triton.gap == "triton cannot be imported: OSError: libLLVM.so: no such file"


@pytest.mark.parametrize("variable", [True, False])
def test_a_cpu_without_kernels(monkeypatch, variable):
    monkeypatch.setattr(machine, "target", lambda: None)
    monkeypatch.setattr(machine, "_has_compiler", lambda: True)
    monkeypatch.setattr(info, "_compiler_gap", lambda: None)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if variable:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setattr(info, "_llvm", lambda: None)
    found = info.info()
    state = kernels(found, "cpu")["float64"]
    assert "fastrnn has no kernels for CPU capability" in state.gap
    assert state.remedy == ("unset ATEN_CPU_CAPABILITY" if variable else None)
    assert found.cpu.lanes is None
    assert "no kernels for it" in shown(found)


def test_an_openmp_runtime_that_cannot_be_used(monkeypatch):
    monkeypatch.setattr(machine, "openmp_gap", lambda: "it lacks GOMP_barrier")
    monkeypatch.setattr(machine, "target", lambda: machine.AVX2)
    found = info.info()
    assert found.cpu.openmp_gap == "it lacks GOMP_barrier"
    assert "kernels run on one thread: it lacks GOMP_barrier" in shown(found)
    assert machine.describe() == "AVX2, 8 lanes, at most 1 thread"


def test_functions_of_the_openmp_runtime(monkeypatch):
    gap = machine.openmp_gap.__wrapped__
    monkeypatch.setattr(machine, "torch_library", lambda: SimpleNamespace(GOMP_parallel=1))
    missing = ", ".join(machine.OPENMP[1:])
    assert gap() == f"torch's OpenMP runtime lacks {missing}"
    assert machine.openmp_library() == ""
    monkeypatch.setattr(machine, "torch_library", lambda: None)
    assert gap() == "torch's CPU library was not found"
    assert machine.openmp_library() == ""


# The cache.


def test_a_cache_that_does_not_exist_yet(folder):
    found = info.info().cache
    assert found == (str(folder), "FASTRNN_CACHE_DIR", False, 0, 0, 0, None, (), None)
    assert not folder.parent.exists()


def test_what_is_in_the_cache(folder, monkeypatch):
    monkeypatch.setattr(info, "_tables", lambda _: [])
    cache.write(folder / "lstm.o", b"12345")
    cache.write(folder / "gru.o", b"12345")
    cache.write(folder / "tuned.csv", b"123")
    found = info.info()
    assert found.cache[2:] == (True, 2, 1, 13, None, (), None)
    assert "2 kernels, 1 table, 13 B" in shown(found)


@has_owners
@pytest.mark.parametrize("what", UNSAFE)
def test_what_others_can_write(folder, what):
    path = folder / "file"
    cache.write(path, b"content")
    make_unsafe, message = UNSAFE[what]
    make_unsafe(path)
    found = info.info().cache
    is_file = what.startswith("file")
    (gap,) = found.refused if is_file else [found.read_gap]
    assert message.format(file="file") in gap
    assert (found.read_gap is None) == is_file
    assert cache.read(path) is None


@has_owners
def test_a_folder_that_would_be_created_where_others_can_write(folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o777)
    found = info.info()
    assert not found.cache.exists
    assert "above is writable by other users (chmod go-w)" in found.cache.read_gap
    assert "above is writable by other users (chmod go-w)" in shown(found)


@has_owners
def test_many_unsafe_files_are_counted(folder):
    for k in range(9):
        cache.write(folder / f"{k}.o", b"")
        (folder / f"{k}.o").chmod(0o777)
    found = info.info()
    assert len(found.cache.refused) == 9
    assert shown(found).count(".o is writable by other users") == 5
    assert "and 4 more" in shown(found)


def test_a_file_in_place_of_the_folder(folder):
    folder.parent.mkdir()
    folder.write_text("")
    found = info.info().cache
    assert found.write_gap == f"{folder} is not a directory"
    assert (found.exists, found.kernels) == (False, 0)
    if hasattr(os, "geteuid"):
        assert "Not a directory" in found.read_gap


@pytest.mark.parametrize(
    ("flags", "says"), [(0, "is not writable"), (1, "is on a read-only file system")]
)
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, flags, says):
    status = SimpleNamespace(f_flag=flags)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: status, raising=False)
    monkeypatch.setattr(os, "ST_RDONLY", 1, raising=False)
    found = info.info()
    assert found.cache.write_gap == f"{tmp_path} {says}"
    assert f"write no: {found.cache.write_gap}" in shown(found)


# Homes.


def test_without_a_home(monkeypatch):
    def no_home(*_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("FASTRNN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    found = info.info()
    assert found.cache.folder is None
    assert found.cache.read_gap == "Could not determine home directory."
    assert "folder none: Could not determine home directory." in shown(found)


def test_homes_are_not_told(folder, tmp_path, monkeypatch):
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", f"{tmp_path}/a.so:{tmp_path}/b.so")
    folder.parent.mkdir()
    folder.parent.chmod(0o777)
    found = info.info()
    assert str(tmp_path) not in text_of(found) + json.dumps(as_json(found))
    assert found.cache.folder == str(Path("~", "above", "folder"))
    assert found.environment["LD_PRELOAD"] == "~/a.so:~/b.so"


def test_other_paths_stay(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ann"))
    texts = ("/home/ann", "/home/anna", "/mnt/home/ann/x", "/home/ann-old/x", "'/home/ann/x'")
    expected = ("~", *texts[1:4], "'~/x'")
    assert info._without_home(({"key": texts}, 1, None)) == ({"key": expected}, 1, None)
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert info._without_home(texts) == texts


# GPUs.


@pytest.mark.parametrize("cuda", [None, "12.8"])
def test_why_there_is_no_gpu(no_gpu, monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    found = info.info()
    says = "torch finds no GPU" if cuda else "this build of torch is CPU-only"
    state = kernels(found, "cuda")["any"]
    assert found.gpu_gap == state.gap == says
    assert ("nvidia-smi" if cuda else "pytorch.org") in state.remedy
    assert found.gpus == ()


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: busy\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    monkeypatch.setattr(environment, "driver", lambda: "570.1")
    found = info.info()
    assert found.gpu_gap == "torch cannot use the GPU: CUDA error: busy"
    assert kernels(found, "cuda")["any"].gap == found.gpu_gap


def test_what_the_planner_knows_of_a_gpu(on_gpu, monkeypatch):
    monkeypatch.setattr(devices, "float32_precision", lambda: "tf32x3")
    on_gpu(DEVICES["h100"])
    found = info.info()
    (gpu,) = found.gpus
    assert gpu[:8] == (0, "a h100", "9.0", 80 * 2**30, 132, "570.1", ("h100", "h200"), True)
    closed = {of.dtype: {name for name, gap in of.schedules.items() if gap} for of in gpu.formats}
    assert closed == {
        "float16": set(),
        "bfloat16": set(),
        "float32": {"persistent"},
        "float64": {"resident", "persistent", "stepwise"},
    }
    assert kernels(found, "cuda:0")["float64"].how.startswith("staged")
    assert "80 GiB, driver 570.1" in shown(found)
    assert [of.device for of in found.tables] == ["cpu", "cuda:0"]


def test_a_gpu_of_amd(on_gpu):
    on_gpu(DEVICES["mi300x"])
    found = info.info()
    (gpu,) = found.gpus
    assert (gpu.capability, gpu.alike, gpu.simulated) == ("gfx942:sramecc+", ("mi300x",), False)
    for of in gpu.formats:
        assert of.gap is None
        assert of.schedules["persistent"] is not None
    assert "not simulated: the first kernel that fits is used" in shown(found)


def test_a_gpu_without_kernels(on_gpu):
    on_gpu(DEVICES["a100"]._replace(name="t4", capability=75, processors=40))
    found = info.info()
    (gpu,) = found.gpus
    assert (gpu.alike, gpu.simulated) == ((), False)
    assert {of.schedules == {} for of in gpu.formats} == {True}
    says = "fastrnn's kernels need compute capability 8.0 or higher, t4 has 7.5"
    assert {of.gap for of in kernels(found, "cuda:0").values()} == {says}
    assert says in shown(found)


def test_a_gpu_without_triton(on_gpu, monkeypatch):
    on_gpu(DEVICES["h100"])
    monkeypatch.setattr(devices, "gpu", lambda _=None: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(info.platform, "system", lambda: "Linux")
    found = info.info()
    state = kernels(found, "cuda:0")["any"]
    assert (state.gap, state.remedy) == ("triton is not installed", "pip install triton")
    assert "planner no kernels" in shown(found)


def test_kernels_that_are_interpreted(on_gpu, monkeypatch):
    on_gpu(DEVICES["h100"])
    monkeypatch.setattr(
        info, "_triton", lambda: (info.Triton(None, True, "~/.triton", None), "3.7.1")
    )
    found = info.info()
    assert "unset TRITON_INTERPRET" in kernels(found, "cuda:0")["bfloat16"].how
    assert "interpreter on: kernels are interpreted" in shown(found)
    assert "compiler none: Triton needs" in shown(found)


# Tables, switches, variables and warnings.


def test_the_table_in_force(monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "SHIPPED", tmp_path)
    (state,) = [of for of in info.info().tables if of.device == "cpu"]
    assert state[2:] == ("model", None, None, None)
    versions = torch.__version__, tuned.__version__
    tuned.keep(tuned.Table(hardware.cpu(), *versions, "2026-11-30", "", ()))
    (state,) = [of for of in info.info().tables if of.device == "cpu"]
    assert state[2:] == ("table measured on this machine, 2026-11-30", "2026-11-30", *versions)


def test_what_is_logged_meanwhile(capsys, no_gpu):
    cache.write(tuned.file_of(hardware.cpu()), b"nonsense")
    found = info.info()
    (warning,) = found.warnings
    assert "which is not a valid fastrnn tune table" in warning
    assert "Warnings" in text_of(found)
    assert capsys.readouterr().err == ""
    assert info.info().warnings == (), "tables are read once"


def test_variables_that_matter(monkeypatch):
    for name in info.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert info.info().environment == {}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HOSTNAME", "secret")
    found = info.info()
    assert found.environment == {"OMP_NUM_THREADS": "3"}
    assert "OMP_NUM_THREADS 3" in shown(found)


def test_switches_of_torch(monkeypatch):
    torch.use_deterministic_algorithms(True)
    assert info.info().settings["deterministic_algorithms"] is True

    def mixed():
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    found = info.info()
    assert found.settings["float32_matmul_precision"] == "unknown, old and new switches are mixed"
    assert "deterministic_algorithms = on" in shown(found)
