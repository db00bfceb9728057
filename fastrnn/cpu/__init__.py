"""The CPU backend; its loop of torch operators also serves devices without their own backend."""

from .layers import (
    ALL,
    NOTHING,
    STATES,
    backward,
    check_batch,
    compute_dtype,
    fake_saved,
    forward,
    prepared,
    prepared_step,
    saves_nothing,
    trains_steps,
)
from .machine import describe, kernel_gap, kernels_allowed, target

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
    "prepared",
    "prepared_step",
    "saves_nothing",
    "target",
    "trains_steps",
]
