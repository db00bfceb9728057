// `cp.async`, `cp.async.commit_group`, `cp.async.wait_group`, `cp.async.wait_all`.
//
// "Asynchronous Operations", of "Program Order": the copy happens at any time between its issue and
// the wait. Here it is at one of the two ends; an access of its destination in between is a race.
#pragma once
#include "global_memory.hpp"
#include "shared_memory.hpp"

inline void Machine::issue_copy(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 size = ins.aux;
    const u32 *destinations = words(warp, source(ins, 0));
    const u64 *sources = longs(warp, source(ins, 1));
    const u32 *bytes = ins.n_sources > 2 ? words(warp, source(ins, 2)) : nullptr;
    AsyncCopy copy{pc, mask, warp.copy_group, random.below(2) != 0, {}, {}, {}};
    for (int lane : lanes_of(mask)) {
        u32 destination = copy.destination[lane] = destinations[lane] + ins.offset;
        copy.source[lane] = sources[lane] + ins.aux2;
        copy.bytes[lane] = bytes ? std::min(bytes[lane], size) : size; // the rest is zeros
        if (!check_shared(warp, destination, size, pc, lane)) {
            copy.mask &= ~(1u << lane);
            continue;
        }
        watch_shared_write(warp, cta, destination, size, false, pc, lane);
        for_granules(cta, destination, size, [](SharedShadow &shadow) { shadow.copies++; });
    }
    if (!copy.late)
        perform_copy(warp, copy);
    warp.copies.push_back(copy);
}

// The read of global memory is a weak one of the thread that issued it.
inline void Machine::perform_copy(Warp &warp, const AsyncCopy &copy) {
    Cta &cta = ctas[warp.cta];
    const Instruction &ins = program.code[copy.pc];
    const u32 size = ins.aux;
    for (int lane : lanes_of(copy.mask)) {
        u64 address = copy.source[lane];
        u32 count = copy.bytes[lane];
        u8 bytes[16] = {};
        if (count) {
            i32 region = check_global(warp, address, count, size, copy.pc, lane, "cp.async");
            if (region < 0)
                continue;
            u32 forwarded = read_global(warp, cta, region, address, count, ins.flags, bytes);
            check_global_defined(warp, region, address, count, forwarded, copy.pc, lane);
            watch_global_read(warp, region, address, count, 0, false, copy.pc, lane);
        }
        memcpy(&cta.shared[copy.destination[lane]], bytes, size);
        memset(&cta.shared_defined[copy.destination[lane]], 1, size);
    }
}

constexpr i32 ALL_GROUPS = 0x7FFFFFFF;

// Groups from `first_group_left` on may go on.
inline void Machine::wait_copies(Warp &warp, i32 first_group_left) {
    Cta &cta = ctas[warp.cta];
    std::vector<AsyncCopy> left;
    for (const AsyncCopy &copy : warp.copies) {
        if (copy.group >= first_group_left) {
            left.push_back(copy);
            continue;
        }
        if (copy.late)
            perform_copy(warp, copy);
        const u32 size = program.code[copy.pc].aux;
        for (int lane : lanes_of(copy.mask)) {
            u32 destination = copy.destination[lane];
            for_granules(cta, destination, size, [](SharedShadow &shadow) { shadow.copies--; });
            // The write counts from here: others have to be told of it after the wait.
            watch_shared_write(warp, cta, destination, size, false, copy.pc, lane);
        }
    }
    warp.copies.swap(left);
}
