"""Extend torch modules that are too slow to import along with fastrnn."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


def when_imported(name: str, add: Callable[[ModuleType], None]) -> None:
    """Call ``add(module)`` once a module has been imported, immediately if it already was.

    Parameters
    ----------
    name : str
        Full name of the module.
    add : callable
    """
    if name in sys.modules:
        # The entry in sys.modules may be incomplete while another thread imports the module.
        add(importlib.import_module(name))
    else:
        sys.meta_path.insert(0, _Finder(name, add))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module the default way, and calls a function after each time it is executed."""

    def __init__(self, name: str, add: Callable[[ModuleType], None]) -> None:
        self.name, self.add = name, add

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.add(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
