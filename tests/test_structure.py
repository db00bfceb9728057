"""The structure of the package: allowed imports, their cost, and documentation."""

from __future__ import annotations

import ast
import importlib.resources
import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpydoc.validate
import pytest

import fastrnn
import fastrnn.compile
import fastrnn.cpu.engine
import fastrnn.cpu.inference
import fastrnn.cpu.native
import fastrnn.info
import fastrnn.kernels.configs
import fastrnn.patch
import fastrnn.planner
import fastrnn.testing
import fastrnn.tune

ROOT = Path(__file__).resolve().parent.parent

# The only modules of ours that each file of the package may import.
ALLOWED = {
    "__init__": {
        "_version",
        "compile",
        "convert",
        "diagnose",
        "functional",
        "nn",
        "patch",
        "variant_cells",
        "variants",
    },
    "__main__": {
        "__version__",
        "_arguments",
        "bench",
        "cache",
        "cells",
        "cpu",
        "devices",
        "info",
        "info_text",
        "kernels",
        "planner",
        "testing",
        "tune",
        "tuned",
    },
    "_arguments": set(),
    "_imports": set(),
    "_version": set(),
    "autocast": {"call", "context"},
    "cache": set(),
    "call": {"cells", "context", "flow", "options"},
    "cases": {"cells", "nn", "paths", "variant_cells", "variants"},
    "checks": {"call", "cells", "context", "flow", "options"},
    "chunks": {"call", "flow"},
    "compile": {"nn"},
    "context": set(),
    "convert": set(),
    "crossover": {"cells", "cpu", "hardware", "problem", "tuned"},
    "dispatch": {"call", "context", "cpu", "gpu"},
    "devices": {"cells", "hardware", "kernels", "problem", "tuned"},
    "diagnose": {"cells", "nn", "options", "planner", "reference"},
    "flops": {"_imports", "cells"},
    "flow": set(),
    "forms": {"checks", "context", "cpu", "functional", "options", "paths", "planner"},
    "functional": {"checks", "options", "paths"},
    "gpu": {
        "call",
        "cpu",
        "devices",
        "flow",
        "gpu_staged",
        "kernels",
        "planner",
        "problem",
        "reference",
        "stacked",
    },
    "gpu_staged": {"call", "cells", "cpu", "flow", "kernels", "stacked"},
    "gradients": {"call", "flow", "reference"},
    "groups": {"call", "cells", "flow"},
    "hardware": {"cpu", "kernels"},
    "info": {
        "_arguments",
        "_version",
        "bench",
        "cache",
        "cpu",
        "crossover",
        "devices",
        "hardware",
        "kernels",
        "planner",
        "problem",
        "tuned",
    },
    "info_text": {"info"},
    "nn": {"cells", "checks", "context", "forms", "functional", "options", "paths", "planner"},
    "ops": {
        "_imports",
        "autocast",
        "call",
        "cells",
        "context",
        "cpu",
        "dispatch",
        "flops",
        "flow",
        "gpu",
        "gradients",
        "transforms",
    },
    "options": set(),
    "oracle": set(),
    "patch": {"nn"},
    "paths": {
        "autocast",
        "call",
        "checks",
        "chunks",
        "context",
        "cpu",
        "flow",
        "ops",
        "planner",
        "reference",
        "states",
        "stepping",
    },
    "stepping": {"call", "context", "cpu", "ops"},
    "planner": {"call", "cells", "context", "cpu", "crossover", "devices", "kernels", "problem"},
    "problem": {"kernels"},
    "products": {"call"},
    "reference": {"call", "cells", "flow", "groups"},
    "stacked": {"call", "cells", "flow", "reference"},
    "states": {"call", "context", "flow", "gradients", "groups", "options", "reference"},
    "testing": {"cases", "cells", "options", "oracle", "paths", "planner"},
    "transforms": {"call", "dispatch", "flow", "reference"},
    "tune": {
        "__version__",
        "_arguments",
        "bench",
        "crossover",
        "devices",
        "hardware",
        "nn",
        "tuned",
    },
    "tuned": {"_arguments", "_version", "cache", "cells", "hardware", "kernels", "problem"},
    "variant_cells": {"cells", "nn", "variants"},
    "variants": {"cells", "forms", "nn"},
}

# The same within fastrnn.cpu; from the rest of the package it may import BEYOND_CPU.
ALLOWED_IN_CPU = {
    "__init__": {"layers", "machine"},
    "activations": {"vector"},
    "arguments": set(),
    "backward_kernel": {"activations", "arguments", "steps", "vector"},
    "direction": {"rows"},
    "engine": {"arguments", "machine", "sequence"},
    "forward_kernel": {"activations", "steps", "vector"},
    "inference": {"arguments", "direction", "engine", "machine", "memory", "native", "rows"},
    "layers": {
        "direction",
        "inference",
        "machine",
        "native",
        "operators",
        "rows",
        "stepping",
        "walk",
    },
    "machine": set(),
    "matrices": {"arguments", "tiles", "vector"},
    "memory": set(),
    "native": {"arguments", "direction", "engine", "machine", "memory", "operators"},
    "operators": {"direction"},
    "stepping": {
        "arguments",
        "direction",
        "engine",
        "inference",
        "memory",
        "rows",
        "walk",
    },
    "rows": set(),
    "sequence": {"arguments", "backward_kernel", "forward_kernel", "machine"},
    "steps": {"activations", "machine", "matrices", "vector"},
    "tiles": {"arguments", "machine", "vector"},
    "vector": set(),
    "walk": {"direction"},
}
BEYOND_CPU = {"cache", "call", "cells", "flow", "gradients", "groups", "products", "reference"}


def imports(path: Path) -> set[str]:
    """First component of every import; relative imports keep their leading dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {"." * node.level + name.split(".")[0] for name in names}
    return found


def test_import_direction():
    modules = {path.stem: path for path in (ROOT / "fastrnn").glob("*.py")}
    assert modules.keys() == ALLOWED.keys()
    for name, path in modules.items():
        ours = {module.lstrip(".") for module in imports(path) if module.startswith(".")}
        assert ours <= ALLOWED[name], f"{name} imports {ours - ALLOWED[name]}"
        assert "fastrnn" not in imports(path), f"{name} imports the package by its full name"


def test_import_direction_of_the_cpu_backend():
    modules = {path.stem: path for path in (ROOT / "fastrnn" / "cpu").glob("*.py")}
    assert modules.keys() == ALLOWED_IN_CPU.keys()
    for name, path in modules.items():
        relative = {module for module in imports(path) if module.startswith(".")}
        beyond = {module.lstrip(".") for module in relative if module.startswith("..")}
        inside = {module.lstrip(".") for module in relative if not module.startswith("..")}
        assert inside <= ALLOWED_IN_CPU[name], f"{name} imports {inside - ALLOWED_IN_CPU[name]}"
        assert beyond <= BEYOND_CPU, f"{name} imports {beyond - BEYOND_CPU}"


def test_cells_import_no_engine():
    """Each cell has its own file, with the formula in its docstring."""
    common = {"cell", "engine", "functions", "__init__"}
    for path in (ROOT / "fastrnn" / "cells").glob("*.py"):
        found = imports(path)
        if path.stem in common:
            standard = {"__future__", "builtins", "collections", "functools", "types", "typing"}
            assert {name for name in found if not name.startswith(".")} <= standard, path
        else:
            assert all(name.startswith(".") for name in found), path
            assert "h' = " in ast.get_docstring(ast.parse(path.read_text())), path
        assert not any(name.startswith("..") for name in found), path


# Files with more parameters: public functions, and functions that torch calls by a schema.
WITH_MANY_PARAMETERS = {"functional": 18, "flops": 17, "ops": 16}


def parameters(node: ast.FunctionDef) -> int:
    own = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return sum(argument.arg not in ("self", "cls", "ctx") for argument in own)


def test_functions_have_few_parameters():
    folders = {path.parent for path in (ROOT / "fastrnn").rglob("*.py")} | {ROOT / "kernels"}
    for path in itertools.chain.from_iterable(folder.glob("*.py") for folder in folders):
        if "bench" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                decorators = " ".join(ast.unparse(d) for d in node.decorator_list)
                is_kernel = re.search(r"\b(triton|gluon)\.jit\b", decorators) is not None
                most = 25 if is_kernel else WITH_MANY_PARAMETERS.get(path.stem, 8)
                assert parameters(node) <= most, f"{path}: {node.name}"


def test_kernels_import_nothing_of_the_package_but_cells():
    for path in (ROOT / "kernels").rglob("*.py"):
        found = imports(path)
        assert "fastrnn" not in found, path
        assert {module for module in found if module.startswith("..")} <= {"..cells"}, path


def test_only_the_launchers_import_torch():
    """Kernels can be read, interpreted and compiled, and plans made, without torch."""
    for path in (ROOT / "kernels").rglob("*.py"):
        found = {module for module in imports(path) if not module.startswith(".")}
        if path.name in ("launch.py", "launch_staged.py"):
            continue
        others = {module.partition(".")[0] for module in found} - sys.stdlib_module_names
        assert others <= {"triton"}, path


def test_top_level_folders_are_imported_through_the_package():
    """`import kernels` or `import bench` would load a second copy of every module."""
    for folder in ("fastrnn", "kernels", "bench", "tests", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            assert not imports(path) & {"kernels", "bench", "tests"}, path


def test_what_is_read_beside_the_code_is_installed():
    """An editable install has every file; a wheel has only those in package-data."""
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    declared = settings["package-data"]
    assert set(declared) <= set(settings["packages"])
    files = {(package, name) for package, names in declared.items() for name in names}
    assert files == {
        ("fastrnn", "py.typed"),
        ("fastrnn", f"{fastrnn.tuned.SHIPPED.name}/*.csv"),
        ("fastrnn.kernels", fastrnn.kernels.configs.STEPS.name),
    }
    for package, name in files:
        assert [*Path(str(importlib.resources.files(package))).glob(name)]


def modules_after_importing_fastrnn(prelude: str = "") -> set[str]:
    code = (
        f"{prelude}\nimport sys, json, torch; before = set(sys.modules); import fastrnn\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout))


def test_import_is_light():
    new = {module.split(".")[0] for module in modules_after_importing_fastrnn()}
    assert not new & {"triton", "llvmlite", "matplotlib", "rich", "tqdm", "numpy"}
    assert not any(module.startswith("torch._dynamo") for module in new)


def test_import_and_run_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastrnn\n"
        "from fastrnn.planner import use_path\n"
        "m = fastrnn.GRU(3, 4)\n"
        "for path in (None, 'kernels'):\n"
        "    with use_path(path): m(torch.randn(5, 2, 3))[0].sum().backward()\n"
        "assert m.weight_hh_l0.grad.isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Modules that users call, or read to add a cell or a path: numpydoc, with all sections.
DOCUMENTED = [
    fastrnn.functional,
    fastrnn.nn,
    fastrnn.variant_cells,
    fastrnn.variants,
    fastrnn.call,
    fastrnn.cases,
    fastrnn.cells.cell,
    fastrnn.compile,
    fastrnn.convert,
    sys.modules["fastrnn.diagnose"],  # fastrnn.diagnose is the function
    fastrnn.flow,
    fastrnn.info,
    fastrnn.options,
    fastrnn.patch,
    fastrnn.problem,
    fastrnn.testing,
]
# Modules that only the package calls: docstrings need not repeat signatures and records.
INTERNAL = [
    fastrnn.autocast,
    fastrnn.cache,
    fastrnn.cells.engine,
    fastrnn.checks,
    fastrnn.chunks,
    fastrnn.cpu.engine,
    fastrnn.cpu.inference,
    fastrnn.cpu.layers,
    fastrnn.cpu.machine,
    fastrnn.cpu.native,
    fastrnn.cpu.operators,
    fastrnn.crossover,
    fastrnn.devices,
    fastrnn.flops,
    fastrnn.gpu,
    fastrnn.gradients,
    fastrnn.hardware,
    fastrnn.groups,
    fastrnn.kernels.configs,
    fastrnn.ops,
    fastrnn.oracle,
    fastrnn.paths,
    fastrnn.planner,
    fastrnn.products,
    fastrnn.reference,
    fastrnn.states,
    fastrnn.transforms,
    fastrnn.tune,
    fastrnn.tuned,
]


def objects_of(modules):
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                yield f"{module.__name__}.{name}"


# numpydoc errors whose fix would only repeat the signature or the summary.
IGNORED = {
    "ES01",  # no extended summary
    "EX01",  # no example: required below, where it matters
    "GL01",  # the summary starts on the first line
    "GL08",  # private members of public classes
    "PR01",  # a tuple's fields and torch's own signature
    "PR02",
    "PR04",
    "PR06",
    "PR07",
    "PR08",
    "PR09",
    "RT03",
    "RT05",
    "SA01",
    "SS03",
    "SS05",
    "SS06",
    "YD01",
}


def check_docstring(name, ignored):
    result = numpydoc.validate.validate(name)
    errors = [error for error in result["errors"] if error[0] not in ignored]
    assert not errors
    assert result["docstring"], "no docstring"


@pytest.mark.parametrize(
    "name", sorted([*objects_of(DOCUMENTED), "fastrnn.planner.plan", "fastrnn.planner.use_path"])
)
def test_docstring(name):
    check_docstring(name, IGNORED)


@pytest.mark.parametrize("name", sorted(objects_of(INTERNAL)))
def test_docstring_of_what_is_internal(name):
    check_docstring(name, IGNORED | {"RT01"})


@pytest.mark.parametrize(
    "name", sorted(set(fastrnn.__all__) - {"__version__", "convert", "functional", "nn"})
)
def test_public_names_have_an_example_that_runs(name):
    assert ">>> " in inspect.getdoc(getattr(fastrnn, name))
