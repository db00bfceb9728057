"""Parsers for command-line values; each rejects an invalid value with a one-line message."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentTypeError

import torch


class UsageError(ValueError):
    """Incompatible arguments, or a missing file or package."""


def require(extra: str, *packages: str) -> None:
    """Raise UsageError if a package installed by an extra is missing."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"fastrnn {extra} needs {package}: pip install 'fastrnn[{extra}]'")


DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def dtype(text: str) -> torch.dtype:
    """Parse a floating-point dtype by its torch name or as fp16, bf16, fp32 or fp64."""
    name = _ALIASES.get(text, text)
    if name not in DTYPES:
        accepted = ", ".join((*DTYPES, *_ALIASES))
        raise ArgumentTypeError(f"unknown dtype {text!r}, expected one of {accepted}")
    return DTYPES[name]


def device(text: str) -> torch.device:
    """Parse an available device: cpu, cuda or cuda:N."""
    try:
        parsed = torch.device(text)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"unknown device {text!r}, expected cpu, cuda or cuda:N")
    if parsed.type == "cuda" and (parsed.index or 0) >= torch.cuda.device_count():
        raise ArgumentTypeError(
            f"no device {text!r}: torch sees {torch.cuda.device_count()} CUDA devices"
        )
    return parsed


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """Parse a non-negative integer."""
    # Unlike int(), isdecimal rejects signs and spaces.
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not a non-negative integer")
    return int(text)
