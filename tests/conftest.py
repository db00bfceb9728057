"""Settings and fixtures for all tests."""

import importlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

# Required by torch's deterministic mode on a GPU; must be set before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Workers, and programs that tests start, share the cores: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

# Importing triton decides whether kernels are compiled or interpreted, so tests of compiled kernels
# need a session of their own: TRITON_INTERPRET=0 pytest tests/ptx
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run sweeps whole, and long tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without ``--all``, leave out what is ``long`` and most cases of a ``sweep``."""
    if config.getoption("--all"):
        return
    seen: Counter[str] = Counter()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        sweep, name = item.get_closest_marker("sweep"), item.nodeid.partition("[")[0]
        is_sampled = sweep is None or seen[name] % sweep.args[0] == 0
        seen[name] += 1
        (kept if is_sampled and not item.get_closest_marker("long") else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """Fix the seed, and fill memory that operators allocate but may not write with NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Import an example as if it were run, with its folder first on sys.path."""
    folder = Path(__file__).parent.parent / "examples"
    monkeypatch.syspath_prepend(str(folder))
    names = [path.stem for path in folder.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in names:
        sys.modules.pop(name, None)
