// What there is of a launch: warps, CTAs, and the shadows of memory.
#pragma once
#include "interface.hpp"
#include "table.hpp"

// ---- Warps.

// By warp of the grid: how much of its history is known. A warp counts itself up where others may
// come to know of what it did.
using Clock = std::vector<u32>;

struct Snapshot {
    u32 since; // the warp's own time
    Clock practical;
};

struct Fragment { // lanes of a warp that stand at the same instruction
    i32 pc;
    u32 mask;
    Wait wait = READY;
    i32 barrier = 0;
};

struct AsyncCopy { // a cp.async that has not been waited for
    i32 pc;
    u32 mask;
    i32 group;
    bool late; // copies when it is waited for, else has copied when it was issued
    Words destination, bytes;
    Longs source;
};

struct Wgmma { // a wgmma.mma_async that has not been waited for
    i32 pc;
    i32 group;
    u64 a, b; // descriptors
    bool accumulate;
    std::vector<u32> rows; // 16 bytes of shared memory each
};

struct Warp {
    i32 id; // in the grid
    i32 cta;
    i32 index; // in the CTA

    std::vector<u32> words; // registers of 32 bits and less: 32 lanes each
    std::vector<u64> longs;
    std::vector<u32> predicates; // a bit for each lane
    std::vector<Fragment> fragments;
    u32 alive = 0; // lanes that have not returned

    Clock clock;     // what happens before, in causality order
    Clock practical; // `clock`, and what must have happened for values that were read to be there
    Clock acquired;  // what an acquire fence would add; empty if nothing
    Clock released;  // what strong stores publish since the last release fence; empty without one
    std::vector<Snapshot> snapshots; // of `practical` where it stored, when it differed
    bool practical_changed = true;   // since the last snapshot
    u32 syncs = 0;                   // bar.warp.sync and barriers

    std::vector<AsyncCopy> copies;
    i32 copy_group = 0;
    std::vector<Wgmma> wgmmas;
    i32 wgmma_group = 0;
    std::map<i32, Words> accumulators; // of wgmmas; meanwhile their registers hold noise
    u64 proxy_fence = 0;               // when it last did a fence.proxy.async
};

// ---- CTAs.

struct Store { // in a store buffer
    u64 address;
    u64 value;
    u8 size;
    i32 owner; // the warp
    u32 epoch; // barriers of the CTA before it
    u32 clock; // of the owner
};

struct StoreBuffer {
    Table<std::vector<Store>> by_word; // address / 8 to its stores, the oldest first
    std::vector<u64> words;            // the word of each store, in any order
};

struct SharedShadow { // of a granule of shared memory
    u64 write_time;   // in instructions
    u32 write_clock;  // 0 if never written
    i32 write_pc;
    u32 write_syncs;
    u32 readers; // warps that have read since
    u16 copies;  // cp.async in flight to here
    u16 wgmmas;  // wgmma in flight that read here
    u8 writer;
    u8 write_lane;
};

struct SharedRead {
    u32 clock;
    i32 pc;
    u32 syncs;
    i32 lane; // LANES if several have read since the last sync; -1 if wgmma alone has
};

struct Barrier {
    u32 arrived = 0;  // warps
    u32 expected = 0; // how many; 0 for all
    i32 pc = -1;
};
constexpr int N_BARRIERS = 16;

using Sector = std::array<u8, 32>;

struct Cta {
    i32 x, y, z;
    i32 first_warp;
    bool live = false;
    std::vector<u8> shared;
    std::vector<u8> shared_defined;
    std::vector<SharedShadow> shadows;
    std::vector<SharedRead> reads; // of a granule by each warp, where `readers` says so
    StoreBuffer stores;
    Table<Sector> l1; // by address / 32
    std::array<Barrier, N_BARRIERS> barriers;
    u32 epoch = 1;         // barriers done, for what stores its warps know of
    i64 without_store = 0; // instructions since it last stored to global memory
};

// ---- Shadows of global memory.

struct GlobalRead {
    u32 clock;
    i32 pc;
    u16 warp;
    u16 strong; // bytes of an element, 0 if weak
};

struct GlobalShadow { // of a granule
    u32 write_clock;  // of the last store in the order of execution; 0 if there was none
    i32 write_pc;
    u16 writer;
    u16 write_strong;  // as that of a read
    u32 visible_clock; // of the last store that has left its buffer; 0 if there was none
    u16 visible_writer;
    u16 n_reads;
    GlobalRead reads[6]; // since the last store
};
constexpr u64 SHADOW_PAGE = 4096; // granules
