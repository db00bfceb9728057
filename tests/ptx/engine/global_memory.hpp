// Instructions of global memory: ld, st, atom, red, fence.
#pragma once
#include "store_buffers.hpp"

inline i32 Machine::locate(u64 address, u32 size) const { // the region, or -1
    u64 index = (address >> REGION_SHIFT) - 1;
    if (index >= regions.size())
        return -1;
    const Region &region = regions[index];
    bool inside = address >= region.base && address + size <= region.base + region.size;
    return inside ? i32(index) : -1;
}

// The region, or -1 after a report. Vectors are aligned to their size: "Addresses as Operands".
inline i32 Machine::check_global(const Warp &warp, u64 address, u32 size, u32 alignment, i32 pc,
                                 int lane, const char *what) {
    auto describe = [&](u32 bytes) {
        return [=, this, &warp](Text &text) {
            text.add("%s of %u bytes, ", what, bytes);
            name_address(text, address);
            text.add(" by ");
            name_warp(text, warp, lane);
        };
    };
    if (address % alignment) {
        report(GLOBAL_MISALIGNED, pc, pc, describe(alignment));
        fail(pc, "misaligned address");
        return -1;
    }
    i32 region = locate(address, size);
    if (region < 0)
        report(GLOBAL_OUT_OF_BOUNDS, pc, pc, describe(size));
    return region;
}

// "Initialization": memory without an initial value holds an unknown one. Bytes that a store buffer
// forwarded have one.
inline void Machine::check_global_defined(const Warp &warp, i32 region, u64 address, u32 size,
                                          u32 forwarded, i32 pc, int lane) {
    const u8 *defined = regions[region].defined + (address - regions[region].base);
    u32 i = 0;
    while (i < size && (defined[i] || has(forwarded, i)))
        i++;
    if (i == size)
        return;
    report(GLOBAL_UNINITIALISED, pc, pc, [&](Text &text) {
        name_address(text, address);
        text.add(" by ");
        name_warp(text, warp, lane);
    });
}

// Sectors of 32 bytes that an instruction touches.
inline void Machine::count_sectors(const Instruction &ins, u32 mask, const u64 *addresses,
                                   u32 size) {
    if (!config.statistics)
        return;
    u64 sectors[2 * LANES];
    u64 *end = sectors;
    for (int lane : lanes_of(mask)) {
        u64 address = addresses[lane] + ins.offset;
        for (u64 sector = address >> 5; sector <= (address + size - 1) >> 5; sector++) {
            bool known = end != sectors && end[-1] == sector; // most are that of the lane before
            known = known || std::find(sectors, end, sector) != end;
            if (!known && end != std::end(sectors))
                *end++ = sector;
        }
    }
    transactions[pc_of(ins)] += end - sectors;
    least_transactions[pc_of(ins)] += (std::popcount(mask) * size + 31) / 32;
}

// Weak reads may see old values for as long as no acquire comes between ("Cache Operators": L1 is
// not coherent for global memory).
inline void Machine::read_through_l1(Cta &cta, const Region &region, u64 address, u32 size,
                                     u8 *bytes) {
    constexpr u32 L1_PERCENT = 95; // how often a sector is still there
    for (u32 done = 0; done < size;) {
        u64 at = address + done;
        u64 begin = at & ~u64(31);
        u32 count = std::min<u32>(size - done, begin + 32 - at);
        const Sector *sector = cta.l1.find(at >> 5);
        if (sector && random.below(100) < L1_PERCENT) {
            counters.l1_hits++;
            bool stale =
                memcmp(sector->data() + (at - begin), region.bytes + (at - region.base), count);
            counters.stale_hits += stale;
        } else {
            Sector &filled = cta.l1[at >> 5];
            u64 first = std::max(begin, region.base);
            u64 end = std::min(begin + 32, region.base + region.size);
            memcpy(filled.data() + (first - begin), region.bytes + (first - region.base),
                   end - first);
            sector = &filled;
        }
        memcpy(bytes + done, sector->data() + (at - begin), count);
        done += count;
    }
}

// As a warp sees it; which bytes were still in its CTA's store buffer, a bit for each.
inline u32 Machine::read_global(Warp &warp, Cta &cta, i32 index, u64 address, u32 size, i32 flags,
                                u8 *bytes) {
    const Region &region = regions[index];
    // Strong operations and .cg read L2.
    if (flags & (CACHE_GLOBAL | STRONG))
        memcpy(bytes, region.bytes + (address - region.base), size);
    else
        read_through_l1(cta, region, address, size, bytes);
    return forward(warp, cta, address, size, bytes);
}

inline void Machine::load_global(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 size = ins.access_size();
    const u64 *addresses = longs(warp, source(ins, 0));
    count_sectors(ins, mask, addresses, size);
    for (int lane : lanes_of(mask)) {
        u64 address = addresses[lane] + ins.offset;
        u8 bytes[32];
        i32 region = check_global(warp, address, size, size, pc, lane, "load");
        if (region < 0) {
            for (u8 &byte : bytes)
                byte = random.word();
        } else {
            u32 forwarded = read_global(warp, cta, region, address, size, ins.flags, bytes);
            check_global_defined(warp, region, address, size, forwarded, pc, lane);
            bool observed = ins.strong() && !forwarded;
            watch_global_read(warp, region, address, size, ins.strong_size(), observed, pc, lane);
            for (u32 i = 0; ins.strong() && i < ins.vector_length(); i++)
                observe(warp, address + i * ins.element_size(), ins.flags & ACQUIRE);
        }
        // "Memory Operations on Vector Data Types": one operation for each element. Here they
        // come at once; the order that the ISA leaves open is not tried.
        for (u32 i = 0; i < ins.vector_length(); i++) {
            const u8 *element = bytes + i * ins.element_size();
            set_element(warp, destination(ins, i), lane, element, ins.element_size());
        }
    }
    if (ins.flags & ACQUIRE)
        cta.l1.clear();
}

inline void Machine::store_global(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    cta.without_store = 0;
    const i32 pc = pc_of(ins);
    const u32 size = ins.access_size();
    const u32 element = ins.element_size();
    const u64 *addresses = longs(warp, source(ins, 0));
    count_sectors(ins, mask, addresses, size);
    if (ins.flags & RELEASE)
        drain_known(warp, cta);
    take_snapshot(warp);
    u64 highest = 0;
    for (int lane : lanes_of(mask)) {
        u64 address = addresses[lane] + ins.offset;
        i32 region = check_global(warp, address, size, size, pc, lane, "store");
        if (region < 0)
            continue;
        watch_global_write(warp, region, address, size, ins.strong_size(), pc, lane);
        // Aligned accesses of one size overlap only where they are equal. Lanes at one address are
        // a race, "Conflict and Data-races": which of them stays is not said.
        if (address <= highest)
            for (int other : lanes_of(mask & ((1u << lane) - 1))) {
                if (addresses[other] != addresses[lane])
                    continue;
                bool same = true;
                for (u32 i = 0; i < ins.vector_length() && same; i++) {
                    i32 operand = source(ins, 1 + i);
                    same = get_element(warp, operand, other, element) ==
                           get_element(warp, operand, lane, element);
                }
                report(same ? GLOBAL_LANES_SAME : GLOBAL_LANES_DIFFERENT, pc, pc, [&](Text &text) {
                    name_address(text, address);
                    text.add(" by ");
                    name_warp(text, warp, lane);
                });
                break;
            }
        highest = std::max(highest, address);
        for (u32 i = 0; i < ins.vector_length(); i++) {
            u64 value = get_element(warp, source(ins, 1 + i), lane, element);
            buffer_store(warp, cta, address + i * element, value, element);
        }
        for (u32 i = 0; ins.strong() && i < ins.vector_length(); i++)
            publish(warp, address + i * element, ins.flags & RELEASE, false);
    }
    tick(warp);
}

enum AtomicAction : i32 {
    ATOMIC_ADD,
    ATOMIC_AND,
    ATOMIC_OR,
    ATOMIC_XOR,
    ATOMIC_MIN,
    ATOMIC_MAX,
    ATOMIC_EXCH,
    ATOMIC_CAS
};
enum AtomicType : i32 { ATOMIC_UNSIGNED, ATOMIC_SIGNED, ATOMIC_FLOAT };

inline u32 atomic_result(i32 action, i32 type, u32 old, u32 b, u32 c) {
    switch (action) {
    case ATOMIC_ADD:
        if (type == ATOMIC_FLOAT)
            return std::bit_cast<u32>(std::bit_cast<float>(old) + std::bit_cast<float>(b));
        return old + b;
    case ATOMIC_AND:
        return old & b;
    case ATOMIC_OR:
        return old | b;
    case ATOMIC_XOR:
        return old ^ b;
    case ATOMIC_MIN:
        return type == ATOMIC_SIGNED ? std::min<i32>(old, b) : std::min(old, b);
    case ATOMIC_MAX:
        return type == ATOMIC_SIGNED ? std::max<i32>(old, b) : std::max(old, b);
    case ATOMIC_EXCH:
        return b;
    default:
        return old == b ? c : old;
    }
}

// atom, and red as one without a destination. Lanes follow one another.
inline void Machine::atomic(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u64 *addresses = longs(warp, source(ins, 0));
    const u32 *b = words(warp, source(ins, 1));
    const u32 *c = ins.n_sources > 2 ? words(warp, source(ins, 2)) : b;
    if (ins.flags & RELEASE)
        drain_known(warp, cta);
    for (int lane : lanes_of(mask)) {
        u64 address = addresses[lane] + ins.offset;
        i32 region = check_global(warp, address, 4, 4, pc, lane, "atomic");
        if (region < 0)
            continue;
        drain_word(cta, address);
        watch_global_read(warp, region, address, 4, 4, true, pc, lane);
        watch_global_write(warp, region, address, 4, 4, pc, lane);
        check_global_defined(warp, region, address, 4, 0, pc, lane);
        // "Atomicity": reads and writes L2 in one.
        u8 *place = regions[region].bytes + (address - regions[region].base);
        u32 old;
        memcpy(&old, place, 4);
        u32 result = atomic_result(ins.aux & 255, ins.aux >> 8, old, b[lane], c[lane]);
        if (result != old)
            note_progress();
        memcpy(place, &result, 4);
        take_snapshot(warp);
        mark_visible(region, address, 4, warp.id, warp.clock[warp.id]);
        // "Reductions do not form Acquire Patterns".
        if (ins.n_destinations)
            observe(warp, address, ins.flags & ACQUIRE);
        publish(warp, address, ins.flags & RELEASE, true);
        if (ins.n_destinations)
            set_element(warp, destination(ins, 0), lane, reinterpret_cast<u8 *>(&old), 4);
    }
    if (ins.flags & ACQUIRE)
        cta.l1.clear();
    tick(warp);
}

// `fence`, `membar`: "Release and Acquire Patterns" with fences. fence.sc is taken for
// fence.acq_rel: all that a warp knows of is in memory after either and L1 is empty, so that
// "Fence-SC" holds of values anyhow; for fence.acq_rel that is stronger than the ISA. A fence of
// .cta scope moves no values, but counts as one of .gpu scope for the clocks ("Scope"), which
// is laxer.
inline void Machine::fence(Warp &warp, const Instruction &ins) {
    Cta &cta = ctas[warp.cta];
    const bool release = ins.flags & RELEASE;
    const bool acquire = ins.flags & ACQUIRE;
    const bool beyond_cta = ins.scope() >= SCOPE_GPU;
    if (release && beyond_cta)
        drain_known(warp, cta);
    if (acquire && beyond_cta)
        cta.l1.clear();
    if (acquire && !warp.acquired.empty()) {
        learn(warp, warp.acquired);
        warp.acquired.clear();
    }
    if (release) {
        warp.released = warp.clock;
        tick(warp);
    }
}
