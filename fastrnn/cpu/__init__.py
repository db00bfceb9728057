"""The CPU backend; its loop of torch operators also serves devices that have none of their own."""

from .layers import (
    ALL,
    NOTHING,
    STATES,
    backward,
    check_batch,
    compute_dtype,
    fake_saved,
    forward,
    saves_nothing,
)
from .machine import describe, kernel_gap, kernels_allowed

__all__ = [
    "ALL",
    "NOTHING",
    "STATES",
    "backward",
    "check_batch",
    "compute_dtype",
    "describe",
    "fake_saved",
    "forward",
    "kernel_gap",
    "kernels_allowed",
    "saves_nothing",
]
