"""The quick suite for pytest-benchmark: ``pytest bench``.

Each case is a group of fastrnn and torch.nn. Results are compared before anything is timed.
pytest-benchmark times one after the other; ``fastrnn bench`` alternates between them, which is less
sensitive to noise on the machine.
"""

import pytest
import torch

from fastrnn.bench.built import make_baseline
from fastrnn.bench.gate import tolerances_of, worst_error
from fastrnn.bench.measure import ready
from fastrnn.bench.providers import BASELINE, OURS, PROVIDERS
from fastrnn.bench.registry import quick

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _name(case):
    return case.name.replace(" ", "-")


@pytest.mark.parametrize("provider", [OURS, BASELINE])
@pytest.mark.parametrize("case", quick(DEVICE.type), ids=_name)
def test_speed(benchmark, case, provider):
    module, inputs = make_baseline(case, DEVICE)
    built = {name: PROVIDERS[name].build(case, module, inputs) for name in (BASELINE, provider)}
    timed, expected = (ready(case, built[name]) for name in (provider, BASELINE))
    tolerances = tolerances_of(case, DEVICE)
    error, tolerance = worst_error(timed.results(), expected.results(), tolerances)
    assert error <= tolerance

    def call():
        timed.call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = _name(case)
    benchmark(call)
