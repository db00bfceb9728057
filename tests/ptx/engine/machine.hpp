// A launch: its state, and what acts upon it, by the headers that have the bodies.
#pragma once
#include "interface.hpp"
#include "program.hpp"
#include "state.hpp"

struct Machine {
    Config config;
    Program program;
    std::vector<Region> regions;
    std::vector<u32> constant_words; // a register's worth of each constant
    std::vector<u64> constant_longs;

    i32 n_ctas = 0, n_warps = 0;
    std::vector<Warp> warps;
    std::vector<Cta> ctas;
    Random random;
    u64 now = 0; // instructions

    // Races
    int shared_shift = 0, global_shift = 0;                // log2 of the bytes of a granule
    std::vector<std::vector<GlobalShadow *>> shadow_pages; // by region; null where untouched
    Table<Clock> published; // by address: what its releases say, for who acquires there

    // Findings
    Table<u32> finding_index;
    std::vector<Finding> findings;
    bool failed = false;
    Counters counters{};
    std::vector<u64> executions, first_warp_executions; // by pc
    std::vector<u64> transactions, least_transactions;  // wavefronts or sectors

    // Scheduling
    std::vector<i32> start_order, live_ctas;
    i32 next_cta = 0;
    i32 victim_warp = 0, victim_cta = -1;
    const bool polls;      // whether the program can wait for what others write
    i64 idle = 0;          // turns and instructions since the last progress
    bool progress = false; // something changed since `idle` was last looked at
    bool fair = false;     // turns without malice, to make sure of a hang

    Machine(const Config &, const Program &, const Region *);
    ~Machine();

    // Registers, below. A source may be a constant, a destination may be SINK.
    const u32 *words(const Warp &warp, i32 operand) const {
        return operand >= 0 ? &warp.words[size_t(operand) * LANES]
                            : &constant_words[size_t(~operand) * LANES];
    }
    const u64 *longs(const Warp &warp, i32 operand) const {
        return operand >= 0 ? &warp.longs[size_t(operand) * LANES]
                            : &constant_longs[size_t(~operand) * LANES];
    }
    u32 predicate(const Warp &warp, i32 operand) const {
        return operand >= 0 ? warp.predicates[operand] : operand == ~1 ? ALL_LANES : 0;
    }
    i32 source(const Instruction &ins, int i) const {
        return program.pool[ins.first_source + i];
    }
    i32 destination(const Instruction &ins, int i) const {
        return program.pool[ins.first_destination + i];
    }
    i32 pc_of(const Instruction &ins) const {
        return &ins - program.code;
    }
    void set_words(Warp &, i32 destination, const u32 *values, u32 mask);
    void set_longs(Warp &, i32 destination, const u64 *values, u32 mask);
    void set_predicate(Warp &, i32 destination, u32 values, u32 mask);
    void set_element(Warp &, i32 destination, int lane, const u8 *bytes, u32 size);
    u64 get_element(const Warp &, i32 operand, int lane, u32 size) const;

    // findings.hpp
    template <class Describe> void report(Kind, i32 first_pc, i32 second_pc, Describe describe);
    void fail(i32 pc, const char *reason, const char *detail = "");
    void name_warp(Text &, const Warp &, int lane = -1) const;
    void name_address(Text &, u64 address) const;
    std::vector<Stuck> stuck() const;

    // clocks.hpp
    void tick(Warp &);
    void learn(Warp &, const Clock &);
    void learn_practical(Warp &, i32 writer, u32 clock);
    void take_snapshot(Warp &);
    void observe(Warp &, u64 address, bool acquire);
    void publish(Warp &, u64 address, bool release, bool read_modify_write);

    // global_races.hpp
    GlobalShadow &global_shadow(i32 region, u64 granule);
    void check_last_global_write(Warp &, const GlobalShadow &, u64 address, bool write, u32 strong,
                                 i32 pc, int lane);
    void watch_global_read(Warp &, i32 region, u64 address, u32 size, u32 strong, bool observed,
                           i32 pc, int lane);
    void watch_global_write(Warp &, i32 region, u64 address, u32 size, u32 strong, i32 pc,
                            int lane);
    void mark_visible(i32 region, u64 address, u32 size, i32 warp, u32 clock);

    // store_buffers.hpp
    bool knows(const Warp &, const Cta &, const Store &) const;
    void perform(const Store &);
    void buffer_store(Warp &, Cta &, u64 address, u64 value, u32 size);
    void drain_one(Cta &);
    void drain_some(Cta &, u32 count);
    void drain_all(Cta &);
    void drain_known(Warp &, Cta &);
    void drain_word(Cta &, u64 address);
    u32 forward(const Warp &, Cta &, u64 address, u32 size, u8 *bytes);

    // global_memory.hpp
    i32 locate(u64 address, u32 size) const;
    i32 check_global(const Warp &, u64 address, u32 size, u32 alignment, i32 pc, int lane,
                     const char *what);
    void check_global_defined(const Warp &, i32 region, u64 address, u32 size, u32 forwarded,
                              i32 pc, int lane);
    void count_sectors(const Instruction &, u32 mask, const u64 *addresses, u32 size);
    void read_through_l1(Cta &, const Region &, u64 address, u32 size, u8 *bytes);
    u32 read_global(Warp &, Cta &, i32 region, u64 address, u32 size, i32 flags, u8 *bytes);
    void load_global(Warp &, const Instruction &, u32 mask);
    void store_global(Warp &, const Instruction &, u32 mask);
    void atomic(Warp &, const Instruction &, u32 mask);
    void fence(Warp &, const Instruction &);

    // shared_races.hpp
    void check_last_shared_write(Warp &, Cta &, u32 granule, bool write, bool same_value, i32 pc,
                                 int lane);
    void check_proxy(Warp &, Cta &, u32 address, u32 size, i32 pc);
    void watch_shared_read(Warp &, Cta &, u32 address, u32 size, i32 pc, int lane);
    void watch_shared_write(Warp &, Cta &, u32 address, u32 size, bool same_value, i32 pc,
                            int lane);
    template <class Action> void for_granules(Cta &, u32 address, u32 size, Action action);

    // shared_memory.hpp
    bool check_shared(const Warp &, u32 address, u32 size, i32 pc, int lane);
    void check_shared_defined(const Warp &, const Cta &, u32 address, u32 size, i32 pc, int lane);
    void count_banks(i32 pc, u32 mask, const u32 *addresses, u32 size, i32 offset);
    void count_matrix_banks(const Instruction &, const u32 *addresses);
    void load_shared(Warp &, const Instruction &, u32 mask);
    void store_shared(Warp &, const Instruction &, u32 mask);
    void load_matrices(Warp &, const Instruction &);
    void store_matrices(Warp &, const Instruction &);

    // async_copies.hpp
    void issue_copy(Warp &, const Instruction &, u32 mask);
    void perform_copy(Warp &, const AsyncCopy &);
    void wait_copies(Warp &, i32 first_group_left);

    // mma.hpp
    void mma(Warp &, const Instruction &);

    // wgmma.hpp
    std::vector<u32> wgmma_rows(const Warp &, const Wgmma &) const;
    void issue_wgmma(Warp &, const Instruction &);
    void perform_wgmma(Warp &, const Wgmma &);
    void wait_wgmmas(Warp &, i32 groups_left);

    // arithmetic.hpp
    bool compute(Warp &, const Instruction &, u32 mask);
    void set_comparison(Warp &, const Instruction &, u32 mask, u32 result);

    // lanes.hpp
    void special_register(Warp &, const Instruction &, u32 mask);
    void shuffle(Warp &, const Instruction &, u32 mask);
    void reduce(Warp &, const Instruction &, u32 mask);
    void vote(Warp &, const Instruction &, u32 mask);

    // warps.hpp
    void execute(Warp &, const Instruction &, u32 mask);
    void branch(Warp &, Fragment &, const Instruction &, u32 mask);
    void return_lanes(Warp &, Fragment &, u32 mask);
    void arrive(Warp &, Fragment &, const Instruction &);
    void complete_barrier(Cta &, i32 id);
    void step(Warp &, Fragment &);
    u32 lanes_wanted(const Warp &, const Fragment &, const Instruction &) const;
    void check_collective(const Warp &, const Instruction &, u32 mask);
    Fragment *choose_fragment(Warp &);
    void run_warp(Warp &, i32 instructions);

    // scheduler.hpp
    void start_cta(Cta &);
    void stop_cta(Cta &);
    void note_progress();
    i32 most_live_ctas() const;
    void start_waiting_ctas();
    void choose_victims();
    bool is_starved(i32 cta, i32 warp);
    i32 turn_length();
    void drain_at_random(i32 turn);
    bool is_hang();
    void take_turn();
    Status run();
};

inline void Machine::set_words(Warp &warp, i32 destination, const u32 *values, u32 mask) {
    if (destination == SINK)
        return;
    u32 *row = &warp.words[size_t(destination) * LANES];
    if (mask == ALL_LANES)
        memcpy(row, values, LANES * sizeof *row);
    else
        for (int lane : lanes_of(mask))
            row[lane] = values[lane];
}

inline void Machine::set_longs(Warp &warp, i32 destination, const u64 *values, u32 mask) {
    if (destination == SINK)
        return;
    u64 *row = &warp.longs[size_t(destination) * LANES];
    if (mask == ALL_LANES)
        memcpy(row, values, LANES * sizeof *row);
    else
        for (int lane : lanes_of(mask))
            row[lane] = values[lane];
}

inline void Machine::set_predicate(Warp &warp, i32 destination, u32 values, u32 mask) {
    if (destination == SINK)
        return;
    u32 &predicate = warp.predicates[destination];
    predicate = (predicate & ~mask) | (values & mask);
}

// Elements of 8 bytes are in registers of 64 bits, all others in those of 32.
inline void Machine::set_element(Warp &warp, i32 destination, int lane, const u8 *bytes, u32 size) {
    if (destination == SINK)
        return;
    u64 value = 0;
    memcpy(&value, bytes, size);
    if (size == 8)
        warp.longs[size_t(destination) * LANES + lane] = value;
    else
        warp.words[size_t(destination) * LANES + lane] = value;
}

inline u64 Machine::get_element(const Warp &warp, i32 operand, int lane, u32 size) const {
    if (size == 8)
        return longs(warp, operand)[lane];
    u32 value = words(warp, operand)[lane];
    return size == 4 ? value : value & ((1u << 8 * size) - 1);
}
