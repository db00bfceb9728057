"""The CPU backend; its loop of torch operators also serves devices that have none of their own."""

from .layers import (
    ALL,
    NOTHING,
    STATES,
    check_batch,
    compute_dtype,
    layer_backward,
    layer_forward,
    saves_nothing,
)
from .loop import CPU_CELLS
from .machine import describe, kernel_gap

__all__ = [
    "ALL",
    "CPU_CELLS",
    "NOTHING",
    "STATES",
    "check_batch",
    "compute_dtype",
    "describe",
    "kernel_gap",
    "layer_backward",
    "layer_forward",
    "saves_nothing",
]
