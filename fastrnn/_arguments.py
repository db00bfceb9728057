"""Parsers of command-line values; each refuses a bad one in a line that names it."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentTypeError

import torch


class UsageError(ValueError):
    """Arguments that do not go together, or a file or package that is not there."""


def require(extra: str, *packages: str) -> None:
    """Raise UsageError if a package is missing that an extra would bring."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"fastrnn {extra} needs {package}: install fastrnn[{extra}]")


DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_ALIASES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}


def dtype(text: str) -> torch.dtype:
    """Parse torch's name of a floating dtype, or fp16, bf16, fp32, fp64."""
    name = _ALIASES.get(text, text)
    if name not in DTYPES:
        accepted = ", ".join((*DTYPES, *_ALIASES))
        raise ArgumentTypeError(f"unknown dtype {text!r}, expected one of {accepted}")
    return DTYPES[name]


def device(text: str) -> torch.device:
    """Parse a device that is there: cpu, cuda or cuda:N."""
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
    """Parse an integer from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def natural(text: str) -> int:
    """Parse an integer from 0 on."""
    # isdecimal also refuses signs and spaces, which int() takes.
    if not text.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not an integer from 0 on")
    return int(text)
