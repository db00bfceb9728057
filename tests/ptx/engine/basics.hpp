// Short names, lanes, random numbers and texts, for all parts of the engine.
#pragma once
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <type_traits>
#include <vector>

using u8 = uint8_t;
using i8 = int8_t;
using u16 = uint16_t;
using i16 = int16_t;
using u32 = uint32_t;
using i32 = int32_t;
using u64 = uint64_t;
using i64 = int64_t;

constexpr int LANES = 32;
constexpr u32 ALL_LANES = 0xFFFFFFFF;

// A register of a warp: a value for each lane.
using Words = std::array<u32, LANES>;
using Longs = std::array<u64, LANES>;

inline bool has(u32 mask, int lane) {
    return mask >> lane & 1;
}

// `for (int lane : lanes_of(mask))` visits the lanes whose bit is set, the lowest first.
struct LaneIterator {
    u32 rest;
    int operator*() const {
        return std::countr_zero(rest);
    }
    LaneIterator &operator++() {
        rest &= rest - 1;
        return *this;
    }
    bool operator!=(const LaneIterator &other) const {
        return rest != other.rest;
    }
};
struct LaneRange {
    u32 mask;
    LaneIterator begin() const {
        return {mask};
    }
    LaneIterator end() const {
        return {0};
    }
};
inline LaneRange lanes_of(u32 mask) {
    return {mask};
}

// xorshift64*: all choices of a run follow from its seed.
struct Random {
    u64 state;

    explicit Random(u64 seed) : state(seed * 0x9E3779B97F4A7C15 + 0x1234567) {
        state += state == 0;
        for (int i = 0; i < 8; i++)
            next();
    }
    u64 next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state * 2685821657736338717u;
    }
    u32 below(u32 limit) {
        return (next() >> 32) * limit >> 32;
    }
    u32 word() {
        return next();
    }
};

// A line of text that is cut at its capacity.
struct Text {
    char text[256] = "";
    size_t length = 0;

    __attribute__((format(printf, 2, 3))) Text &add(const char *format, ...) {
        va_list arguments;
        va_start(arguments, format);
        int wanted = vsnprintf(text + length, sizeof text - length, format, arguments);
        va_end(arguments);
        length = std::min(length + std::max(wanted, 0), sizeof text - 1);
        return *this;
    }
};
