// What the caller says and hears. machine.py declares the same records.
#pragma once
#include "basics.hpp"

struct Region { // a tensor's storage, in 64 GiB of addresses of its own
    u64 base, size;
    u8 *bytes;
    u8 *defined; // per byte: has been written
};
constexpr int REGION_SHIFT = 36;

enum Policy : i32 { RANDOM_TURNS, ONE_INSTRUCTION, STARVE_WARP, STARVE_CTA, BURSTS };
enum Drain : i32 { DRAIN_AT_ONCE, DRAIN_RANDOM, DRAIN_LAZY };

struct Config {
    i32 grid[3];
    i32 warps; // of a CTA
    i32 shared_bytes;
    i32 n_regions;
    i32 policy, drain;
    i32 at_once;    // most CTAs; 0 for all
    i32 statistics; // count by instruction
    u64 seed;
    u64 most_instructions; // of warps; about that many, as turns are not cut
};

enum Status : i32 { ENDED, HANG, FAILED, ENDLESS };

enum Kind : i32 {
#define X(name, text) name,
#include "findings.inc"
#undef X
};

struct Finding {
    i32 kind;
    i32 first_pc, second_pc;
    u64 count;
    char example[sizeof Text::text];
};

enum Wait : i32 { READY, AT_BARRIER, FOR_LANES, DONE };

struct Stuck {   // lanes that did not end
    i32 x, y, z; // the CTA
    i32 warp;
    i32 pc;
    u32 mask;
    i32 wait;
};

struct Counters {
    u64 instructions, l1_hits, stale_hits, drained, barriers;
};
