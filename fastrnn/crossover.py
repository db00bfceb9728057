"""Where our paths on a CPU are faster than torch's: each constant with what set it."""

from __future__ import annotations

import functools
import math

import torch

from . import cpu
from .problem import Problem


def choose(problem: Problem) -> tuple[str, str]:
    """Choose between torch's path and ours for a plain layer on a CPU, and say why."""
    if problem.is_step:
        return "torch", "one step is one fused ATen call; ours would have to pack the weights"
    if problem.dtype in (torch.bfloat16, torch.float16) and multiplies(problem.dtype):
        return "torch", f"this CPU multiplies {problem.dtype}; we would use float32"
    gap = cpu.kernel_gap(problem.dtype, problem.projected)
    return _by_kernels(problem) if gap is None else _by_operators(problem, gap)


# Below so many steps the fixed costs of a call, 0.1 ms and in
# training 0.5 ms, are more than the steps save. Measured with torch 2.13 on a 2-core x86-64
# machine with AVX2, float32, 2 threads; time of torch.nn / ours at (B, I = H) = (1, 64), (1, 256),
# (16, 64), (16, 256):
#   RNN  inference T=4 0.8, 0.8, 1.1, 1.1; T=8 1.1, 1.0, 1.7, 1.4
#        training  T=4 0.8, 0.9, 1.0, 1.0; T=8 1.1, 1.6, 1.4, 1.6
#   GRU  inference T=2 0.9, 0.8, 1.0, 1.1; T=4 1.1, 0.9, 1.4, 1.3
#        training  T=2 0.9, 0.9, 1.0, 1.0; T=4 1.4, 1.3, 1.5, 1.3
#   LSTM inference T=2 1.2, 1.0, 1.2, 0.9; T=16 1.3, 0.9, 1.3, 1.1
#        training  T=4 0.8, 1.3, 0.9, 1.8; T=32 0.9, 1.4, 1.2, 1.0
_KERNEL_MIN_STEPS = {"rnn": (8, 8), "gru": (4, 4), "lstm": (2, 4)}
# Hidden units below which training needs more steps; (T, B, H) = (16, 8, 128) 0.90 and 0.95,
# (16, 16, 192) 0.98, (16, 8, 768) 2.3.
_SMALL_LSTM = 256
_SMALL_LSTM_MIN_STEPS = 48
# Where oneDNN's LSTM is as fast or faster, (T, B, H): training (128, 64, 512) 0.91, (128, 64, 1024)
# 0.96, (64, 32, 576) 0.94, (64, 32, 512) 1.06, (128, 64, 256) 1.28.
_LARGE_LSTM = 32 * 576  # B * H
# Inference, where packing the weights takes as long as using them in a few steps:
#   B=1   H=64 T=8 0.94, 32 1.05; H=128 T=32 0.83, 64 1.14; H=256 T=32 0.90, 64 1.10
#         H=512 T=64 0.98, 128 1.15; H=768 T=256 0.91; H=1024 T=128 0.75, 512 0.87
#   B=4   H=64 T=8 1.11; H=128 T=8 0.98, 16 1.09; H=256 T=32 0.92, 64 1.19; H=512 T=32 0.90, 64 1.02
#   B=16  H=64 T=8 1.07; H=128 T=8 1.03; H=256 T=16 0.90, 32 1.02; H=512 T=32 0.96, 64 1.06
# Up to so many hidden units: the steps it takes with a batch below 4, and with a larger one.
_LSTM_MIN_STEPS = (
    (127, 32, 2),
    (255, 64, 16),
    (511, 64, 64),
    (512, 128, 64),
    (math.inf, math.inf, 64),
)
_MANY_ROWS = 1024  # T * B from which packing does not matter to a larger batch

# Where the loop of torch operators wins, T=64, in training:
#   float64 (B, H) = (8, 64), (8, 256), (64, 256): 1.2-1.3, 1.2-1.3, 0.9-1.2
#   projected to H/2: (1, 64), (8, 64), (8, 256), (32, 256): 1.3, 1.3, 1.2, 1.1; T=48: (8, 256),
#   (32, 256): 1.1, 0.96; (64, 256): 0.9-1.0
#   inference: 0.5-1.0
_OPERATORS_MIN_STEPS = 48
_MAX_BATCH_TIMES_HIDDEN = 8192
# and in bfloat16 and float16, on a CPU that does not multiply them, T=64:
#   training  (1, 64) 1.3-1.7, (16, 64) 2.1-3.5, (16, 256) 9-18, (64, 256) 15-22
#   inference (1, 64) 0.6-0.8, (1, 1024) 0.7-1.2, (4, 256) 1.5-1.9, (16, 64) 1.6-2.2
#   (16, 64), T=16: training 1.3-2.3, inference 1.2-2.0; T=4: 0.7-1.2
_HALF_MIN_STEPS = 16
_HALF_MIN_BATCH = 4
_HALF_MIN_BATCH_TIMES_HIDDEN = 1024


def _by_kernels(problem: Problem) -> tuple[str, str]:
    if not problem.packed:
        minimum = _kernel_min_steps(problem)
        if problem.steps < minimum:
            if minimum == math.inf:
                return "torch", "a step is bound by reading the weights, which oneDNN does as fast"
            return "torch", f"below {minimum} steps our call costs what the steps save"
        large = problem.batch * problem.hidden_size >= _LARGE_LSTM
        if large and problem.training and problem.cell == "lstm" and problem.dtype == torch.float32:
            return "torch", f"B * H >= {_LARGE_LSTM}: bound by the same products as oneDNN's LSTM"
    return "kernels", f"compiled kernels, {cpu.describe()}"


def _kernel_min_steps(problem: Problem) -> float:
    if problem.cell == "lstm" and problem.dtype == torch.float32:  # oneDNN's is slow in halves
        if problem.training and problem.hidden_size < _SMALL_LSTM:
            return _SMALL_LSTM_MIN_STEPS
        is_small = problem.batch < 4
        if not problem.training and (is_small or problem.steps * problem.batch < _MANY_ROWS):
            for hidden, small, other in _LSTM_MIN_STEPS:
                if problem.hidden_size <= hidden:
                    return small if is_small else other
    return _KERNEL_MIN_STEPS[problem.cell.partition("_")[0]][problem.training]


def _by_operators(problem: Problem, gap: str) -> tuple[str, str]:
    if problem.dtype in (torch.bfloat16, torch.float16):
        size = problem.batch * problem.hidden_size
        large = problem.batch >= _HALF_MIN_BATCH and size >= _HALF_MIN_BATCH_TIMES_HIDDEN
        if problem.steps >= (_HALF_MIN_STEPS if large else _OPERATORS_MIN_STEPS) and (
            large or problem.training
        ):
            reason = f"{gap}; this CPU does not multiply {problem.dtype}, our loop need not"
            return "operators", reason
        return "torch", f"{gap}; too small to gain from computing in float32"
    if not problem.training:
        return "torch", f"{gap}; in inference torch's were faster than our loop"
    unfused = problem.packed or problem.projected or problem.dtype == torch.float64
    if problem.cell == "lstm" and not unfused:
        return "torch", f"{gap}; oneDNN runs the whole LSTM layer fused"
    if problem.steps < _OPERATORS_MIN_STEPS:
        return "torch", f"{gap}; below {_OPERATORS_MIN_STEPS} steps our loop costs what it saves"
    if not problem.packed and problem.batch * problem.hidden_size > _MAX_BATCH_TIMES_HIDDEN:
        return "torch", f"{gap}; B * H > {_MAX_BATCH_TIMES_HIDDEN}: bound by the same GEMMs"
    return "operators", f"{gap}; one GEMM for each weight gradient instead of one a step"


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether oneDNN has fast products of bfloat16 or float16 on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
