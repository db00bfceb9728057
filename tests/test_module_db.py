"""torch's own tests of recurrent modules, applied to ours."""

from typing import Any

import hypothesis
import pytest
import torch
from compare import CELL_CLASSES, CLASSES, PATHS, stock_class
from torch.nn.utils.rnn import PackedSequence

from fastrnn.planner import use_path

with pytest.MonkeyPatch.context() as patch:
    # Keep this import from changing process-wide settings of torch and hypothesis.
    patch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
hypothesis.settings.load_profile("fastrnn")

INFOS = {info.module_cls: info for info in module_db}
#: RNN and GRU have samples with packed input, which the database omits by default.
EXTRA = {"RNN": {"with_packed_sequence": True}, "GRU": {"with_packed_sequence": True}}


def entries() -> list[Any]:
    cases = []
    for cls in CLASSES + CELL_CLASSES:
        info = INFOS[stock_class(cls)]
        assert info.module_inputs_func is not None
        for training in (True, False):
            for dtype in info.dtypes:
                name = f"{cls.__name__}-{'train' if training else 'eval'}-{dtype}"
                cases.append(pytest.param(cls, training, dtype, id=name))
    return cases


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in leaves(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def samples(cls: type, training: bool, dtype: torch.dtype) -> list[Any]:
    info = INFOS[stock_class(cls)]
    torch.manual_seed(0)
    found = info.module_inputs_func(
        info,
        device="cpu",
        dtype=dtype,
        requires_grad=True,
        training=training,
        **EXTRA.get(cls.__name__, {}),
    )
    return list(found)


def run(module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[list[Any], list[Any]]:
    """Results, and gradients of everything that can have one."""
    results = leaves(module(*args, **kwargs))
    wanted = [t for t in (*leaves(args), *module.parameters()) if t.requires_grad]
    return results, torch.autograd.grad([t.sum() for t in results], wanted)


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("cls", "training", "dtype"), entries())
def test_samples(cls: type, training: bool, dtype: torch.dtype) -> None:
    found = samples(cls, training, dtype)
    assert len(found) >= 2
    for sample in found:
        made = sample.constructor_input
        options = {"dtype": dtype, **made.kwargs}
        ours = cls(*made.args, **options).train(training)
        stock = stock_class(cls)(*made.args, **options).train(training)
        stock.load_state_dict(ours.state_dict())
        args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
        theirs = run(stock, args, kwargs)
        for path in PATHS:
            with use_path(path):
                mine = run(ours, args, kwargs)
                torch.testing.assert_close(mine, theirs, msg=lambda m, of=sample: f"{of}: {m}")
                packed = isinstance(args[0], PackedSequence)
                if sample.reference_fn is not None and not packed:
                    # The same result as with a batch of one.
                    expected = sample.reference_fn(ours, *args, **kwargs)
                    torch.testing.assert_close(mine[0], leaves(expected))


@pytest.mark.parametrize(("cls", "training", "dtype"), entries())
def test_error_samples(cls: type, training: bool, dtype: torch.dtype) -> None:
    info = INFOS[stock_class(cls)]
    if info.module_error_inputs_func is None:
        assert cls in CELL_CLASSES
        return
    found = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    for sample in found:
        made = sample.module_error_input.constructor_input
        forward = sample.module_error_input.forward_input
        if sample.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                cls(*made.args, **made.kwargs)
        else:
            module = cls(*made.args, **made.kwargs).to(dtype)
            with pytest.raises(sample.error_type, match=sample.error_regex):
                module(*forward.args, **forward.kwargs)


def test_every_recurrent_module_of_the_database_is_ours() -> None:
    recurrent = {c for c in INFOS if issubclass(c, (torch.nn.RNNBase, torch.nn.RNNCellBase))}
    assert recurrent == {stock_class(cls) for cls in CLASSES + CELL_CLASSES}
