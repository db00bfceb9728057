"""Settings and fixtures of all tests."""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# What torch's deterministic mode asks for on a GPU, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import hypothesis
import pytest
import torch

# Whether kernels are compiled or run in Triton's interpreter is decided when triton is imported, so
# the tests of the compiled ones are a session of their own: TRITON_INTERPRET=0 pytest tests/ptx
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
_IS_COMPILED = os.environ.get("TRITON_INTERPRET", "").lower() in ("0", "false", "off", "no")
collect_ignore = [] if _IS_COMPILED else ["ptx"]

hypothesis.settings.register_profile(
    "fastrnn",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fastrnn")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Fix the seed, and fill all memory that an operator allocates and may not write with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import an example as running it would, with its folder first on sys.path."""
    folder = Path(__file__).parent.parent / "examples"
    monkeypatch.syspath_prepend(str(folder))
    names = [path.stem for path in folder.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small matrices gain nothing from more
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)
