// Warps: what an instruction does, the ways of lanes, and barriers.
#pragma once
#include "arithmetic.hpp"
#include "async_copies.hpp"
#include "lanes.hpp"
#include "wgmma.hpp"

inline void Machine::execute(Warp &warp, const Instruction &ins, u32 mask) {
    if (compute(warp, ins, mask))
        return;
    switch (ins.op) {
    case SREG:
        return special_register(warp, ins, mask);
    case LDG:
        return load_global(warp, ins, mask);
    case STG:
        return store_global(warp, ins, mask);
    case ATOM:
        return atomic(warp, ins, mask);
    case FENCE:
        return fence(warp, ins);
    case LDS:
        return load_shared(warp, ins, mask);
    case STS:
        return store_shared(warp, ins, mask);
    case LDMATRIX:
        return load_matrices(warp, ins);
    case STMATRIX:
        return store_matrices(warp, ins);
    case CPASYNC:
        return issue_copy(warp, ins, mask);
    case CPCOMMIT:
        warp.copy_group++;
        return;
    case CPWAIT: // aux2: also what was not committed
        return wait_copies(warp, ins.aux2 ? ALL_GROUPS : warp.copy_group - ins.aux);
    case MMA16816:
    case MMA1688:
    case MMA1688TF32:
    case MMA1684TF32:
        return mma(warp, ins);
    case WGMMA:
        return issue_wgmma(warp, ins);
    case WGCOMMIT:
        warp.wgmma_group++;
        return;
    case WGWAIT:
        return wait_wgmmas(warp, ins.aux);
    case FENCEPROXY:
        warp.proxy_fence = now;
        return;
    case BARWARP:
        warp.syncs++;
        return;
    case SHFL:
        return shuffle(warp, ins, mask);
    case REDUX:
        return reduce(warp, ins, mask);
    case VOTE:
        return vote(warp, ins, mask);
    case ACTIVEMASK: {
        Words values;
        values.fill(mask);
        return set_words(warp, destination(ins, 0), values.data(), mask);
    }
    case ELECT: {
        Words values;
        values.fill(std::countr_zero(mask));
        set_words(warp, destination(ins, 0), values.data(), mask);
        return set_predicate(warp, destination(ins, 1), mask & -mask, mask);
    }
    case WGFENCE:
    case NANOSLEEP:
        return;
    default:
        fail(pc_of(ins), "operation not implemented: ",
             ins.op >= 0 && ins.op < N_OPS ? OP_NAMES[ins.op] : "unknown");
    }
}

// ---- Ways of lanes. Fragments of a warp have program counters of their own, and come together
// where they meet: chapter "PTX Machine Model", "Independent Thread Scheduling".

inline void Machine::branch(Warp &warp, Fragment &part, const Instruction &ins, u32 mask) {
    const i32 next = part.pc + 1;
    const u32 rest = part.mask & ~mask;
    if (mask == 0) {
        part.pc = next;
        return;
    }
    if (rest && ins.aux) // .uni
        report(BRANCH_DIVERGES, pc_of(ins), pc_of(ins), [&](Text &text) {
            text.add("lanes 0x%08x of 0x%08x of ", mask, part.mask);
            name_warp(text, warp);
        });
    part.mask = mask;
    part.pc = ins.target;
    if (rest)
        warp.fragments.push_back({next, rest});
}

inline void Machine::return_lanes(Warp &warp, Fragment &part, u32 mask) {
    warp.alive &= ~mask;
    part.mask &= ~mask;
    part.pc++;
    for (Fragment &other : warp.fragments) // those that waited for these lanes wait no more
        if (other.wait == FOR_LANES)
            other.wait = READY;
    if (!part.mask)
        part.wait = DONE;
    if (warp.alive)
        return;
    note_progress();
    wait_copies(warp, ALL_GROUPS);
    Cta &cta = ctas[warp.cta];
    for (i32 id = 0; id < N_BARRIERS; id++) // they may have waited for this one
        if (cta.barriers[id].arrived)
            complete_barrier(cta, id);
}

// `bar.sync`, `barrier.sync`, by whole warps.
inline void Machine::arrive(Warp &warp, Fragment &part, const Instruction &ins) {
    const i32 pc = pc_of(ins);
    if (ins.aux < 0 || ins.aux >= N_BARRIERS)
        return fail(pc, "no such barrier");
    Cta &cta = ctas[warp.cta];
    Barrier &barrier = cta.barriers[ins.aux];
    part.wait = AT_BARRIER;
    part.barrier = ins.aux;
    // Not forbidden, but no compiler makes one barrier of two for a part of the warps each.
    if (barrier.pc >= 0 && barrier.pc != pc && !ins.aux2)
        report(BARRIER_MISMATCH, barrier.pc, pc, [&](Text &text) { name_warp(text, warp); });
    barrier.arrived |= 1u << warp.index;
    barrier.expected = ins.aux2 / LANES;
    barrier.pc = pc;
    complete_barrier(cta, ins.aux);
}

// `bar`, `barrier`: "Causality Order" has all that its warps did before all that they do next.
inline void Machine::complete_barrier(Cta &cta, i32 id) {
    Barrier &barrier = cta.barriers[id];
    const u32 count = std::popcount(barrier.arrived);
    u32 alive = 0;
    for (i32 i = 0; i < config.warps; i++)
        alive |= u32(warps[cta.first_warp + i].alive != 0) << i;
    if (barrier.expected ? count < barrier.expected : (alive & ~barrier.arrived) != 0)
        return;
    if (!barrier.expected && count < u32(config.warps))
        report(BARRIER_EXITED, barrier.pc, barrier.pc,
               [&](Text &text) { text.add("CTA (%d,%d,%d)", cta.x, cta.y, cta.z); });
    Clock clock(n_warps, 0);
    Clock practical(n_warps, 0);
    for (int i : lanes_of(barrier.arrived)) {
        join(clock, warps[cta.first_warp + i].clock);
        join(practical, warps[cta.first_warp + i].practical);
    }
    for (int i : lanes_of(barrier.arrived)) {
        Warp &warp = warps[cta.first_warp + i];
        warp.clock = clock;
        warp.practical = practical;
        warp.practical_changed = true;
        tick(warp);
        warp.syncs++;
        for (Fragment &part : warp.fragments)
            if (part.wait == AT_BARRIER && part.barrier == id) {
                part.wait = READY;
                part.pc++;
            }
    }
    barrier = Barrier{};
    cta.epoch++;
    counters.barriers++;
}

// What lanes do together: the source that has the member mask, or ALIGNED for all lanes.
enum Members : i32 { ALONE = -2, ALIGNED = -1 };

inline i32 members_of(const Instruction &ins) {
    switch (ins.op) {
    case BARWARP:
    case ELECT:
        return 0;
    case REDUX:
    case VOTE:
        return 1;
    case SHFL:
        return 3;
    case BARSYNC:
    case LDMATRIX:
    case STMATRIX:
    case MMA16816:
    case MMA1688:
    case MMA1688TF32:
    case MMA1684TF32:
    case WGFENCE:
    case WGCOMMIT:
    case WGWAIT:
    case WGMMA:
        return ALIGNED;
    default:
        return ALONE;
    }
}

// The lanes that an instruction waits for. Those that have exited are not waited for.
inline u32 Machine::lanes_wanted(const Warp &warp, const Fragment &part,
                                 const Instruction &ins) const {
    const i32 members = members_of(ins);
    if (members < 0)
        return members == ALIGNED ? warp.alive : 0;
    return warp.alive & words(warp, source(ins, members))[std::countr_zero(part.mask)];
}

// That the lanes of a mask are all that take part: a guard may leave out some of those that were
// waited for (to leave out all is no fault), and .aligned wants also those that have exited.
// Stricter than the ISA: lanes with different member masks may not be here at once.
inline void Machine::check_collective(const Warp &warp, const Instruction &ins, u32 mask) {
    const i32 members = members_of(ins);
    if (members == ALONE || !mask)
        return;
    const i32 pc = pc_of(ins);
    u32 wanted = ALL_LANES;
    if (members != ALIGNED) {
        const u32 *masks = words(warp, source(ins, members));
        const u32 first = masks[std::countr_zero(mask)];
        wanted = first & warp.alive;
        for (int lane : lanes_of(mask)) {
            if (masks[lane] == first && has(first, lane))
                continue;
            report(COLLECTIVE_MEMBERS, pc, pc, [&](Text &text) {
                text.add("mask 0x%08x of ", masks[lane]);
                name_warp(text, warp, lane);
            });
            break;
        }
    }
    if (wanted & ~mask)
        report(COLLECTIVE_LANES, pc, pc, [&](Text &text) {
            text.add("lanes 0x%08x of 0x%08x of ", mask, wanted);
            name_warp(text, warp);
        });
}

// One instruction of a fragment.
inline void Machine::step(Warp &warp, Fragment &part) {
    const i32 pc = part.pc;
    const Instruction &ins = program.code[pc];
    now++;
    idle++;
    if (config.statistics) {
        executions[pc]++;
        first_warp_executions[pc] += warp.id == 0;
    }
    u32 mask = part.mask;
    if (ins.predicate >= 0) {
        u32 values = warp.predicates[ins.predicate];
        mask &= ins.predicate_negated ? ~values : values;
    }
    switch (ins.op) {
    case BRA:
        return branch(warp, part, ins, mask);
    case RET:
        return return_lanes(warp, part, mask);
    case TRAP:
        part.pc++;
        if (mask) {
            report(TRAP_REACHED, pc, pc, [&](Text &text) { name_warp(text, warp); });
            fail(pc, "trap");
        }
        return;
    case BARSYNC:
        if (mask != part.mask)
            report(BARRIER_PREDICATED, pc, pc, [&](Text &text) { name_warp(text, warp); });
        check_collective(warp, ins, part.mask);
        return arrive(warp, part, ins);
    default:
        part.pc++;
        check_collective(warp, ins, mask);
        if (mask || ins.op == CPCOMMIT) // groups are the warp's here, committed by all lanes
            execute(warp, ins, mask);
    }
}

// Merges those that have met. Most often goes on with the one that is behind; null if all wait.
inline Fragment *Machine::choose_fragment(Warp &warp) {
    auto &parts = warp.fragments;
    if (parts.size() == 1)
        return parts[0].wait == READY ? &parts[0] : nullptr;
    for (size_t i = 0; i < parts.size(); i++)
        for (size_t j = i + 1; j < parts.size();) {
            Fragment &a = parts[i];
            const Fragment &b = parts[j];
            bool met = a.pc == b.pc && a.wait != AT_BARRIER && b.wait != AT_BARRIER;
            if (!met || !a.mask || !b.mask) {
                j++;
                continue;
            }
            a.mask |= b.mask;
            a.wait = READY;
            parts.erase(parts.begin() + j);
        }
    std::erase_if(parts, [](const Fragment &part) { return !part.mask; });
    Fragment *chosen = nullptr;
    for (Fragment &part : parts) {
        if (part.wait != READY)
            continue;
        if (!chosen || (random.below(8) ? part.pc < chosen->pc : random.below(2)))
            chosen = &part;
    }
    return chosen;
}

inline void Machine::run_warp(Warp &warp, i32 instructions) {
    for (; instructions > 0 && warp.alive && !failed; instructions--) {
        Fragment *part = choose_fragment(warp);
        if (!part)
            return;
        const u32 wanted = lanes_wanted(warp, *part, program.code[part->pc]);
        if (wanted & ~part->mask)
            part->wait = FOR_LANES;
        else
            step(warp, *part);
    }
}
