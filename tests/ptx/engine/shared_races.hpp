// Races in shared memory, by granule: the smallest access of the program, so that each access
// covers whole granules.
//
// The rules are those of global memory ("Conflict and Data-races"; all of these accesses are weak),
// and three more: lanes of a warp, copies in flight, and the async proxy.
#pragma once
#include "clocks.hpp"

template <class Action> void Machine::for_granules(Cta &cta, u32 address, u32 size, Action action) {
    for (u32 g = address >> shared_shift; g <= (address + size - 1) >> shared_shift; g++)
        action(cta.shadows[g]);
}

inline void Machine::check_last_shared_write(Warp &warp, Cta &cta, u32 granule, bool write,
                                             bool same_value, i32 pc, int lane) {
    const SharedShadow &shadow = cta.shadows[granule];
    const u32 byte = granule << shared_shift;
    // "Asynchronous Operations", of "Program Order": what cp.async writes is ordered by the wait
    // for it alone; until then any access of it is a race.
    if (shadow.copies)
        report(SHARED_COPY_IN_FLIGHT, shadow.write_pc, pc, [&](Text &text) {
            text.add("byte %u by ", byte);
            name_warp(text, warp, lane);
        });
    if (!shadow.write_clock)
        return;
    if (shadow.writer != warp.index) {
        if (warp.clock[cta.first_warp + shadow.writer] >= shadow.write_clock)
            return;
        Kind kind = !write       ? SHARED_WRITE_READ
                    : same_value ? SHARED_WRITE_WRITE_SAME
                                 : SHARED_WRITE_WRITE;
        report(kind, shadow.write_pc, pc, [&](Text &text) {
            text.add("byte %u: written by warp %d, then %s by ", byte, shadow.writer,
                     write ? "written" : "read");
            name_warp(text, warp, lane);
        });
        return;
    }
    // Lanes are threads ("Independent Thread Scheduling"): nothing orders one's write before
    // another's access but a barrier, or `bar.warp.sync`, which orders memory for those that it
    // names. Laxer than the ISA: here it does for all lanes of the warp.
    if (lane >= 0 && shadow.write_lane != lane && shadow.write_syncs == warp.syncs)
        report(write ? WARP_WRITE_WRITE : WARP_WRITE_READ, shadow.write_pc, pc, [&](Text &text) {
            text.add("byte %u lanes %d and %d of ", byte, shadow.write_lane, lane);
            name_warp(text, warp);
        });
}

// "Proxies", "Async Proxy": wgmma reads shared memory through it, and needs a fence.proxy.async
// after writes of the generic proxy. The fence may be the writer's or the reader's: laxer than the
// ISA, which has a place for it between the two in causality order.
inline void Machine::check_proxy(Warp &warp, Cta &cta, u32 address, u32 size, i32 pc) {
    for_granules(cta, address, size, [&](SharedShadow &shadow) {
        if (!shadow.write_clock)
            return;
        const Warp &writer = warps[cta.first_warp + shadow.writer];
        if (std::max(writer.proxy_fence, warp.proxy_fence) > shadow.write_time)
            return;
        report(SHARED_WGMMA_PROXY, shadow.write_pc, pc, [&](Text &text) {
            text.add("byte %u by ", address);
            name_warp(text, warp);
        });
    });
}

inline void Machine::watch_shared_read(Warp &warp, Cta &cta, u32 address, u32 size, i32 pc,
                                       int lane) {
    const u32 reader = 1u << warp.index;
    SharedRead now_read{warp.clock[warp.id], pc, warp.syncs, lane};
    for (u32 g = address >> shared_shift; g <= (address + size - 1) >> shared_shift; g++) {
        check_last_shared_write(warp, cta, g, false, false, pc, lane);
        SharedRead &read = cta.reads[size_t(g) * config.warps + warp.index];
        now_read.lane = lane;
        if ((cta.shadows[g].readers & reader) && read.syncs == warp.syncs && read.lane >= 0)
            now_read.lane = lane < 0 || lane == read.lane ? read.lane : LANES;
        cta.shadows[g].readers |= reader;
        read = now_read;
    }
}

inline void Machine::watch_shared_write(Warp &warp, Cta &cta, u32 address, u32 size,
                                        bool same_value, i32 pc, int lane) {
    for (u32 g = address >> shared_shift; g <= (address + size - 1) >> shared_shift; g++) {
        check_last_shared_write(warp, cta, g, true, same_value, pc, lane);
        SharedShadow &shadow = cta.shadows[g];
        // `wgmma.mma_async`: what it reads may be changed only after wgmma.wait_group.
        if (shadow.wgmmas)
            report(SHARED_WGMMA_OVERWRITE, pc, pc, [&](Text &text) {
                text.add("byte %u by ", g << shared_shift);
                name_warp(text, warp, lane);
            });
        for (int reader : lanes_of(shadow.readers & ~(1u << warp.index))) {
            const SharedRead &read = cta.reads[size_t(g) * config.warps + reader];
            if (warp.clock[cta.first_warp + reader] >= read.clock)
                continue;
            report(SHARED_READ_WRITE, read.pc, pc, [&](Text &text) {
                text.add("byte %u: read by warp %d, then overwritten by ", g << shared_shift,
                         reader);
                name_warp(text, warp, lane);
            });
        }
        // As in check_last_shared_write: an earlier read of another lane is not ordered either.
        const SharedRead &own = cta.reads[size_t(g) * config.warps + warp.index];
        if (has(shadow.readers, warp.index) && lane >= 0 && own.lane >= 0 && own.lane != lane &&
            own.syncs == warp.syncs)
            report(WARP_READ_WRITE, own.pc, pc, [&](Text &text) {
                text.add("byte %u: read by ", g << shared_shift);
                if (own.lane < LANES)
                    text.add("lane %d", own.lane);
                else
                    text.add("several lanes");
                text.add(", then overwritten by ");
                name_warp(text, warp, lane);
            });
        shadow.readers = 0;
        shadow.write_clock = warp.clock[warp.id];
        shadow.write_pc = pc;
        shadow.writer = warp.index;
        shadow.write_lane = lane;
        shadow.write_syncs = warp.syncs;
        shadow.write_time = now;
    }
}
