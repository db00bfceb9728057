// Which warp runs when, and whether any still can.
#pragma once
#include "warps.hpp"

// Smallest access of the program as a shift of 1: accesses are aligned to their size, so they cover
// whole granules of it. (A cp.async that reads less than its size is taken to read granules.)
template <class SizeOf> int granule_shift(const Program &program, SizeOf size_of) {
    u32 smallest = 16;
    for (i32 i = 0; i < program.n_code; i++)
        smallest = std::min(smallest, size_of(program.code[i]));
    return std::bit_width(smallest) - 1;
}

inline u32 shared_access(const Instruction &ins) {
    switch (ins.op) {
    case LDS:
    case STS:
        return ins.access_size();
    case CPASYNC:
        return ins.aux;
    default:
        return 16;
    }
}

inline u32 global_access(const Instruction &ins) {
    switch (ins.op) {
    case LDG:
    case STG:
        return ins.access_size();
    case ATOM:
        return 4;
    case CPASYNC:
        return ins.aux;
    default:
        return 16;
    }
}

inline bool can_poll(const Program &program) {
    return std::any_of(program.code, program.code + program.n_code, [](const Instruction &ins) {
        return ins.op == ATOM || (ins.op == LDG && ins.strong());
    });
}

template <class Value> std::vector<Value> broadcast(const Value *constants, i32 count) {
    std::vector<Value> rows;
    for (i32 i = 0; i < count; i++)
        rows.insert(rows.end(), LANES, constants[i]);
    return rows;
}

inline Machine::Machine(const Config &config, const Program &program, const Region *regions)
    : config(config), program(program), regions(regions, regions + config.n_regions),
      constant_words(broadcast(program.words, program.n_words)),
      constant_longs(broadcast(program.longs, program.n_longs)),
      n_ctas(config.grid[0] * config.grid[1] * config.grid[2]), n_warps(n_ctas * config.warps),
      warps(n_warps), ctas(n_ctas), random(config.seed), polls(can_poll(program)),
      shared_shift(granule_shift(program, shared_access)),
      global_shift(granule_shift(program, global_access)), shadow_pages(config.n_regions) {
    for (auto *counts : {&executions, &first_warp_executions, &transactions, &least_transactions})
        counts->assign(program.n_code, 0);
    for (i32 i = 0; i < config.n_regions; i++) {
        u64 granules = (regions[i].size >> global_shift) + 1;
        shadow_pages[i].assign(granules / SHADOW_PAGE + 1, nullptr);
    }
    for (i32 i = 0; i < n_ctas; i++) {
        Cta &cta = ctas[i];
        cta.first_warp = i * config.warps;
        cta.x = i % config.grid[0];
        cta.y = i / config.grid[0] % config.grid[1];
        cta.z = i / config.grid[0] / config.grid[1];
    }
    for (i32 i = 0; i < n_warps; i++) {
        Warp &warp = warps[i];
        warp.id = i;
        warp.cta = i / config.warps;
        warp.index = i % config.warps;
        warp.clock.assign(n_warps, 0);
        warp.practical = warp.clock;
        tick(warp);
    }
}

inline Machine::~Machine() {
    for (auto &pages : shadow_pages)
        for (GlobalShadow *page : pages)
            free(page);
}

inline void Machine::note_progress() {
    idle = 0;
    progress = true;
}

// Registers and shared memory hold noise at first, as nothing says what they hold.
inline void Machine::start_cta(Cta &cta) {
    cta.live = true;
    cta.shared.resize(config.shared_bytes);
    for (u8 &byte : cta.shared)
        byte = random.word();
    cta.shared_defined.assign(config.shared_bytes, 0);
    size_t granules = (config.shared_bytes >> shared_shift) + 1;
    cta.shadows.assign(granules, SharedShadow{});
    cta.reads.assign(granules * config.warps, SharedRead{});
    for (i32 i = 0; i < config.warps; i++) {
        Warp &warp = warps[cta.first_warp + i];
        warp.words.resize(size_t(program.n_word_registers) * LANES);
        for (u32 &word : warp.words)
            word = random.word();
        warp.longs.resize(size_t(program.n_long_registers) * LANES);
        for (u64 &value : warp.longs)
            value = random.next();
        warp.predicates.resize(program.n_predicates);
        for (u32 &predicate : warp.predicates)
            predicate = random.word();
        warp.fragments = {{0, ALL_LANES}};
        warp.alive = ALL_LANES;
    }
}

// Its stores reach memory with the end of the grid at the latest; here with its own.
inline void Machine::stop_cta(Cta &cta) {
    drain_all(cta);
    cta.live = false;
    cta.shared = std::vector<u8>();
    cta.shared_defined = std::vector<u8>();
    cta.shadows = std::vector<SharedShadow>();
    cta.reads = std::vector<SharedRead>();
    cta.stores = StoreBuffer();
    cta.l1 = Table<Sector>();
    for (i32 i = 0; i < config.warps; i++) {
        Warp &warp = warps[cta.first_warp + i];
        warp.words = std::vector<u32>();
        warp.longs = std::vector<u64>();
    }
}

inline i32 Machine::most_live_ctas() const {
    return config.at_once ? std::min(config.at_once, n_ctas) : n_ctas;
}

inline void Machine::start_waiting_ctas() {
    while (next_cta < n_ctas && i32(live_ctas.size()) < most_live_ctas()) {
        i32 id = start_order[next_cta++];
        start_cta(ctas[id]);
        live_ctas.push_back(id);
        idle = 0;
    }
}

inline void Machine::choose_victims() {
    constexpr u32 TURNS = 3000; // about as long as one is starved
    if (victim_cta < 0 || (config.policy == STARVE_CTA && !random.below(TURNS)))
        victim_cta = live_ctas[random.below(live_ctas.size())];
    if (config.policy == STARVE_WARP && !random.below(TURNS))
        victim_warp = random.below(config.warps);
}

inline bool Machine::is_starved(i32 cta, i32 warp) {
    constexpr u32 RARELY = 400; // a turn in so many
    if (config.policy == STARVE_CTA)
        return cta == victim_cta && live_ctas.size() > 1 && random.below(RARELY);
    if (config.policy == STARVE_WARP && warp == victim_warp && random.below(RARELY)) {
        idle++; // the others may all wait for it, and that is no hang: it gets a turn now and then
        return random.below(50);
    }
    return false;
}

inline i32 Machine::turn_length() {
    constexpr u32 QUANTUM = 40;
    if (fair)
        return 16;
    switch (config.policy) {
    case ONE_INSTRUCTION:
        return 1;
    case BURSTS:
        return 400;
    default:
        i32 length = 1 + random.below(QUANTUM);
        return random.below(4) ? length : length * 8;
    }
}

// Between turns some stores reach memory.
inline void Machine::drain_at_random(i32 turn) {
    if (config.drain == DRAIN_AT_ONCE)
        return;
    Cta &cta = ctas[live_ctas[random.below(live_ctas.size())]];
    const u32 waiting = cta.stores.words.size();
    if (!waiting)
        return;
    if (config.drain == DRAIN_RANDOM)
        drain_some(cta, random.below(4) ? random.below(8) : random.below(1 + waiting));
    else if (i32(random.below(1000)) < turn)
        drain_some(cta, 1 + random.below(1 + waiting / 4));
}

inline void Machine::take_turn() {
    u32 place = random.below(live_ctas.size());
    const i32 index = random.below(config.warps);
    if (!fair) {
        if (is_starved(live_ctas[place], index))
            return;
        if (config.policy == BURSTS && random.below(100)) // one CTA far ahead, then the next
            place = (now >> 12) % live_ctas.size();
    }
    Cta &cta = ctas[live_ctas[place]];
    constexpr i64 POLLS = 12000; // instructions without a store: it waits, and seldom is enough
    if (!fair && cta.without_store > POLLS && live_ctas.size() > 1 && random.below(8)) {
        idle += 4;
        return;
    }
    const i32 turn = turn_length();
    const u64 before = now;
    run_warp(warps[cta.first_warp + index], turn);
    cta.without_store += now - before;
    idle++;
    if (failed)
        return;
    drain_at_random(turn);
    for (i32 i = 0; i < config.warps; i++)
        if (warps[cta.first_warp + i].alive)
            return;
    stop_cta(cta);
    live_ctas.erase(live_ctas.begin() + place);
    idle = 0;
    victim_cta = -1;
}

// Without progress for long, once more with fair turns and all stores in memory: if there is none
// then either, there never will be. A program that never polls may compute for long before it
// stores anything; only at a barrier can it wait in vain.
inline bool Machine::is_hang() {
    const i64 each = polls ? (n_ctas < 4 ? 60'000 : 30'000) : 1'000'000;
    const i64 patience = each * most_live_ctas() * config.warps;
    if (idle <= patience) {
        fair = fair && !progress;
        return false;
    }
    for (i32 id : live_ctas)
        drain_all(ctas[id]);
    if (fair && !progress)
        return true;
    fair = true;
    idle = 0;
    progress = false;
    return false;
}

inline Status Machine::run() {
    for (i32 i = 0; i < n_ctas; i++) // CTAs start in any order
        start_order.push_back(i);
    for (i32 i = n_ctas - 1; i > 0; i--)
        std::swap(start_order[i], start_order[random.below(i + 1)]);
    victim_warp = random.below(config.warps);
    for (start_waiting_ctas(); !live_ctas.empty(); start_waiting_ctas()) {
        choose_victims();
        take_turn();
        if (failed)
            return FAILED;
        if (is_hang())
            return HANG;
        // Memory changes all the time, so that it is no hang, and may do so for ever.
        if (now >= config.most_instructions && !live_ctas.empty())
            return ENDLESS;
    }
    return ENDED;
}
