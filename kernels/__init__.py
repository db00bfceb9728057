"""Triton kernels, imported as ``fastrnn.kernels``.

Files with ``@triton.jit`` functions import triton and nothing else, so that they can be
read, interpreted and compiled without torch and without a GPU; the one file that
allocates and launches imports torch. Nothing here imports the rest of the package.

No kernel has landed yet: on a GPU every layer runs on torch's own kernels.
"""
