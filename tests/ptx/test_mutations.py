"""A kernel that is broken is noticed: by what the emulator finds, or by its numbers.

What is harmless on purpose stays unnoticed; the reason is beside it.
"""

from __future__ import annotations

import functools

import pytest
import torch

from fastrnn.kernels import exchange
from fastrnn.kernels.configs import Config

from .driver import EmulationError, Schedule
from .layers import Case, check, emulate, faults
from .mutations import (
    ACQUIRE,
    BARRIER,
    RELEASE,
    both,
    in_kernel,
    place_of,
    published_early,
    replaced,
    waiting_once,
    with_one_mailbox,
    without,
    without_each,
    without_lap,
)

SCHEDULES = [
    Schedule(0),
    Schedule(1, "starve-warp", "lazy"),
    Schedule(2, "bursts", "lazy"),
    Schedule(3, "starve-cta", "random"),
    Schedule(4, "one", "at once"),
]
COUNTER = Case("gru", 50, 16, 5, schedule="persistent", protocol="counter")
FLAG = Case("gru", 50, 16, 5, schedule="persistent", protocol="flag")
WIDE = Case("lstm", 64, 16, 5, "float32", schedule="persistent", protocol="flag")
STEPS = Case("lstm", 96, 20, 3, schedule="stepwise")
# Not planned, but what a kernel for sm_90 would use.
ROWS_64 = Config("stepwise", "local", 64, 32, 32, 4, 65535)
WARP_GROUP = Case("lstm", 96, 50, 3, "float32", configs=(ROWS_64, ROWS_64))

RELAXED = replaced(r"gpu\.acquire", "gpu.relaxed")
AFTER_WAIT = without(BARRIER, before=r"ld\.global\.cg", last=True)
UNCACHED = replaced(r"ld\.global\.cg", "ld.global")
MAILBOXES = (
    (exchange.send_partial, "slot = ((step & 1)"),
    (exchange.collect_partials, "slot = ((step & 1)"),
)
ACQUIRE_EMPTIES_L1 = "an acquire at the wait empties L1, so a plain load reads L2 as well"


def of_both_kernels():
    """Name, case, kernel, change and, if it is harmless, why."""
    for kernel in ("forward_kernel", "backward_kernel"):
        for name, change in {
            "no barrier before the release": without(BARRIER, before=RELEASE),
            "the release is relaxed": replaced(r"gpu\.release", "gpu.relaxed"),
            "the acquire is relaxed": RELAXED,
            "the acquire is plain": replaced(r"ld\.global\.gpu\.acquire\.b32", "ld.global.b32"),
            "the acquire is relaxed, loads without .cg": both(RELAXED, UNCACHED),
            "the wait is not repeated": waiting_once(ACQUIRE),
            "no barrier before others read the counter": without(BARRIER, after=ACQUIRE, last=True),
        }.items():
            yield name, COUNTER, kernel, change, None
        yield "loads without .cg", COUNTER, kernel, UNCACHED, ACQUIRE_EMPTIES_L1
        for case in (FLAG, WIDE):
            for name, change in {
                "the volatile load is plain": replaced(r"ld\.volatile\.global", "ld.global"),
                "the volatile load is .cg": replaced(r"ld\.volatile\.global", "ld.global.cg"),
                "the poll is not repeated": waiting_once(r"ld\.volatile"),
            }.items():
                yield name, case, kernel, change, None


def of_forward():
    kernel = "forward_kernel"
    yield (
        "no barrier after the wait", COUNTER, kernel, AFTER_WAIT,
        "the counter's value reaches the other warps through shared memory, behind a barrier",
    )  # fmt: skip
    early = published_early(exchange.publish_state, "tl.store(row_ptrs")
    yield "publish before the store", COUNTER, kernel, early, None
    yield "a store is missing", FLAG, kernel, without(r"@%p\d+ st\.global\.b32"), None
    bare = replaced(r"@%p\d+ st\.global\.b16", "st.global.b16", count=1)
    yield "a store without its mask", FLAG, kernel, bare, None
    last = r"@%p\d+ (ld\.global\.b32 \{ %r\d+ \}, \[ %rd\d+ \+ 0 \];)(?![\s\S]*ld\.global\.b32)"
    yield "a load without its mask", FLAG, kernel, replaced(last, r"\1"), None
    shifted = replaced(r"(ld\.global\.v4\.b32 \{[^}]*\}, \[ %rd\d+ )\+ 0", r"\1+ 4", count=1)
    yield "a vector that starts 4 bytes off", WIDE, kernel, shifted, None


def of_backward():
    kernel = "backward_kernel"
    early = published_early(exchange.send_partial, "tl.store(ptrs, payload")
    yield "publish before the store", COUNTER, kernel, early, None
    yield "no barrier after the wait", COUNTER, kernel, AFTER_WAIT, None
    for case in (COUNTER, FLAG, WIDE):
        yield "mailboxes of depth 1", case, kernel, with_one_mailbox(*MAILBOXES), None
    for case in (FLAG, WIDE):
        lap = without_lap(exchange._tagged, "return bits & -2 | lap")
        yield "a payload without its lap", case, kernel, lap, None
    beyond = replaced(r"(st\.global\.v4\.b32 \[ %rd\d+ )\+ 0", r"\1+ 262144", count=1)
    yield "a vector beyond the end", WIDE, kernel, beyond, None


def of_steps():
    kernel = "forward_kernel"
    less = replaced(
        r"cp\.async\.wait_group\s+(\d)", lambda m: f"cp.async.wait_group {int(m[1]) + 2}"
    )
    yield "waits for one copy less", STEPS, kernel, less, None
    unmet = without(BARRIER, after=r"cp\.async\.wait_group")
    yield "no barrier after the copies", STEPS, kernel, unmet, None
    unfenced = replaced(r"^\s*fence\.proxy\.async.*$", "")
    yield "no fence before a warp-group product", WARP_GROUP, kernel, unfenced, None
    early = replaced(r"wgmma\.wait_group\.sync\.aligned \d", "wgmma.wait_group.sync.aligned 7")
    yield "a warp-group product is not waited for", WARP_GROUP, kernel, early, None


MUTATIONS = [
    pytest.param(*mutation, id=f"{name}-{case}-{kernel}".replace(" ", "-"))
    for mutation in [*of_both_kernels(), *of_forward(), *of_backward(), *of_steps()]
    for name, case, kernel, *_ in [mutation]
]


@functools.cache
def unbroken(case):
    results, _ = emulate(case)
    check(case, results)
    for schedule in SCHEDULES:
        again, emulator = emulate(case, schedule)
        assert faults(emulator) == []
        assert all(torch.equal(part, results[name]) for name, part in again.items())
    return results


@pytest.mark.parametrize(("name", "case", "kernel", "change", "harmless"), MUTATIONS)
def test_mutation(name, case, kernel, change, harmless):
    broken = in_kernel(kernel, change)
    noticed = (notice(case, schedule, broken) for schedule in SCHEDULES)
    if harmless is None:
        assert any(noticed), name
    else:
        assert not any(noticed), f"{name}: {harmless}"


def notice(case, schedule, change):
    """How a change shows, or nothing."""
    expected, changed = unbroken(case), []

    def mutate(ptx):
        changed.append(change(ptx) != ptx)
        return change(ptx)

    try:
        results, emulator = emulate(case, schedule, mutate=mutate)
        assert any(changed)
    except EmulationError as error:
        return str(error)
    if found := faults(emulator):
        return found
    return [name for name, part in results.items() if not torch.equal(part, expected[name])]


# The counter's value reaches the other warps through shared memory, behind a barrier.
OF_WAIT = exchange._await, "tl.debug_barrier()"


@pytest.mark.parametrize(
    ("case", "kernel", "redundant"),
    [
        (FLAG, "backward_kernel", []),
        (COUNTER, "forward_kernel", [OF_WAIT]),
    ],
    ids=["flag", "counter"],
)
def test_every_barrier_is_needed(case, kernel, redundant):
    """Each is removed in turn."""
    _, emulator = emulate(case)
    ptx = next(launch.ptx for launch in emulator.launches if launch.kernel == kernel)
    every = list(without_each(BARRIER, ptx))
    assert len(every) > 15
    missed = [
        source
        for source, change in every
        if not any(notice(case, schedule, in_kernel(kernel, change)) for schedule in SCHEDULES[:3])
    ]
    assert missed == [place_of(function, text) for function, text in redundant]
