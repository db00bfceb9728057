"""Swap the recurrent modules of existing models to ours and back."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .nn import _PLAIN, REPLACED, REPLACEMENTS, _Convertible, _Layers, class_like, plain_class

_STOCK = {ours: stock for stock, ours in REPLACEMENTS.items()}

Selector = str | type[torch.nn.Module]
# The class to give a module, or the reason to keep its own; None if it is not recurrent.
_Choice = type[torch.nn.Module] | str | None


@dataclass(frozen=True)
class Report:
    """The modules that `replace`, `restore` or `to_torch` changed and kept.

    Attributes
    ----------
    swapped : dict of str to str
        Maps the qualified name of each module whose class was changed to its old and new class.
    kept : dict of str to str
        Maps the qualified name of each recurrent module that was not changed to the reason.

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
    """Swap every torch.nn recurrent module of a model to fastrnn's, in place.

    Only the class of each module changes. Parameters and buffers remain the same objects,
    so optimizers stay valid; hooks, the training flag, parametrizations and everything
    else on the instance are kept.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be a recurrent module.
    include, exclude : str, type, or iterable of these, optional
        Modules to swap and modules to keep, as patterns of qualified names as in `fnmatch`
        ('encoder.*') or as torch.nn classes. By default all are included and none excluded.
        If the model holds a module under several names, any of them selects it.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If `model` is not a module, or a selector is neither a string nor a class.

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
    return _swap(model, _our_class, include, exclude)


def restore(model: torch.nn.Module) -> Report:
    """Undo `replace`: give every swapped module its torch.nn class back.

    Modules that were created as fastrnn's are kept; `to_torch` converts those too.

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
    return _swap(model, _class_before)


def to_torch(
    model: torch.nn.Module,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Report:
    """Swap every fastrnn module of a model to the torch.nn class of the same name, in place.

    Use it for tools that look for torch.nn's own classes, such as Opacus, quantization, TorchScript
    and ONNX. Only the class of each module changes, as in `replace`, so optimizers stay valid.
    `replace` swaps the modules back, along with any other torch.nn recurrent modules of the model.
    To create a second module instead, use the module's method ``to_torch``.

    Parameters
    ----------
    model : torch.nn.Module
        May itself be a recurrent module.
    include, exclude : str, type, or iterable of these, optional
        Modules to swap and modules to keep, as for `replace`; classes may be fastrnn's or
        torch.nn's.

    Returns
    -------
    Report
        Modules without an equivalent in torch.nn are kept: those with an option such as zoneout,
        or with a cell such as that of `LayerNormLSTM`.

    Raises
    ------
    TypeError
        If `model` is not a module, or a selector is neither a string nor a class.

    Notes
    -----
    Recurrent and weight dropout have no effect in evaluation mode. To convert a trained module
    that uses them, first set its attributes ``recurrent_dropout`` and ``weight_dropout`` to 0.

    After the swap, calling a layer with an argument that torch.nn does not support, such as
    ``lengths``, raises a TypeError.

    Examples
    --------
    >>> import torch, fastrnn
    >>> model = torch.nn.Sequential(fastrnn.LSTM(4, 8), fastrnn.GRU(8, 2, zoneout=0.1))
    >>> print(fastrnn.to_torch(model))
    swapped 1, kept 1
      0: fastrnn.LSTM -> torch.nn.LSTM
      1: kept, torch.nn.GRU has no zoneout, got 0.1
    """
    return _swap(model, _torch_class, include, exclude)


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """Bind torch.nn's six recurrent class names to fastrnn's classes inside a ``with`` block.

    Use it for code that creates its own ``nn.LSTM``. The names are rebound in ``torch.nn``,
    ``torch.nn.modules`` and ``torch.nn.modules.rnn``, for all threads, until the last open
    block ends. Names that other modules have already imported (``from torch.nn import LSTM``)
    are not rebound. Inside the block, ``isinstance(m, nn.LSTM)`` is false for a torch.nn module
    created before it, and pickle, which looks up classes by name, cannot pickle such a module.

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


# Blocks of different threads may overlap: the first to open binds, the last to close restores.
_patching = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_patching.acquire,
        after_in_parent=_patching.release,
        after_in_child=_patching.release,
    )
_open_blocks = 0
_before: list[tuple[Any, str, type]] = []


def _swap(
    model: torch.nn.Module,
    choose: Callable[[torch.nn.Module], _Choice],
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
) -> Report:
    """Give each module of a model the class that `choose` returns for it."""
    included, excluded = _selectors("include", include), _selectors("exclude", exclude)
    report = Report()
    for module, names in _modules(model).items():
        name, chosen = names[0], choose(module)
        if chosen is None:
            continue
        if included is not None and not _selected(names, module, included):
            report.kept[name] = "not included"
        elif excluded is not None and _selected(names, module, excluded):
            report.kept[name] = "excluded"
        elif isinstance(chosen, str):
            report.kept[name] = chosen
        else:
            report.swapped[name] = f"{_shown(plain_class(module))} -> {_shown(chosen)}"
            module.__class__ = class_like(module, chosen)
            if chosen in _STOCK:
                module.__dict__[REPLACED] = True
            else:
                for attribute in (REPLACED, *_PLAIN):
                    module.__dict__.pop(attribute, None)
    return report


def _shown(cls: type[torch.nn.Module]) -> str:
    return f"{'fastrnn' if cls in _STOCK else 'torch.nn'}.{cls.__name__}"


def _our_class(module: torch.nn.Module) -> _Choice:
    """Choose a module's class for `replace`."""
    if isinstance(module, _Convertible):
        return None
    if not isinstance(module, tuple(REPLACEMENTS)):
        scripted = isinstance(module, torch.jit.ScriptModule) and _scripted_recurrent(module)
        return "compiled by TorchScript" if scripted else None
    return _unlike(module, REPLACEMENTS) or REPLACEMENTS[plain_class(module)]


def _torch_class(module: torch.nn.Module) -> _Choice:
    """Choose a module's class for `to_torch`."""
    if not isinstance(module, _Convertible):
        return f"torch.nn has no {type(module).__name__}" if isinstance(module, _Layers) else None
    if why := _unlike(module, _STOCK):
        return why
    try:
        module.to_torch()
    except ValueError as error:
        return str(error)
    return _STOCK[plain_class(module)]


def _class_before(module: torch.nn.Module) -> _Choice:
    """Choose a module's class for `restore`."""
    chosen = _torch_class(module)
    if chosen is None:
        return None
    if not vars(module).get(REPLACED):
        return "built as ours"
    if plain_class(module) not in _STOCK:
        return f"its class was changed again, to {type(module).__name__}"
    return chosen


def _unlike(module: torch.nn.Module, classes: Iterable[type[torch.nn.Module]]) -> str | None:
    """Say why a module may not compute what its base class among these does."""
    if plain_class(module) not in classes:
        return f"{type(module).__name__} is a subclass that may compute something else"
    return "its forward is overridden on the instance" if "forward" in vars(module) else None


def _modules(model: Any) -> dict[torch.nn.Module, list[str]]:
    """Every module of a model, with all its qualified names."""
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
