// Who knows of what: causality order as vector clocks of warps.
//
// The rules are of the PTX ISA, chapter "Memory Consistency Model", whose sections are named in
// quotes. Where the engine is said to be laxer than the ISA, it takes more for ordered and may miss
// a race, but makes none up; where stronger, its memory shows fewer of the values that are allowed.
//
// A warp's lanes share one clock: program order between lanes of a warp is assumed here,
// and doubted only for shared memory, where bar.warp.sync counts.
#pragma once
#include "machine.hpp"

inline void join(Clock &clock, const Clock &other) {
    for (size_t i = 0; i < clock.size(); i++)
        clock[i] = std::max(clock[i], other[i]);
}

// What a warp does from now on is not known to who has learnt of it so far.
inline void Machine::tick(Warp &warp) {
    warp.clock[warp.id]++;
    warp.practical[warp.id] = warp.clock[warp.id];
}

// An edge of causality order to here.
inline void Machine::learn(Warp &warp, const Clock &clock) {
    join(warp.clock, clock);
    join(warp.practical, clock);
    warp.practical_changed = true;
}

// A strong read returns what `writer` stored at its time `clock`, so that all which the writer knew
// has happened. That is an edge of "Observation Order" without a release pattern, and so none of
// "Causality Order": it tells only how bad a missing order is.
inline void Machine::learn_practical(Warp &warp, i32 writer, u32 clock) {
    const auto &snapshots = warps[writer].snapshots;
    auto later = [](u32 time, const Snapshot &snapshot) { return time < snapshot.since; };
    auto after = std::upper_bound(snapshots.begin(), snapshots.end(), clock, later);
    if (after != snapshots.begin())
        join(warp.practical, std::prev(after)->practical);
    warp.practical[writer] = std::max(warp.practical[writer], clock);
    warp.practical_changed = true;
}

// Before a store. The clock is kept only where it differs from that of the store before by more
// than the warp's own time, which the reader has from the shadow. The oldest are forgotten where
// there are many: who reads so old a value may then be said to be "UNORDERED" with what is ordered
// by values, never the other way round.
inline void Machine::take_snapshot(Warp &warp) {
    if (!warp.practical_changed)
        return;
    constexpr size_t MOST_WORDS = size_t(1) << 26; // of all warps' snapshots, 256 MiB
    size_t most = std::max<size_t>(8, MOST_WORDS / n_warps / n_warps);
    auto &snapshots = warp.snapshots;
    if (snapshots.size() >= most)
        snapshots.erase(snapshots.begin(), snapshots.begin() + most / 2);
    snapshots.push_back({warp.clock[warp.id], warp.practical});
    warp.practical_changed = false;
}

// "Release and Acquire Patterns": a strong read of a place that a release pattern wrote. It
// synchronizes at once if it acquires, else with the next acquire fence.
//
// Laxer than the ISA: scopes are not compared (each is taken for .gpu), a weak store to the place
// does not end its release sequence, and the read counts even if the release is still in the
// writer's store buffer.
inline void Machine::observe(Warp &warp, u64 address, bool acquire) {
    const Clock *clock = published.find(address);
    if (!clock)
        return;
    if (acquire) {
        learn(warp, *clock);
        return;
    }
    if (warp.acquired.empty())
        warp.acquired.assign(n_warps, 0);
    join(warp.acquired, *clock);
}

// The other end: a strong write that releases, or that comes after a release fence. A read-modify-
// write continues the release sequence it reads from, any other strong write ends it.
inline void Machine::publish(Warp &warp, u64 address, bool release, bool read_modify_write) {
    if (!read_modify_write)
        published.erase(address);
    if (!release && warp.released.empty())
        return;
    Clock &clock = published[address];
    if (clock.empty())
        clock.assign(n_warps, 0);
    join(clock, release ? warp.clock : warp.released);
}
