"""Swap recurrent modules inside existing models, and undo it."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .nn import REPLACED, REPLACEMENTS, class_like, plain_class

_STOCK = {ours: stock for stock, ours in REPLACEMENTS.items()}

Selector = str | type[torch.nn.Module]


@dataclass(frozen=True)
class Report:
    """What `replace` or `restore` did.

    Attributes
    ----------
    swapped : dict of str to str
        Qualified name of each module whose class was changed, and from what to what.
    kept : dict of str to str
        Qualified name of each recurrent module that was left alone, and why.

    Examples
    --------
    >>> import torch, fastrnn
    >>> print(fastrnn.replace(torch.nn.Sequential(torch.nn.GRU(2, 3))))
    swapped 1, kept 0
      0: torch.nn.GRU -> fastrnn.GRU
    """

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, kept {len(self.kept)}"]
        lines += [f"  {name or '(root)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(root)'}: kept, {why}" for name, why in self.kept.items()]
        return "\n".join(lines)


def replace(
    model: torch.nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Report:
    """Turn every torch.nn recurrent module inside a model into ours, in place.

    Only the class of each module changes: parameters and buffers are the same objects,
    so optimizers stay valid; hooks, the training flag, parametrizations and everything
    else on the instance stay.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be a recurrent module.
    include, exclude : str, type, or iterable of these, optional
        Which modules: patterns of qualified names as in `fnmatch` ('encoder.*'), or
        torch.nn classes. By default all are included and none excluded. A module that the
        model holds under several names is selected by any of them.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If `model` is not a module, or a selector neither a string nor a class.

    Examples
    --------
    >>> import torch, fastrnn
    >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(4, 8), "head": torch.nn.GRU(8, 2)})
    >>> report = fastrnn.replace(model, exclude="head")
    >>> report.swapped
    {'encoder': 'torch.nn.LSTM -> fastrnn.LSTM'}
    >>> report.kept
    {'head': 'excluded'}
    """
    included, excluded = _selectors("include", include), _selectors("exclude", exclude)
    report = Report()
    for module, names in _modules(model).items():
        name = names[0]
        if isinstance(module, tuple(_STOCK)):
            continue
        if not isinstance(module, tuple(REPLACEMENTS)):
            if isinstance(module, torch.jit.ScriptModule) and _scripted_recurrent(module):
                report.kept[name] = "compiled by TorchScript"
            continue
        ours = REPLACEMENTS.get(plain_class(module))
        if included is not None and not _selected(names, module, included):
            report.kept[name] = "not included"
        elif excluded is not None and _selected(names, module, excluded):
            report.kept[name] = "excluded"
        elif ours is None:
            report.kept[name] = f"{type(module).__name__} is a subclass that may compute otherwise"
        elif "forward" in vars(module):
            report.kept[name] = "its forward is overridden on the instance"
        else:
            module.__class__ = class_like(module, ours)
            module.__dict__[REPLACED] = True
            report.swapped[name] = f"torch.nn.{ours.__name__} -> fastrnn.{ours.__name__}"
    return report


def restore(model: torch.nn.Module) -> Report:
    """Undo `replace`: give every module that it swapped its torch.nn class back.

    Modules that were built as ours are not touched.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a copy of it.

    Returns
    -------
    Report

    Examples
    --------
    >>> import torch, fastrnn
    >>> model = torch.nn.Sequential(torch.nn.GRU(2, 3))
    >>> _ = fastrnn.replace(model)
    >>> print(fastrnn.restore(model))
    swapped 1, kept 0
      0: fastrnn.GRU -> torch.nn.GRU
    """
    report = Report()
    for module, (name, *_) in _modules(model).items():
        if not isinstance(module, tuple(_STOCK)):
            continue
        stock = _STOCK.get(plain_class(module))
        if not vars(module).get(REPLACED):
            report.kept[name] = "built as ours"
        elif stock is None:
            report.kept[name] = f"its class was changed again, to {type(module).__name__}"
        else:
            module.__class__ = class_like(module, stock)
            del module.__dict__[REPLACED]
            report.swapped[name] = f"fastrnn.{stock.__name__} -> torch.nn.{stock.__name__}"
    return report


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Bind torch.nn's six recurrent names to our classes inside a ``with`` block.

    For code that builds its own ``nn.LSTM``: the names change in ``torch.nn``,
    ``torch.nn.modules`` and ``torch.nn.modules.rnn``, for all threads, until the last open
    block ends. Names that other modules imported earlier (``from torch.nn import LSTM``)
    keep their meaning. Inside the block ``isinstance(m, nn.LSTM)`` is false for a stock
    module built before, and pickle, which looks a class up by its name, refuses such a module.

    Examples
    --------
    >>> import torch, fastrnn
    >>> with fastrnn.patched():
    ...     model = torch.nn.Sequential(torch.nn.LSTM(2, 3))
    >>> type(model[0]) is fastrnn.LSTM, torch.nn.LSTM is fastrnn.LSTM
    (True, False)
    """
    global _open_blocks
    with _patching:
        if not _open_blocks:
            for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
                for ours in _STOCK:
                    _before.append((place, ours.__name__, getattr(place, ours.__name__)))
                    setattr(place, ours.__name__, ours)
        _open_blocks += 1
    try:
        yield
    finally:
        with _patching:
            _open_blocks -= 1
            while _before and not _open_blocks:
                setattr(*_before.pop())


# Blocks of different threads may overlap: the first to open binds, the last to end restores.
_patching = threading.Lock()
_open_blocks = 0
_before: list[tuple[Any, str, type]] = []


def _modules(model: Any) -> dict[torch.nn.Module, list[str]]:
    """Every module inside a model, with all the names that it has there."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _selectors(
    argument: str, value: Selector | Iterable[Selector] | None
) -> tuple[Selector, ...] | None:
    if value is None:
        return None
    values = (value,) if isinstance(value, (str, type)) else tuple(value)
    for selector in values:
        if not isinstance(selector, (str, type)):
            raise TypeError(
                f"{argument} takes name patterns and classes, got {type(selector).__name__}"
            )
    return values


def _selected(names: list[str], module: torch.nn.Module, selectors: tuple[Selector, ...]) -> bool:
    return any(
        any(fnmatch.fnmatchcase(name, s) for name in names)
        if isinstance(s, str)
        else isinstance(module, s)
        for s in selectors
    )


def _scripted_recurrent(module: torch.jit.ScriptModule) -> bool:
    return module.original_name in {stock.__name__ for stock in REPLACEMENTS}
