"""Kernels are compiled here, not interpreted; Triton decides that when it is imported."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import triton

from fastrnn.kernels import persistent, words

if triton.knobs.runtime.interpret:
    raise pytest.UsageError("for the tests of compiled kernels set TRITON_INTERPRET=0")


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Replace a function of the persistent kernels, which are then recompiled."""

    def replace(name: str, function: Any) -> None:
        monkeypatch.setattr(f"fastrnn.kernels.{name}", function)
        for part in (*vars(words).values(), *vars(persistent).values()):
            if isinstance(part, triton.JITFunction):
                monkeypatch.setattr(part, "hash", None)
                monkeypatch.setattr(part, "device_caches", defaultdict(part.create_binder))

    return replace
