"""Every broken kernel is noticed: by what the emulator finds, or by wrong numbers.

Changes that are harmless by design are not noticed; the reason is given with each.
"""

from __future__ import annotations

import functools

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastrnn.kernels import fragments, persistent, words
from fastrnn.kernels.configs import Config

from .driver import EmulationError, Schedule
from .layers import Case, check, emulate, faults
from .mutations import (
    AGAIN,
    BARRIER,
    LOAD,
    STORE,
    in_kernel,
    place_of,
    replaced,
    stored_by_halves,
    waiting_for_words,
    with_one_set_of_buffers,
    without,
    without_each,
)

SCHEDULES = [
    Schedule(0),
    Schedule(1, "starve-warp", "lazy"),
    Schedule(2, "bursts", "lazy"),
    Schedule(3, "starve-cta", "random"),
    Schedule(4, "one", "at once"),
]
KERNELS = ("forward_kernel", "backward_kernel")


def persistent_case(cell, hidden, batch, dtype, *tile):
    block_b, num_warps, in_registers = tile
    config = Config("persistent", block_b, 16, 16, num_warps, in_registers, 9)
    # The first step, some pairs of steps, and one more.
    return Case(cell, hidden, batch, 4, dtype, schedule="persistent", configs=(config, config))


# Words of two elements; 16-byte vectors, with weights in shared memory; words whose halves arrive
# separately; two tiles per program, the second with four rows, and several chunks.
PAIRS = persistent_case("gru", 50, 16, "bfloat16", 16, 4, 9)
VECTORS = persistent_case("lstm", 40, 16, "float32", 16, 8, 0)
HALVES = persistent_case("gru", 33, 16, "float16", 16, 4, 9)
TILES = persistent_case("lstm", 72, 20, "bfloat16", 32, 4, 1)
NAMES = {PAIRS: "pairs", VECTORS: "vectors", HALVES: "halves", TILES: "tiles"}
STEPS = Case("lstm", 96, 20, 3, schedule="stepwise")
# Not planned, but possible on sm_90.
ROWS_64 = Config("stepwise", 64, 32, 32, 4, 0, 65535)
WARP_GROUP = Case("lstm", 96, 50, 3, "float32", configs=(ROWS_64, ROWS_64))

ANY = r"or\.pred any, missing0, missing1;"


def of_waits():
    """Yield name, cases, change."""
    yield "the wait is not repeated", NAMES, replaced(AGAIN, "")
    yield "only the first row is waited for", NAMES, replaced(ANY, "mov.pred any, missing0;")
    yield "only the second row is waited for", NAMES, replaced(ANY, "mov.pred any, missing1;")
    untested = replaced(r"^setp\.eq\.or\.s32 missing1, %r\d+, -1, missing1;$", "")
    yield "a word of a vector is not waited for", (PAIRS, VECTORS, TILES), untested
    yield "halves are waited for as words", (HALVES,), waiting_for_words
    yield "the load is plain", NAMES, replaced(LOAD, "ld.global")
    # The last load that a wait repeats.
    last = rf"({LOAD}.*, \[%rd\d+\+)\d+\];(?=\n(.*mov\.b32.*\n)*bra AGAIN;)"
    yield "other words are loaded again", NAMES, replaced(last, r"\g<1>32];")
    # The loads examined later, at the start of each wait.
    first = r"(setp\.gt\.s32 inside, %r\d+, 0;\n(?:mov.*\n)?@inside ld\.relaxed.*\+)0\];"
    yield "other words are loaded at first", NAMES, replaced(first, r"\g<1>32];")
    beyond = replaced(r"min\.s32\s+(%r\d+), (%r\d+), %r\d+;", r"mov.b32 \1, \2;")
    yield "rows that are not there are waited for", (TILES,), beyond


def of_publishing():
    """Yield name, cases, change."""
    yield "the store is plain", NAMES, replaced(STORE, "st.global")
    yield "a store is missing", NAMES, without(rf"@p {STORE}")
    last = replaced(rf"@p {STORE}.*(?![\s\S]*{STORE})", "")
    yield "the last store is missing", NAMES, last
    bare = replaced(rf"@p {STORE}", "st.relaxed.gpu.global", count=1)
    yield "a store without its mask", (PAIRS, HALVES, TILES), bare
    yield "words are stored by halves", (PAIRS, VECTORS, TILES), stored_by_halves
    # For every lane but the last the next lane's, for the last another warp's.
    kept = replaced(r"(ld\.shared\.v4\.b32\s+\{.*\}, \[%r\d+\+)512\]", r"\g<1>528]")
    yield "a kept chunk from another place", (VECTORS,), kept


def of_steps():
    """Yield name, case, change, of forward kernels."""
    less = replaced(
        r"cp\.async\.wait_group\s+(\d)", lambda m: f"cp.async.wait_group {int(m[1]) + 2}"
    )
    yield "waits for one copy less", STEPS, less
    yield "no barrier after the copies", STEPS, without(BARRIER, after=r"cp\.async\.wait_group")
    unfenced = replaced(r"^\s*fence\.proxy\.async.*$", "")
    yield "no fence before a warp-group product", WARP_GROUP, unfenced
    early = replaced(r"wgmma\.wait_group\.sync\.aligned \d", "wgmma.wait_group.sync.aligned 7")
    yield "a warp-group product is not waited for", WARP_GROUP, early


MUTATIONS = [
    *(
        pytest.param(case, kernel, change, id=f"{name}-{NAMES[case]}-{kernel}".replace(" ", "-"))
        for name, cases, change in [*of_waits(), *of_publishing()]
        for case in cases
        for kernel in KERNELS
    ),
    *(
        pytest.param(case, KERNELS[0], change, id=name.replace(" ", "-"))
        for name, case, change in of_steps()
    ),
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


@pytest.mark.sweep(5)
@pytest.mark.parametrize(("case", "kernel", "change"), MUTATIONS)
def test_mutation(case, kernel, change):
    assert any(notice(case, schedule, in_kernel(kernel, change)) for schedule in SCHEDULES)


def notice(case, schedule, change=None):
    """Return how a change shows, or nothing."""
    expected, changed = unbroken(case), []

    def mutate(ptx):
        mutated = change(ptx) if change else ptx
        changed.append(mutated != ptx or change is None)
        return mutated

    try:
        results, emulator = emulate(case, schedule, mutate=mutate)
        assert any(changed)
    except EmulationError as error:
        return str(error)
    if found := faults(emulator):
        return found
    return [name for name, part in results.items() if not torch.equal(part, expected[name])]


publish = words.publish


@gluon.jit
def publish_early(pointers, tile, mask, hidden: gl.constexpr):
    """Publish something else first, as if before the cell had run."""
    publish(pointers, tile + tile, mask, hidden)
    publish(pointers, tile, mask, hidden)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("case", NAMES, ids=NAMES.values())
def test_published_early(replace, case):
    unbroken(case)
    replace("persistent.publish", publish_early)
    assert any(notice(case, schedule) for schedule in SCHEDULES)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_set_of_buffers(kernel):
    """The compiler itself would not merge them: it would add a barrier to each step."""
    tiles = 3 if kernel == "forward_kernel" else 1
    change = in_kernel(kernel, with_one_set_of_buffers(tiles * 4 * 16 * 16 * 4))
    assert any(notice(PAIRS, schedule, change) for schedule in SCHEDULES)


OF_KEPT = fragments.kept, "memory.load"  # a thread loads only what it stored itself
# The first step that uses these buffers again has another barrier before its end.
OF_FIRST_STEP = persistent.forward_kernel, "_barrier()  # before others overwrite"
# A step could begin without it, but then the compiler would insert one into each step.
OF_PROLOGUE = persistent.backward_kernel, "_barrier()  # else the compiler"
# The second of two tiles last used the other buffers, before the barrier of its step.
OF_LAST_TILE = persistent.backward_kernel, "_barrier()  # others may still read the sums"


@pytest.mark.sweep(4)
@pytest.mark.parametrize(
    ("case", "kernel", "redundant"),
    [
        (PAIRS, "forward_kernel", [OF_FIRST_STEP]),
        (PAIRS, "backward_kernel", []),
        (VECTORS, "forward_kernel", [OF_KEPT, OF_FIRST_STEP]),
        (VECTORS, "backward_kernel", [OF_PROLOGUE]),
        (TILES, "forward_kernel", [OF_KEPT, OF_FIRST_STEP]),
        (TILES, "backward_kernel", [OF_LAST_TILE]),
    ],
    ids=[f"{name}-{kernel}" for name in ("pairs", "vectors", "tiles") for kernel in KERNELS],
)
def test_every_barrier_is_needed(case, kernel, redundant):
    """Each barrier is removed in turn."""
    _, emulator = emulate(case)
    ptx = next(launch.ptx for launch in emulator.launches if launch.kernel == kernel)
    every = list(without_each(BARRIER, ptx))
    assert len(every) >= 5
    missed = [
        source
        for source, change in every
        if not any(notice(case, schedule, in_kernel(kernel, change)) for schedule in SCHEDULES)
    ]
    assert missed == [place_of(function, text) for function, text in redundant]
