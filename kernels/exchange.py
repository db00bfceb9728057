"""How the programs of a group hand tiles to each other between two time steps.

A group holds the recurrent weights of one direction, for one tile of the batch. Every program
waits only for its own group. `PROTOCOL` is one of

``local``
    A group of one program; tiles stay in its registers, and nothing here runs.
``flag``
    The payload is its own flag: a consumer polls the data itself, one trip through L2.
    Forward, h goes into a write-once buffer that was filled with a bit pattern that arithmetic
    never produces. Backward, mailboxes of one producer and one consumer are a ring of depth 2,
    and the lowest mantissa bit of a float32 says in which lap it was written. A producer cannot
    overtake: before it writes a mailbox again it has received a whole step that its consumer
    computed from what the mailbox held.
``counter``
    Store, barrier, release-add to a counter of the group; acquire-poll of the counter, barrier,
    load. Two trips, and no assumption about the payload.

A NaN in the data is stored as another bit pattern than the one that means "not there yet", so it
travels like any number. SPIN_LIMIT is for debugging: after so many polls a wait gives up, writes
1 + its step to `error_ptr`, and goes on with what is there. 0 waits for ever.
"""

import triton
import triton.language as tl

MISSING = tl.constexpr(-1)  # all bits set, a NaN, means "not there yet" in a buffer of h


@triton.jit
def _bits(x):
    if x.dtype.primitive_bitwidth == 16:
        return x.to(tl.int16, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def _any(condition):
    return tl.max(tl.ravel(condition.to(tl.int32)), 0) > 0


# One counter for each group, this many int32 apart so that no two share a line of the cache.
_COUNTER_STRIDE = tl.constexpr(32)


def counter_words(groups: int) -> int:
    """int32 words of the counters of a launch; all 0 before it."""
    return groups * _COUNTER_STRIDE.value


@triton.jit
def counter_of(counter_ptr, group):
    return counter_ptr + group * _COUNTER_STRIDE


@triton.jit
def _arrive(counter_ptr):
    tl.debug_barrier()  # every thread has stored, and loaded what it was sent before
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _await(counter_ptr, target, step, error_ptr, SPIN_LIMIT: tl.constexpr):
    polls = 0
    arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (arrived < target) & ((SPIN_LIMIT == 0) | (polls < SPIN_LIMIT)):
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    if SPIN_LIMIT > 0:
        if arrived < target:
            tl.store(error_ptr, step + 1)
    tl.debug_barrier()  # no thread loads before the wait is over


# Forward: each program has a slice of h, everybody needs all of it.


@triton.jit
def publish_state(
    row_ptrs, row_mask, unit0, h, counter_ptr, H: tl.constexpr, PROTOCOL: tl.constexpr
):
    """Store a slice of h where the group reads it."""
    unit = unit0 + tl.arange(0, h.shape[1])
    if PROTOCOL == "flag":
        bits = _bits(h)
        h = tl.where(bits == MISSING, -2, bits).to(h.dtype, bitcast=True)  # from one NaN to another
    mask = row_mask[:, None] & (unit < H)[None, :]
    tl.store(row_ptrs[:, None] + unit[None, :], h, mask=mask)
    if PROTOCOL == "counter":
        _arrive(counter_ptr)


@triton.jit
def load_state(row_ptrs, row_mask, H: tl.constexpr, BLOCK_K: tl.constexpr, VOLATILE: tl.constexpr):
    """Load all of h, [BLOCK_B, H], as a tuple of tiles of BLOCK_K columns."""
    h = ()
    for first in tl.static_range(0, H, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (k < H)[None, :]
        ptrs = row_ptrs[:, None] + k[None, :]
        # Past L1, which does not see what other multiprocessors write.
        if VOLATILE:
            h += (tl.load(ptrs, mask=mask, other=0.0, volatile=True),)
        else:
            h += (tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg"),)
    return h


@triton.jit
def _incomplete(h):
    missing = _any(_bits(h[0]) == MISSING)
    for n in tl.static_range(1, len(h)):
        missing = missing | _any(_bits(h[n]) == MISSING)
    return missing


@triton.jit
def receive_state(
    row_ptrs,
    row_mask,
    counter_ptr,
    arrivals,
    step,
    error_ptr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROTOCOL: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """Wait for all slices of h of a step; `arrivals` counts those of all steps so far."""
    if PROTOCOL == "counter":
        _await(counter_ptr, arrivals, step, error_ptr, SPIN_LIMIT)
        return load_state(row_ptrs, row_mask, H, BLOCK_K, False)
    else:
        h = load_state(row_ptrs, row_mask, H, BLOCK_K, True)
        missing = _incomplete(h)
        polls = 0
        while missing & ((SPIN_LIMIT == 0) | (polls < SPIN_LIMIT)):
            h = load_state(row_ptrs, row_mask, H, BLOCK_K, True)
            missing = _incomplete(h)
            polls += 1
        if SPIN_LIMIT > 0:
            if missing:
                tl.store(error_ptr, step + 1)
        return h


# Backward: each program has a part of dh of every unit, and needs the sum for its own slice.
# Mailboxes of a group: [step % 2, consumer, producer, BLOCK_B, BLOCK_H], the bits of float32.


def mailbox_words(groups: int, slices: int, block_b: int, block_h: int) -> int:
    """int32 words of all mailboxes of a launch; all 0 before it for the flag protocol."""
    return groups * 2 * slices * slices * block_b * block_h


@triton.jit
def mailboxes_of(
    mail_ptr, group, SLICES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr
):
    return mail_ptr + group.to(tl.int64) * (2 * SLICES * SLICES * BLOCK_B * BLOCK_H)


@triton.jit
def _lap(step):
    """1 in the first lap of the ring, so that mailboxes of 0 are not yet full, then in turn."""
    return 1 - (step >> 1 & 1)


@triton.jit
def _tagged(x, lap):
    """Round off the lowest mantissa bit of float32, to even, and put the lap there."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits + (bits >> 1 & 1))
    return bits & -2 | lap


@triton.jit
def send_partial(
    mail_ptr,
    partial,
    first,
    producer,
    step,
    SLICES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROTOCOL: tl.constexpr,
):
    """Send [BLOCK_B, n] of partial dh, of the units from `first` on, to those who own them."""
    unit = first + tl.arange(0, partial.shape[1])
    row = tl.arange(0, BLOCK_B)
    slot = ((step & 1) * SLICES + unit // BLOCK_H) * SLICES + producer
    ptrs = (
        mail_ptr + (slot * BLOCK_B * BLOCK_H + unit % BLOCK_H)[None, :] + (row * BLOCK_H)[:, None]
    )
    if PROTOCOL == "flag":
        payload = _tagged(partial, _lap(step))
    else:
        payload = partial.to(tl.int32, bitcast=True)
    tl.store(ptrs, payload, mask=(unit < SLICES * BLOCK_H)[None, :] & (row >= 0)[:, None])


@triton.jit
def collect_partials(
    mail_ptr,
    counter_ptr,
    consumer,
    step,
    error_ptr,
    SLICES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PROTOCOL: tl.constexpr,
    SPIN_LIMIT: tl.constexpr,
):
    """Wait for what every program of the group sent, BLOCK_S at a time; the sum, in their order."""
    SIZE: tl.constexpr = BLOCK_B * BLOCK_H
    if PROTOCOL == "counter":
        _arrive(counter_ptr)
        _await(counter_ptr, SLICES * (step + 1), step, error_ptr, SPIN_LIMIT)
    total = tl.zeros([SIZE], tl.float32)
    lap = _lap(step)
    for first in tl.static_range(0, SLICES, BLOCK_S):
        producer = first + tl.arange(0, BLOCK_S)
        mask = (producer < SLICES)[:, None] & (tl.arange(0, SIZE) >= 0)[None, :]
        slot = ((step & 1) * SLICES + consumer) * SLICES + producer
        ptrs = mail_ptr + (slot * SIZE)[:, None] + tl.arange(0, SIZE)[None, :]
        if PROTOCOL == "counter":
            bits = tl.load(ptrs, mask=mask, other=0, cache_modifier=".cg")
        else:
            bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
            missing = _any(mask & ((bits & 1) != lap))
            polls = 0
            while missing & ((SPIN_LIMIT == 0) | (polls < SPIN_LIMIT)):
                bits = tl.load(ptrs, mask=mask, other=0, volatile=True)
                missing = _any(mask & ((bits & 1) != lap))
                polls += 1
            if SPIN_LIMIT > 0:
                if missing:
                    tl.store(error_ptr, step + 1)
            bits = bits & -2
        total += tl.sum(bits.to(tl.float32, bitcast=True), 0)
    return tl.reshape(total, [BLOCK_B, BLOCK_H])
