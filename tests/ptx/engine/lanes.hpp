// What lanes know of themselves and tell one another: special registers, shfl, redux, vote.
#pragma once
#include "global_memory.hpp"

// "Special Registers", by the numbers of the parser's table SREGS.
enum SpecialRegister : i32 {
    TID_X,
    TID_Y,
    TID_Z,
    CTAID_X,
    CTAID_Y,
    CTAID_Z,
    NCTAID_X,
    NCTAID_Y,
    NCTAID_Z,
    NTID_X,
    NTID_Y,
    NTID_Z,
    LANEID,
    WARPID,
    CLOCK,
    GLOBALTIMER_LO
};

inline void Machine::special_register(Warp &warp, const Instruction &ins, u32 mask) {
    if (ins.aux < TID_X || ins.aux > GLOBALTIMER_LO)
        return fail(pc_of(ins), "special register not implemented");
    const Cta &cta = ctas[warp.cta];
    auto value = [&](int lane) -> u32 {
        switch (ins.aux) {
        case TID_X: // CTAs are of one dimension
            return warp.index * LANES + lane;
        case TID_Y:
        case TID_Z:
            return 0;
        case CTAID_X:
            return cta.x;
        case CTAID_Y:
            return cta.y;
        case CTAID_Z:
            return cta.z;
        case NCTAID_X:
        case NCTAID_Y:
        case NCTAID_Z:
            return config.grid[ins.aux - NCTAID_X];
        case NTID_X:
            return config.warps * LANES;
        case NTID_Y:
        case NTID_Z:
            return 1;
        case LANEID:
            return lane;
        case WARPID:
            return warp.index;
        default: // CLOCK, GLOBALTIMER_LO
            return now;
        }
    };
    Words values;
    for (int lane = 0; lane < LANES; lane++)
        values[lane] = value(lane);
    set_words(warp, destination(ins, 0), values.data(), mask);
}

// `shfl.sync`: the source lane by mode; noise from a lane that does not take part.
inline void Machine::shuffle(Warp &warp, const Instruction &ins, u32 mask) {
    enum Mode : i32 { UP, DOWN, BUTTERFLY, INDEX };
    const u32 *a = words(warp, source(ins, 0));
    const u32 *b = words(warp, source(ins, 1));
    const u32 *c = words(warp, source(ins, 2));
    Words values;
    u32 in_range = 0;
    for (i32 lane = 0; lane < LANES; lane++) {
        const i32 distance = b[lane] & 31;
        const i32 clamp = c[lane] & 31;
        const i32 segment = c[lane] >> 8 & 31;
        const i32 limit = (lane & segment) | (clamp & ~segment);
        i32 from = lane;
        switch (ins.aux) {
        case UP:
            from = lane - distance;
            break;
        case DOWN:
            from = lane + distance;
            break;
        case BUTTERFLY:
            from = lane ^ distance;
            break;
        case INDEX:
            from = (lane & segment) | (distance & ~segment);
            break;
        }
        if (ins.aux == UP ? from >= limit : from <= limit)
            in_range |= 1u << lane;
        else
            from = lane;
        values[lane] = has(mask, from) ? a[from] : random.word();
    }
    set_words(warp, destination(ins, 0), values.data(), mask);
    if (ins.n_destinations > 1)
        set_predicate(warp, destination(ins, 1), in_range, mask);
}

// `redux.sync`, whose actions have the numbers of those of atom; aux2: signed.
inline void Machine::reduce(Warp &warp, const Instruction &ins, u32 mask) {
    const u32 *a = words(warp, source(ins, 0));
    const int first = std::countr_zero(mask);
    u32 result = a[first];
    for (int lane : lanes_of(mask & (mask - 1)))
        result =
            atomic_result(ins.aux, ins.aux2 ? ATOMIC_SIGNED : ATOMIC_UNSIGNED, result, a[lane], 0);
    Words values;
    values.fill(result);
    set_words(warp, destination(ins, 0), values.data(), mask);
}

// `vote.sync`
inline void Machine::vote(Warp &warp, const Instruction &ins, u32 mask) {
    enum Mode : i32 { BALLOT, ANY, ALL };
    const u32 yes = predicate(warp, source(ins, 0)) & mask;
    if (ins.aux == BALLOT) {
        Words values;
        values.fill(yes);
        set_words(warp, destination(ins, 0), values.data(), mask);
        return;
    }
    bool result = ins.aux == ANY ? yes != 0 : yes == mask;
    set_predicate(warp, destination(ins, 0), result ? ALL_LANES : 0, mask);
}
