"""What the choice of a path depends on, and what is chosen."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kernels.configs import Device


class Problem(NamedTuple):
    """One call of a recurrent layer, as far as the choice of a path depends on it.

    Attributes
    ----------
    cell : str
        Key of ``fastrnn.cells.CELLS``.
    steps, batch, input_size, hidden_size : int
        T, B, I and H; `steps` is 1 and `is_step` true for a cell module.
    dtype : torch.dtype
    device : str
        Device type, as in ``torch.device.type``.
    training : bool
        Whether gradients will be asked for.
    packed : bool
        Whether the sequences have different lengths. A PackedSequence of equal lengths
        is to torch a padded batch.
    projected, is_step : bool
    chained : bool
        Whether a step with gradients has its state from others, as in a loop over steps, so that
        the gradients of their weights can be computed together.
    transform : {None, 'func', 'forward'}
        Whether the call is inside a ``torch.func`` transform or forward-mode AD.
    layers, directions : int
        Of the whole stack.
    parts : int
        Heads of a layer, times the members of an ensemble; batch and hidden size are those of one.
    marked : bool
        Whether there are lengths, resets or truncated gradients, or all states are wanted.
    noisy : bool
        Whether there is recurrent dropout or zoneout.
    gpu : fastrnn.kernels.configs.Device, optional
        The GPU, present or not, if `device` is one that Triton compiles for.
    precision : {'tf32', 'tf32x3', 'ieee'}
        Of products of float32 on a GPU; see ``devices.float32_precision``.
    """

    cell: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    training: bool = False
    packed: bool = False
    projected: bool = False
    is_step: bool = False
    chained: bool = False
    transform: str | None = None
    layers: int = 1
    directions: int = 1
    parts: int = 1
    marked: bool = False
    noisy: bool = False
    gpu: Device | None = None
    precision: str = "tf32"


class Decision(NamedTuple):
    """A choice between torch's path and ours.

    Attributes
    ----------
    path : str
    reason : str
        One sentence.
    source : str
        What it rests on: 'model', or where and when it was measured; empty if nothing was compared.
    """

    path: str
    reason: str
    source: str = ""
