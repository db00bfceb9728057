// Races in global memory.
//
// "Conflict and Data-races": two accesses of overlapping memory conflict if one of them writes;
// they race if causality order has neither before the other and they are not "Morally strong
// operations". Those are taken for: both strong, and of the same bytes. Laxer than the ISA, which
// also asks for scopes that include each other. A vector is an operation for each of its elements.
//
// `strong` is here how many bytes an element of a strong operation has; 0 if it is weak. Elements
// are aligned to their size: those that overlap have the same bytes if they have one size.
#pragma once
#include "clocks.hpp"

enum Weakness : int { BOTH_WEAK, ONE_WEAK, SIZES_DIFFER };

inline Weakness weakness(u32 strong, u32 other_strong) {
    return strong && other_strong ? SIZES_DIFFER : strong || other_strong ? ONE_WEAK : BOTH_WEAK;
}

inline GlobalShadow &Machine::global_shadow(i32 region, u64 granule) {
    GlobalShadow *&page = shadow_pages[region][granule / SHADOW_PAGE];
    if (!page) // from the system in zeros, so that what is not touched costs nothing
        page = static_cast<GlobalShadow *>(calloc(SHADOW_PAGE, sizeof(GlobalShadow)));
    return page[granule % SHADOW_PAGE];
}

inline void Machine::check_last_global_write(Warp &warp, const GlobalShadow &shadow, u64 address,
                                             bool write, u32 strong, i32 pc, int lane) {
    if (!shadow.write_clock || shadow.writer == warp.id)
        return;
    if (warp.clock[shadow.writer] >= shadow.write_clock ||
        (strong && strong == shadow.write_strong))
        return;
    const Warp &writer = warps[shadow.writer];
    int kind = GLOBAL_AFTER_WRITE + write + 2 * (writer.cta == warp.cta) +
               4 * weakness(strong, shadow.write_strong);
    report(Kind(kind), shadow.write_pc, pc, [&](Text &text) {
        name_address(text, address);
        text.add(": written by ");
        name_warp(text, writer);
        text.add(write ? ", then written by " : ", then read by ");
        name_warp(text, warp, lane);
    });
}

// `observed`: the value came from memory by a strong read, not from a store buffer.
inline void Machine::watch_global_read(Warp &warp, i32 region, u64 address, u32 size, u32 strong,
                                       bool observed, i32 pc, int lane) {
    const u64 offset = address - regions[region].base;
    const GlobalRead now_read{warp.clock[warp.id], pc, u16(warp.id), u16(strong)};
    i32 learnt_writer = -1;
    u32 learnt_clock = 0;
    for (u64 g = offset >> global_shift; g <= (offset + size - 1) >> global_shift; g++) {
        GlobalShadow &shadow = global_shadow(region, g);
        check_last_global_write(warp, shadow, address, false, strong, pc, lane);
        if (observed && shadow.visible_clock && shadow.visible_writer != warp.id &&
            (shadow.visible_writer != learnt_writer || shadow.visible_clock != learnt_clock)) {
            learnt_writer = shadow.visible_writer;
            learnt_clock = shadow.visible_clock;
            learn_practical(warp, learnt_writer, learnt_clock);
        }
        // In place of its own read, else of one that is known to be before this one, else added,
        // else, so that memory is bounded, in place of any.
        GlobalRead *const first = shadow.reads;
        GlobalRead *const end = first + shadow.n_reads;
        auto own = [&](const GlobalRead &read) { return read.warp == warp.id; };
        GlobalRead *slot = std::find_if(first, end, own);
        if (slot == end) {
            auto before = [&](const GlobalRead &read) {
                return warp.clock[read.warp] >= read.clock;
            };
            slot = std::find_if(first, end, before);
        }
        if (slot == std::end(shadow.reads))
            slot = first + random.below(std::size(shadow.reads));
        else if (slot == end)
            shadow.n_reads++;
        *slot = now_read;
    }
}

inline void Machine::watch_global_write(Warp &warp, i32 region, u64 address, u32 size, u32 strong,
                                        i32 pc, int lane) {
    const u64 offset = address - regions[region].base;
    for (u64 g = offset >> global_shift; g <= (offset + size - 1) >> global_shift; g++) {
        GlobalShadow &shadow = global_shadow(region, g);
        check_last_global_write(warp, shadow, address, true, strong, pc, lane);
        for (int i = 0; i < shadow.n_reads; i++) {
            const GlobalRead &read = shadow.reads[i];
            if (read.warp == warp.id || warp.clock[read.warp] >= read.clock)
                continue;
            if (strong && strong == read.strong)
                continue;
            const Warp &reader = warps[read.warp];
            bool by_values = warp.practical[read.warp] >= read.clock;
            int order = weakness(strong, read.strong);
            int kind = by_values ? GLOBAL_RW_OTHER_VALUES : GLOBAL_AFTER_READ + 2 * order;
            kind += reader.cta == warp.cta;
            report(Kind(kind), read.pc, pc, [&](Text &text) {
                name_address(text, address);
                text.add(": read by ");
                name_warp(text, reader);
                text.add(", then overwritten by ");
                name_warp(text, warp, lane);
            });
        }
        shadow.write_clock = warp.clock[warp.id];
        shadow.write_pc = pc;
        shadow.writer = warp.id;
        shadow.write_strong = strong;
        shadow.n_reads = 0;
    }
}

// A store reaches memory, where others observe it.
inline void Machine::mark_visible(i32 region, u64 address, u32 size, i32 warp, u32 clock) {
    const u64 offset = address - regions[region].base;
    for (u64 g = offset >> global_shift; g <= (offset + size - 1) >> global_shift; g++) {
        GlobalShadow &shadow = global_shadow(region, g);
        shadow.visible_writer = warp;
        shadow.visible_clock = clock;
    }
}
