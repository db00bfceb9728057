"""The input of the choice of a path, and its result."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kernels.configs import Device


class Problem(NamedTuple):
    """The properties of a call on which the choice of its path depends.

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
        Whether gradients are recorded.
    packed : bool
        Whether the sequences have different lengths. Torch treats a PackedSequence of equal
        lengths as a padded batch.
    projected, is_step : bool
    chained : bool
        Whether a step with gradients takes its state from another step, as in a loop over steps,
        so that the weight gradients of all steps can be computed together.
    transform : {None, 'func', 'forward'}
        Whether the call is inside a ``torch.func`` transform or forward-mode AD.
    layers, directions : int
        Those of the whole stack.
    parts : int
        Heads of a layer times members of an ensemble; batch and hidden size are those of one part.
    marked : bool
        Whether there are lengths, resets, truncated gradients or requests for all states.
    noisy : bool
        Whether there is recurrent dropout or zoneout.
    gpu : fastrnn.kernels.configs.Device, optional
        The GPU, present or not, if Triton compiles for `device`.
    precision : {'tf32', 'tf32x3', 'ieee'}
        Precision of float32 products on a GPU; see ``devices.float32_precision``.
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
        The basis of the choice: 'model', or where and when it was measured; empty if the paths
        were not compared.
    """

    path: str
    reason: str
    source: str = ""
