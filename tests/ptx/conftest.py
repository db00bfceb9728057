"""The kernels here are compiled, not interpreted, which Triton decides when it is imported."""

import pytest
import triton

if triton.knobs.runtime.interpret:
    raise pytest.UsageError("for the tests of compiled kernels set TRITON_INTERPRET=0")
