"""Estimate the time step of a compiled kernel from its machine code: simulated, not measured.

Nothing here has been measured on a GPU. ``python -m fastrnn.bench.step_time FILE.cubin`` simulates
one multiprocessor, which issues in order, on real machine code (``sass.py``): warps on four
sub-cores, each issuing one instruction per cycle; execution pipes with an issue interval; barriers
across all warps; the memory path, which consists of an address unit per sub-core, a path that the
sub-cores share, and the bytes per cycle of shared memory and of L2. The compiler itself knows the
fixed latencies and encodes them as stall counts, 24 cycles for dependent matrix products;
`CONSTANTS` only has variable latencies, and intervals. Bank conflicts, the instruction cache,
register file ports, hot lines of L2 and clocks below boost are not modeled; all of these make a
kernel slower.

The exchange: all programs are assumed to behave like the simulated one, in lockstep with it. Data
are in L2 `visible` cycles after the last publishing store of the program's warps. A polling load
sees them if it reaches L2, half its latency after issue, later than that. A poll with a load that
was too early fails, and costs a whole iteration. The result is a mean over shifts of `visible` by
up to half an iteration in either direction, which represent skew between programs. Waits for a
counter, by atomic operations, always succeed at once. Of the conditional branches, only poll loops
and jumps out of them are evaluated; all others are not taken.

How far to trust it: see `ERROR`. The ratio of two kernels with the same kind of exchange is right
to 10 %, of other kernels to 25 %. ``step_known.py`` compares small loops with known figures. The
decisive test is a complete published kernel, compiled here, with nothing fitted to it: the Triton
kernel of FlashRNN (a fused LSTM, 4 warps, gates saved) on an H100, 16 rows, 1024 steps. The
simulated time is 0.77 to 1.06 of the measured one, in microseconds per step:

=====================================================  =====  =====  =====  =====
size of a head                                             16     32     64    128
=====================================================  =====  =====  =====  =====
published, end to end                                   1.92   1.41   1.94   3.15
less 0.15, an estimate of the copy of wx and launches   1.77   1.26   1.79   3.00
simulated                                               1.88   1.03   1.37   2.51
simulated / that                                        1.06   0.82   0.77   0.84
=====================================================  =====  =====  =====  =====

The unusual order, 16 slower than 32, is reproduced too. No published kernel with an exchange could
be compiled for comparison. With every variable constant at its low or high end, the time of kernels
with an exchange changes by -10 to +40 %; `visible` alone, for which no measurement is known,
accounts for up to 33 % of that.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, NoReturn

from .. import _arguments
from . import sass, terminal
from .sass import Instruction, Loop

#: Expected error of a time: the real one is from 10 % less to 40 % more.
ERROR = (-0.10, 0.40)

DEVICES = ("h100", "a100")


class Constant(NamedTuple):
    """A number for each device, and its source."""

    h100: float
    a100: float
    source: str


#: Cycles, unless the source says otherwise. Abbreviations of the sources:
#:
#: - *stalls*: read from the stall counts of ptxas 12.8
#: - *Huerta*: Huerta et al., "Dissecting and Modeling the Architecture of Modern GPU Cores", MICRO
#:   2025, tables 1 and 2, of an RTX A6000
#: - *Study*: "CUDA Performance Study, H100 SXM5", on GitHub, at 1.98 GHz
#: - *MT4G*: sample results of MT4G, for H100 HBM3 and A100 PCIe
#: - *GH200*: latencies in markdewing/AI_kernels
#: - *guide*: the CUDA programming guide
#: - *memory*: from memory, without the paper at hand
CONSTANTS: dict[str, Constant] = {
    "clock_mhz": Constant(1980, 1410, "boost clock, data sheet"),
    "alu": Constant(2, 2, "interval: 16 lanes of a sub-core; stalls pad ISETP and SEL by 2"),
    "fma": Constant(1, 2, "interval: 128 and 64 lanes; Study: FADD 1.0 on H100"),
    "imad": Constant(2, 2, "interval: 64 lanes; Study: IMUL 2.1"),
    "xu": Constant(8, 8, "interval: 16 lanes, guide; Study: 8.5 to 9.1; stalls pad by 8"),
    "udp": Constant(2, 2, "interval of the uniform datapath, estimate"),
    "hmma": Constant(
        6, 8, "interval of 16816 and of tf32 1688, stalls; Luo et al.: 62 % of wgmma's peak, memory"
    ),
    "agu": Constant(4, 4, "interval of a sub-core's address unit, Huerta"),
    "lsu": Constant(2, 2, "interval of the path that sub-cores share, Huerta"),
    "shared_bytes": Constant(128, 128, "bytes a cycle, guide"),
    "l2_bytes": Constant(64, 64, "bytes a cycle into a multiprocessor, white papers"),
    "l2_total": Constant(
        2456, 1808, "bytes a cycle out of L2, for all that read; MT4G: 4529 and 2374 GiB/s"
    ),
    "lat_lds": Constant(24, 24, "Huerta; Study: 28.6 with 5 of its loop"),
    "lat_ldsm_more": Constant(
        2, 2, "for each further 128 bytes: x1 23, x4 29; estimate after Sun et al. 2022, memory"
    ),
    "lat_l2": Constant(
        262, 220, "Study 260 and GH200 281 less 5 to 8 of a loop, MT4G 219 nearby; A100: MT4G 221"
    ),
    "lat_dram": Constant(
        680,
        560,
        "GH200 690 less a loop, Study 570, MT4G 834; A100: MT4G 640, Luo et al. 466, memory",
    ),
    "lat_xu": Constant(20, 20, "accel-sim's RTX 3070: 21"),
    "lat_shfl": Constant(24, 24, "as shared memory, the same path; estimate"),
    "lat_redux": Constant(24, 24, "estimate"),
    "lat_ldc": Constant(26, 26, "Huerta"),
    "lat_s2r": Constant(20, 20, "estimate"),
    "lat_atom": Constant(500, 450, "to L2 and back, and the unit behind it; estimate"),
    "war": Constant(12, 12, "the operands of a store are read after 10 to 20, Huerta"),
    "bar": Constant(22, 22, "last arrival to the next issue, of 20 to 30; estimate"),
    "branch": Constant(
        5, 5, "taken, beyond the stall count; fitted: a loop of one FADD takes 29, Study"
    ),
    "visible": Constant(
        200, 170, "a store's issue to readable in L2: half lat_l2, and 70 and 60; estimate"
    ),
    "poll_more": Constant(
        0, 0, "what if a turn's second and later polling loads took so long; 0 for lat_l2"
    ),
}

_SHIFTS = 6  # of `visible`, over an iteration of the poll
_TURNS = 3  # iterations of the loop: the last one counts, with pipes and queues in steady state
_PATIENCE = 1000  # iterations of a poll
_SUB_CORES = 4
_QUEUE = 20  # cycles of the instructions that can queue for an address unit, five of them


class Step(NamedTuple):
    """The cost of a time step. Counts are what the simulated warp or program executed.

    Attributes
    ----------
    cycles, least, most : float
        Mean, minimum and maximum over the shifts.
    barriers : float
        Barriers per warp.
    polls : float
        Decisions of a warp whether its data had arrived, including failed polls.
    chain : int
        Matrix products that each accumulate onto the previous one, per iteration of the loop.
    matrix, instructions : float
        Matrix products, and all instructions, per warp.
    l2_bytes : float
        Bytes that polling loads and asynchronous copies read, per program.
    shared_bytes : float
        Bytes that a program moves in shared memory.
    dram_bytes : float
        Bytes that other loads read, per program; assumed to come from DRAM.
    """

    cycles: float
    least: float
    most: float
    barriers: float
    polls: float
    chain: int
    matrix: float
    instructions: float
    l2_bytes: float
    shared_bytes: float
    dram_bytes: float


class Explained(NamedTuple):
    """A step and its critical path.

    Attributes
    ----------
    step : Step
    turn : float
        Cycles of a poll iteration, from its first load to the decision.
    causes, lines : dict of str to float
        Cycles by cause and by line of the source.
    """

    step: Step
    turn: float
    causes: dict[str, float]
    lines: dict[str, float]


def simulate(
    cubin: bytes,
    device: str,
    num_warps: int,
    *,
    programs: int = 1,
    trips: int = 0,
    steps: int | None = None,
    tiles: int = 1,
    constants: Mapping[str, float] | None = None,
) -> Step:
    """Estimate the time step of a kernel.

    Parameters
    ----------
    cubin : bytes
    device : str
        'h100' or 'a100', for which the kernel must have been compiled.
    num_warps : int
        Warps of a program.
    programs : int
        How many programs read from L2 at once.
    trips : int
        If not 0, the kernel is a single step without a loop through time, and its loop over
        products has this trip count.
    steps : int or None
        Time steps per iteration of the loop; counted by default, see `sass.time_loop`.
    tiles : int
        Batch tiles that a program alternates between: a poll waits for what was published that many
        exchanges ago.
    constants : mapping of str to float, optional
        Replacements for those of the device.

    Returns
    -------
    Step

    Raises
    ------
    RuntimeError
        If a barrier is not reached by all warps, or a poll never ends.
    ValueError
        If there is no loop, or no constant of that name.
    """
    loop = _loop(cubin, trips, steps, tiles)
    model = _Model(loop, num_warps, tiles, _constants(device, programs, constants))
    return _explained(model, with_path=False).step


def explain(
    cubin: bytes,
    device: str,
    num_warps: int,
    *,
    programs: int = 1,
    trips: int = 0,
    steps: int | None = None,
    tiles: int = 1,
    constants: Mapping[str, float] | None = None,
) -> Explained:
    """Estimate a time step and break it down; like `simulate`, but somewhat slower.

    Parameters
    ----------
    cubin : bytes
    device : str
    num_warps, programs, trips : int
    steps : int or None
    tiles : int
    constants : mapping of str to float, optional

    Returns
    -------
    Explained
    """
    loop = _loop(cubin, trips, steps, tiles)
    model = _Model(loop, num_warps, tiles, _constants(device, programs, constants))
    return _explained(model, with_path=True)


def _loop(cubin: bytes, trips: int, steps: int | None, tiles: int) -> Loop:
    code = sass.read(cubin)
    return sass.straight(code, trips) if trips else sass.time_loop(code, steps, tiles)


def _constants(device: str, programs: int, others: Mapping[str, float] | None) -> dict[str, float]:
    if device not in DEVICES:
        raise ValueError(f"no constants of {device!r}, only of {', '.join(DEVICES)}")
    others = others or {}
    if unknown := others.keys() - CONSTANTS.keys():
        raise ValueError(f"no constant {', '.join(sorted(unknown))}")
    found = {name: getattr(constant, device) for name, constant in CONSTANTS.items()} | {**others}
    found["l2_bytes"] = min(found["l2_bytes"], found["l2_total"] / programs)
    return found


# The code, as the multiprocessor sees it.


class _Op(NamedTuple):
    """What the simulator needs to know about an instruction.

    `boards` are the scoreboards to wait for; `left` is one of which so many of the latest may still
    be pending (if None, of groups of HGMMA). `address`, `shared_path` and `latency` are in cycles.
    """

    kind: str
    stall: int
    boards: tuple[int, ...]
    left: tuple[int | None, int] | None
    write: int
    read: int
    pipe: str | None
    interval: float
    on_path: bool
    address: float
    shared_path: float
    latency: float
    held: float  # cycles until the operands are read
    bytes: int
    is_group: bool


_ON_PATH = frozenset(
    ("lds", "sts", "ldg", "ldgsts", "poll", "stg", "atom", "shfl", "redux", "ldc", "s2r")
)
_NOT_SHARED = frozenset(("ldc", "s2r"))  # do not use the path that sub-cores share
_SHORT = frozenset(("shfl", "redux", "ldc", "s2r"))  # need no addresses
_PIPES = {"alu": "alu", "fma": "fma", "imad": "fma", "xu": "xu", "udp": "udp", "hmma": "hmma"}


def _op(i: Instruction, constants: Mapping[str, float]) -> _Op:
    kind = sass.kind(i.name)
    pipe, interval = _pipe(i, kind, constants)
    on_path = kind in _ON_PATH
    if on_path:
        busy, latency, moved = _access(i, kind, constants)
        held = constants["war"] + (sass.width(i.name) / 2 if kind in ("stg", "sts") else 0)
    else:
        busy, moved, held = 0, 0, 6
        latency = constants["lat_xu" if kind == "xu" else "lat_s2r"]
    return _Op(
        kind,
        max(i.stall, 1),
        i.wait,
        _left(i),
        i.write,
        i.read,
        pipe,
        interval,
        on_path,
        address=min(2, constants["agu"]) if kind in _SHORT else constants["agu"],
        shared_path=0 if kind in _NOT_SHARED else max(constants["lsu"], busy),
        latency=latency,
        held=held,
        bytes=moved,
        is_group=kind == "hgmma" and "gsb" in i.operands,
    )


def _left(i: Instruction) -> tuple[int | None, int] | None:
    """Parse a DEPBAR.LE: the scoreboard (None: groups of HGMMA), and how many may be pending."""
    if "DEPBAR.LE" not in i.name:
        return None
    match = re.match(r"g?(SB|sb)(\d), 0x(\w+)", i.operands)
    return (int(match[2]) if match[1] == "SB" else None, int(match[3], 16)) if match else None


def _pipe(i: Instruction, kind: str, constants: Mapping[str, float]) -> tuple[str | None, float]:
    """Return the pipe of an instruction, and its issue interval in cycles."""
    if kind == "hgmma":
        columns = re.search(r"64x(\d+)x", i.name)
        assert columns
        n = int(columns[1])
        # The products, or else reading B, and 64 x 16 of A unless it is in registers.
        rows = 64 if re.match(r"R\d+, gdesc", i.operands) else 0
        return "hmma", max(n / 2, (n + rows) * 32 / constants["shared_bytes"])
    return (_PIPES[kind], constants[kind]) if kind in _PIPES else (None, 0)


def _access(i: Instruction, kind: str, constants: Mapping[str, float]) -> tuple[float, float, int]:
    """Return cycles on the shared path, latency, and bytes that a warp moves."""
    size = sass.width(i.name)
    if i.name.startswith(("LDSM", "STSM")):
        match = re.search(r"MT?88\.([24])$", i.name)
        n = int(match[1]) if match else 1
        latency = constants["lat_lds"] - 1 + constants["lat_ldsm_more"] * (n - 1)
        return n * 128 / constants["shared_bytes"], latency, n * 128
    if kind in ("lds", "sts"):
        spilled = 10 if i.name.startswith("LDL") else 0  # extra latency of an L1 hit, Huerta
        latency = constants["lat_lds"] + (2 if size == 16 else 0) + spilled
        return max(1, 32 * size / constants["shared_bytes"]), latency, max(128, 32 * size)
    if kind in ("poll", "ldg", "ldgsts"):
        latency = constants["lat_dram" if kind == "ldg" else "lat_l2"]
        return max(1, size / 4), latency + {16: 6, 8: 2}.get(size, 0), 32 * size
    if kind == "stg":
        return max(1, size / 4), constants["war"], 32 * size
    return 1, constants["lat_" + kind], 0


class _Decision(NamedTuple):
    """For a jump in or around a poll loop: whether it is taken when the data have arrived."""

    if_there: bool
    is_block_wide: bool  # otherwise for each warp separately


class _Model:
    """A loop, with everything that depends on neither time nor warp.

    Attributes
    ----------
    decisions : dict of int to _Decision
        By the index of the jump.
    polling : set of int
        Indices within poll loops, including peeled first iterations.
    """

    def __init__(
        self, loop: Loop, num_warps: int, tiles: int, constants: Mapping[str, float]
    ) -> None:
        self.loop, self.num_warps, self.tiles, self.constants = loop, num_warps, tiles, constants
        self.ops = [_op(i, constants) for i in loop.code]
        self.decisions: dict[int, _Decision] = {}
        for n in loop.places:
            goal = loop.code[n].goal
            if loop.code[n].predicate and goal is not None:
                for poll in loop.polls:
                    self._decide(n, goal, *poll)
        self.polling: set[int] = set()
        self._mark_polls()

    def _decide(self, n: int, goal: int, first: int, last: int) -> None:
        """Record a jump out of a poll loop or to its start, or forward over just this loop."""
        in_loop = first <= n <= last and (goal > last or goal == first)
        starts = (start for start, _ in self.loop.polls)
        over = first - 64 <= n < first and goal > last
        over = over and not any(last < start < goal for start in starts)
        if in_loop or over:
            # A poll with a barrier decides for the block; otherwise each warp waits for its loads.
            is_block_wide = any(self.ops[m].kind == "bar" for m in range(first, last + 1))
            self.decisions[n] = _Decision(goal > last, is_block_wide)

    def _mark_polls(self) -> None:
        loads, before = self.loop.loads, self.loop.first
        for first, last in self.loop.polls:
            peeled = [n for n in loads if before < n < first]
            self.polling.update(range(min([*peeled, first]), last + 1))
            before = last
            if self.constants["poll_more"]:
                inside = [n for n in loads if first <= n <= last]
                for n in (*peeled[1:], *inside[1:]):
                    self.ops[n] = self.ops[n]._replace(latency=self.constants["poll_more"])


# Execution.


class _Issued(NamedTuple):
    """An instruction that was issued.

    `cause` is what delayed it, and `source` the number of the instruction responsible. `poll` is
    the exchange and the iteration of its poll.
    """

    warp: int
    place: int
    time: float
    cause: str
    source: int | None
    turn: int
    poll: tuple[int, int]


class _Decided(NamedTuple):
    poll: tuple[int, int]
    warp: int
    time: float
    is_there: bool


class _Warp:
    """The state of a warp."""

    __slots__ = (
        *("boards", "copies", "groups", "is_waiting", "left", "next", "number", "place", "turn"),
        *("barriers", "exchange", "has_polled", "polls", "previous", "ready", "why"),
    )

    def __init__(self, number: int, loop: Loop) -> None:
        self.number = number
        self.place = loop.first
        self.turn = 0  # iteration of the loop
        self.left = dict(loop.repeats)
        self.previous: int | None = None  # the previous instruction
        self.is_waiting = False  # at a barrier, or forever
        self.barriers = 0
        # Earliest issue of the next instruction, and its cause, without scoreboards; then including
        # them, once computed.
        self.ready = 0.0
        self.why: tuple[str, int | None] = ("start", None)
        self.next: tuple[float, str, int | None] | None = None
        # For each scoreboard, completion times and instructions; HGMMAs and copies in flight.
        self.boards: list[list[tuple[float, int]]] = [[] for _ in range(sass.BOARDS)]
        self.groups: list[tuple[float, int]] = []
        self.copies = 0.0
        # Exchanges in which it published; poll iterations since then.
        self.exchange = self.polls = 0
        self.has_polled = True


class _SubCore:
    """A quarter of a multiprocessor: its warps, the most recent issuer first."""

    __slots__ = ("address", "pipes", "wake", "warps")

    def __init__(self, warps: list[_Warp]) -> None:
        self.warps = warps
        self.wake = 0.0  # when the next instruction may be issued
        self.address = 0.0  # when the address unit is free
        self.pipes: dict[str, float] = defaultdict(float)


class _Exchange:
    """What warps published, when their polls reached L2, and what these found."""

    def __init__(self, num_warps: int, tiles: int, visible: float) -> None:
        self.num_warps, self.tiles, self.visible = num_warps, tiles, visible
        self.decided: list[_Decided] = []
        self._reached: dict[tuple[int, ...], float] = {}  # by the first load of an iteration
        self._published: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self._answers: dict[tuple[int, ...], bool] = {}

    def load(self, warp: _Warp, reach: float) -> None:
        warp.has_polled = True
        poll = warp.exchange, warp.polls
        for key in (poll, (*poll, warp.number)):
            self._reached[key] = min(self._reached.get(key, reach), reach)

    def store(self, warp: _Warp, time: float) -> None:
        if warp.has_polled:
            warp.exchange, warp.polls, warp.has_polled = warp.exchange + 1, 0, False
        self._published[warp.exchange].append((warp.number, time))

    def is_there(self, warp: _Warp, is_block_wide: bool, now: float) -> bool:
        """Return whether the data that a warp, or the block, polled for had arrived."""
        poll = warp.exchange, warp.polls
        key = poll if is_block_wide else (*poll, warp.number)
        if key not in self._answers:
            self._answers[key] = self._answer(key, warp)
        self.decided.append(_Decided(poll, warp.number, now, self._answers[key]))
        warp.polls += 1
        return self._answers[key]

    def _answer(self, key: tuple[int, ...], warp: _Warp) -> bool:
        stores = self._published[warp.exchange + 1 - self.tiles]
        wanted = sum(number == warp.number for number, _ in stores) * self.num_warps
        if key not in self._reached or not wanted:
            return True
        last = max(time for _, time in stores)
        return len(stores) >= wanted and self._reached[key] >= last + self.visible


class _Run:
    """One run of all warps through several iterations of the loop.

    Attributes
    ----------
    history : list of _Issued
    ends : list of (float, int)
        For each iteration, when the last warp finished it, and its jump's index in the history.
    """

    def __init__(self, model: _Model, visible: float) -> None:
        turns = 1 if model.loop.repeats else _TURNS
        self.history: list[_Issued] = []
        self.ends = [(0.0, 0)] * (turns + 1)
        self.exchange = _Exchange(model.num_warps, model.tiles, visible)
        self._loop, self._decisions, self._ops = model.loop, model.decisions, model.ops
        self._bar, self._branch = model.constants["bar"], model.constants["branch"]
        self._to_l2, self._l2_bytes = model.constants["lat_l2"] / 2, model.constants["l2_bytes"]
        self._warps = [_Warp(n, model.loop) for n in range(model.num_warps)]
        self._cores = [_SubCore(self._warps[s::_SUB_CORES]) for s in range(_SUB_CORES)]
        self._running = model.num_warps
        self._now = 0.0
        self._arrived: Counter[int] = Counter()
        self._path = 0.0  # when the path that sub-cores share is free
        self._returns = {False: 0.0, True: 0.0}  # the same for the paths back from L2 and DRAM

    @property
    def cycles(self) -> float:
        """Cycles of the last iteration of the loop."""
        return self.ends[-1][0] - self.ends[-2][0]

    def go(self) -> _Run:
        while self._running:
            for core in self._cores:
                if core.wake <= self._now:
                    core.wake = self._visit(core)
            soonest = min([core.wake for core in self._cores])
            if soonest == math.inf and self._running:
                self._give_up()
            self._now = max(soonest, self._now + 1)
        return self

    def _give_up(self) -> NoReturn:
        if any(warp.is_waiting and warp.turn < len(self.ends) - 1 for warp in self._warps):
            raise RuntimeError("a barrier that not all warps reach")
        raise RuntimeError("a poll that never ends")

    def _visit(self, core: _SubCore) -> float:
        """Issue one instruction, if possible; return when to try again."""
        now, soonest = self._now, math.inf
        for warp in core.warps:
            if warp.is_waiting:
                continue
            op = self._ops[warp.place]
            when, cause, source = warp.next or self._earliest(core, warp, op)
            if op.pipe and core.pipes[op.pipe] > when:
                when, source = core.pipes[op.pipe], warp.previous
                cause = "HMMA pipe" if op.pipe == "hmma" else "pipe"
            if when > now:
                soonest = min(soonest, when)
                continue
            if cause == "stall" and now > when:
                cause = "slot"
            self._issue(core, warp, op, cause, source)
            core.warps.remove(warp)  # greedy, then oldest: the same warp as long as it can issue
            core.warps.insert(0, warp)
            return now + 1
        return soonest

    def _earliest(self, core: _SubCore, warp: _Warp, op: _Op) -> tuple[float, str, int | None]:
        """Return when a warp's next instruction may be issued, and what delays it longest."""
        best, (cause, source) = warp.ready, warp.why
        for board in op.boards:
            if warp.boards[board]:
                done, number = max(warp.boards[board])
                if done > best:
                    best, cause, source = done, "scoreboard", number
        if op.left:
            board_or_groups, most = op.left
            under_way = warp.groups if board_or_groups is None else warp.boards[board_or_groups]
            for done, number in sorted(under_way)[: max(0, len(under_way) - most)]:
                if done > best:
                    best, cause, source = done, "scoreboard", number
        if op.on_path and core.address - _QUEUE > best:
            return core.address - _QUEUE, "queue", warp.previous  # the queue may still grow
        warp.next = best, cause, source
        return warp.next

    def _issue(self, core: _SubCore, warp: _Warp, op: _Op, cause: str, source: int | None) -> None:
        now, number, place = self._now, len(self.history), warp.place
        poll = warp.exchange, warp.polls
        self.history.append(_Issued(warp.number, place, now, cause, source, warp.turn, poll))
        warp.previous, warp.next = number, None
        warp.ready, warp.why = now + op.stall, ("stall", number)
        if op.pipe:
            core.pipes[op.pipe] = now + op.interval
        done, is_read = now + op.latency, now + op.held
        if op.on_path:
            done, is_read = self._access(core, warp, op)
        elif op.kind == "hgmma":
            started = [(now + op.interval + 32, number)] if op.is_group else []
            warp.groups = [*_after(now, warp.groups), *started]
        elif self._loop.code[place].name == "LDGDEPBAR":
            done = warp.copies
        for board, until in ((op.write, done), (op.read, is_read)):
            if board < sass.BOARDS:
                warp.boards[board] = [*_after(now, warp.boards[board]), (until, number)]
        warp.place += 1
        if op.kind == "bar":
            self._arrive(warp, number)
        elif self._loop.code[place].goal is not None:
            self._jump(warp, number, place)

    def _access(self, core: _SubCore, warp: _Warp, op: _Op) -> tuple[float, float]:
        """Send a memory request; return when it completes, and when its operands are read."""
        begin = max(self._now, core.address)
        core.address = begin + op.address
        if op.shared_path:
            begin = max(begin, self._path)
            self._path = begin + op.shared_path
        done = begin + op.latency
        if op.kind in ("poll", "ldg", "ldgsts"):
            from_memory = op.kind == "ldg"
            done = max(done, self._returns[from_memory] + op.bytes / self._l2_bytes)
            self._returns[from_memory] = done
            if op.kind == "poll":
                self.exchange.load(warp, begin + self._to_l2)
            elif op.kind == "ldgsts":
                warp.copies = max(warp.copies, done)
        if warp.place in self._loop.publish:
            self.exchange.store(warp, begin)
        return done, begin + op.held

    def _arrive(self, warp: _Warp, number: int) -> None:
        """Wait at a barrier, or release all warps."""
        self._arrived[warp.barriers] += 1
        warp.is_waiting = True
        if self._arrived[warp.barriers] == len(self._warps):
            release = self._now + self._bar
            for other in self._warps:
                other.is_waiting, other.next = False, None
                if release > other.ready:
                    other.ready, other.why = release, ("barrier", number)
            for core in self._cores:
                core.wake = self._now
        warp.barriers += 1

    def _jump(self, warp: _Warp, number: int, place: int) -> None:
        """Continue at a jump's target, if it is taken."""
        code = self._loop.code[place]
        taken = not code.predicate
        if place == self._loop.last:
            taken = True
            warp.turn += 1
            warp.left = dict(self._loop.repeats)
            self.ends[warp.turn] = self._now, number
            if warp.turn == len(self.ends) - 1:
                warp.is_waiting = True
                self._running -= 1
        elif place in self._decisions:
            if_there, is_block_wide = self._decisions[place]
            taken = self.exchange.is_there(warp, is_block_wide, self._now) == if_there
            if warp.polls > _PATIENCE:
                self._give_up()
        elif place in warp.left:
            warp.left[place] -= 1
            taken = warp.left[place] >= 0
        if taken:
            assert code.goal is not None
            warp.place = code.goal
            warp.ready += self._branch


def _after(now: float, pending: list[tuple[float, int]]) -> list[tuple[float, int]]:
    return [item for item in pending if item[0] > now]


def _explained(model: _Model, with_path: bool) -> Explained:
    """Average the runs, per time step."""
    turn = _turn(model) if model.loop.polls else 0.0
    cycles: list[float] = []
    counts: Counter[str] = Counter()
    causes: dict[str, float] = defaultdict(float)
    lines: dict[str, float] = defaultdict(float)
    for run in _shifted(model, turn):
        cycles.append(run.cycles / model.loop.steps)
        counts.update(_counts(model, run))
        for cause, line, part in _critical_path(model, run) if with_path else ():
            causes[cause] += part
            lines[line] += part
    steps = len(cycles) * model.loop.steps
    step = Step(
        statistics.mean(cycles),
        min(cycles),
        max(cycles),
        chain=sass.longest_chain(model.loop),
        **{name: counts[name] / steps for name in Step._fields[3:] if name != "chain"},
    )
    means = [{key: part / steps for key, part in parts.items()} for parts in (causes, lines)]
    return Explained(step, turn, *means)


def _turn(model: _Model) -> float:
    """Return the cycles from the first load of a warp's last poll to its decision."""
    run = _Run(model, model.constants["visible"]).go()
    loads: dict[tuple[int, int], float] = {}
    for issued in run.history:
        if issued.warp == 0 and model.ops[issued.place].kind == "poll":
            loads.setdefault(issued.poll, issued.time)
    turns = (
        decided.time - loads[decided.poll]
        for decided in reversed(run.exchange.decided)
        if decided.warp == 0 and decided.poll in loads
    )
    return next(turns, 0.0)


def _shifted(model: _Model, turn: float) -> Iterator[_Run]:
    """Run with shifts, over an iteration of the poll, of the time at which data become visible."""
    cycles: list[float] = []
    # The extremes first: if they are equal, the exchange does not limit a step.
    for n in (0, *range(_SHIFTS - 1, 0, -1)):
        shift = turn * ((n + 0.5) / _SHIFTS - 0.5)
        run = _Run(model, max(0.0, model.constants["visible"] + shift)).go()
        yield run
        cycles.append(run.cycles)
        if not turn or (len(cycles) == 2 and cycles[0] == cycles[1]):
            break


def _counts(model: _Model, run: _Run) -> Counter[str]:
    """Count instructions of a warp and bytes of the program in the loop's last iteration."""
    counts: Counter[str] = Counter()
    (start, _), (end, _) = run.ends[-2:]
    counts["polls"] = sum(d.warp == 0 and start < d.time <= end for d in run.exchange.decided)
    for issued in run.history:
        if issued.turn == len(run.ends) - 2:
            op = model.ops[issued.place]
            if op.kind in _MOVED:
                counts[_MOVED[op.kind]] += op.bytes
            if issued.warp == 0:
                counts["instructions"] += 1
                counts["barriers"] += op.kind == "bar"
                counts["matrix"] += op.kind in ("hmma", "hgmma")
    return counts


_MOVED = {
    "poll": "l2_bytes",
    "ldgsts": "l2_bytes",
    "lds": "shared_bytes",
    "sts": "shared_bytes",
    "ldg": "dram_bytes",
}


# Attribution of a step's time.


_CAUSES = {
    "hmma": "HMMA chain",
    "hgmma": "HMMA chain",
    "lds": "shared memory",
    "sts": "shared memory",
    "ldg": "data wait",
    "ldgsts": "data wait",
    "poll": "poll: L2",
    "atom": "poll: L2",
    "stg": "stores",
    "shfl": "shuffles",
    "redux": "shuffles",
    "xu": "pointwise",
    "ldc": "issue",
    "s2r": "issue",
}
_HELD = {
    "barrier": "barriers",
    "HMMA pipe": "HMMA issue",
    "pipe": "issue",
    "queue": "shared memory",
}
_AFTER_HMMA = frozenset(("hmma", "control", "lds", "alu", "imad"))
_HMMA_CYCLES = 26  # a stall this soon after one waits for its result


def _critical_path(model: _Model, run: _Run) -> Iterator[tuple[str, str, float]]:
    """Walk the critical path back over the last iteration: cause, line and cycles of each part."""
    history = run.history
    failed = {decided.poll for decided in run.exchange.decided if not decided.is_there}
    last_hmma = _last_hmma(model, run)
    (start, _), (_, at) = run.ends[-2:]
    while history[at].time > start:
        issued = history[at]
        if issued.source is None:
            break
        source = history[issued.source]
        kind, cause = model.ops[source.place].kind, issued.cause
        if kind == "poll" or source.place in model.polling:
            is_load = kind == "poll" and cause == "scoreboard"
            name = "poll: L2" if is_load else "poll: test"
            name = "failed polls" if source.poll in failed else name
        elif (
            cause in ("stall", "slot")
            and issued.time - last_hmma[issued.source] <= _HMMA_CYCLES
            and model.ops[issued.place].kind in _AFTER_HMMA
        ):
            name = "HMMA chain"
        elif cause == "scoreboard":
            name = _CAUSES.get(kind, "pointwise")
        else:
            is_issue = kind in _ON_PATH or kind == "control"
            name = _HELD.get(cause) or ("issue" if is_issue else "pointwise")
        line = model.loop.code[source.place].line or "?"
        yield name, line, issued.time - max(source.time, start)
        at = issued.source


def _last_hmma(model: _Model, run: _Run) -> list[float]:
    """Return, for each instruction in the history, when its warp last issued a matrix product."""
    recent: dict[int, float] = {}
    found = []
    for issued in run.history:
        if model.ops[issued.place].kind == "hmma":
            recent[issued.warp] = issued.time
        found.append(recent.get(issued.warp, -math.inf))
    return found


@terminal.printing()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fastrnn.bench.step_time")
    parser.add_argument("files", nargs="*", type=terminal.path, metavar="FILE.cubin")
    parser.add_argument("--device", choices=DEVICES, default="h100")
    parser.add_argument("--warps", type=_arguments.positive, default=8, help="per program")
    parser.add_argument(
        "--programs", type=_arguments.positive, default=1, help="how many read from L2 at once"
    )
    parser.add_argument(
        "--trips",
        type=_arguments.positive,
        default=0,
        help="trip count of the loop over products, if there is no time loop",
    )
    parser.add_argument(
        "--steps", type=_arguments.positive, help="per iteration of the time loop; default: counted"
    )
    parser.add_argument("--tiles", type=_arguments.positive, default=1, help="batch tiles")
    parser.add_argument(
        "--lines", type=_arguments.positive, default=0, help="show source lines on critical path"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", type=_assignment, help="constants"
    )
    args = parser.parse_args(argv)
    for path in args.files:
        try:
            explained = explain(
                path.read_bytes(),
                args.device,
                args.warps,
                programs=args.programs,
                trips=args.trips,
                steps=args.steps,
                tiles=args.tiles,
                constants=dict(args.set),
            )
        except (OSError, RuntimeError, ValueError) as error:
            parser.error(f"{path}: {error}")
        _print(path.name, args.device, explained, args.lines)
    return 0


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    return name, float(value)


def _print(name: str, device: str, explained: Explained, lines: int) -> None:
    step = explained.step
    us = [
        step.cycles * (1 + error) / getattr(CONSTANTS["clock_mhz"], device) for error in (0, *ERROR)
    ]
    print(
        f"{name}: {step.cycles:.0f} cycles a step, {us[0]:.2f} us at boost clock; "
        f"simulated, expect {us[1]:.2f} to {us[2]:.2f}"
    )
    counts = {"turn of the poll": explained.turn, **step._asdict()}
    print("  " + ", ".join(f"{name} {value:.5g}" for name, value in counts.items()))
    for title, cycles in (("causes", explained.causes), ("lines", explained.lines)):
        longest = sorted(cycles.items(), key=lambda item: -item[1])
        shown = longest if title == "causes" else longest[:lines]
        for key, value in shown:
            print(f"  {value:8.0f}  {key}")


if __name__ == "__main__":
    sys.exit(main())
