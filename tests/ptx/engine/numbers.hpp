// Operations on single values that C++ has no operator for.
#pragma once
#include "program.hpp"

inline float as_float(u32 bits) {
    return std::bit_cast<float>(bits);
}

// The bits of a result. PTX's only NaN of float32 operations is this one.
inline u32 float_bits(float value) {
    return value != value ? 0x7FFFFFFF : std::bit_cast<u32>(value);
}

inline float from_bf16(u16 bits) {
    return as_float(u32(bits) << 16);
}

inline u16 to_bf16(float value) { // to nearest even
    if (value != value)
        return 0x7FFF;
    u32 bits = std::bit_cast<u32>(value);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float from_fp16(u16 bits) {
    return std::bit_cast<_Float16>(bits);
}

inline u16 to_fp16(float value) { // to nearest even
    return value != value ? 0x7FFF : std::bit_cast<u16>(_Float16(value));
}

constexpr u32 TF32_BITS = 0xFFFFE000;

// `ties_away`: .rna, else .rn
inline u32 to_tf32(u32 bits, bool ties_away) {
    u32 magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000)
        return 0x7FFFFFFF;
    if (magnitude == 0x7F800000)
        return bits;
    return (bits + (ties_away ? 0x1000 : 0xFFF + (bits >> 13 & 1))) & TF32_BITS;
}

// Tensor cores drop the low bits of tf32 operands.
inline float matrix_value(i32 kind, u32 bits) {
    switch (kind) {
    case BF16:
        return from_bf16(bits);
    case FP16:
        return from_fp16(bits);
    default:
        return as_float(bits & TF32_BITS);
    }
}

// `cvt.rzi`: clamped to the range, 0 for NaN.
template <class Integer> Integer truncated(float value) {
    using Limits = std::numeric_limits<Integer>;
    if (value != value)
        return 0;
    if (value <= float(Limits::min()))
        return Limits::min();
    return value >= float(Limits::max()) ? Limits::max() : Integer(value);
}

// `min`, `max`: the other operand if one is NaN, and -0 < +0.
inline float float_min(float a, float b) {
    if (a != a || b != b)
        return a != a ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
}

inline float float_max(float a, float b) {
    if (a != a || b != b)
        return a != a ? b : a;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
}

// `bfe`
inline u32 extract_bits(u32 value, u32 position, u32 length, bool is_signed) {
    position &= 255;
    length &= 255;
    if (length == 0)
        return 0;
    bool negative = is_signed && has(value, std::min(position + length - 1, 31u));
    u32 there = position > 31 ? 0 : std::min(length, 32 - position);
    if (there == 0)
        return negative ? ~0u : 0;
    u32 bits = value >> position;
    if (there == 32)
        return bits;
    u32 mask = (1u << there) - 1;
    return negative ? bits | ~mask : bits & mask;
}

// `bfi`
inline u32 insert_bits(u32 from, u32 into, u32 position, u32 length) {
    position &= 255;
    length &= 255;
    if (position > 31)
        return into;
    u64 mask = ((u64(1) << std::min(length, 32u)) - 1) << position;
    return (into & ~mask) | (u64(from) << position & mask);
}

// `prmt`: 4 bytes of 8, each by 3 bits, or its sign by a fourth.
inline u32 permute_bytes(u32 low, u32 high, u32 selector) {
    u64 bytes = low | u64(high) << 32;
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        u32 choice = selector >> 4 * i & 15;
        u32 byte = bytes >> 8 * (choice & 7) & 255;
        if (choice & 8)
            byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}

// `lop3`: a table of 8 bits, indexed by a bit of each operand.
inline u32 logic(u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; i++)
        if (has(table, i))
            result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

inline u32 reversed_bits(u32 value) {
    u32 result = 0;
    for (int i = 0; i < 32; i++)
        result |= (value >> i & 1) << (31 - i);
    return result;
}

// Division by zero gives all ones; the smallest by -1 stays the smallest.
template <class Integer> Integer quotient(Integer a, Integer b) {
    if (b == 0)
        return Integer(-1);
    if (std::is_signed_v<Integer> && b == Integer(-1))
        return Integer(0) - std::make_unsigned_t<Integer>(a);
    return a / b;
}

template <class Integer> Integer remainder_of(Integer a, Integer b) {
    if (b == 0)
        return a;
    if (std::is_signed_v<Integer> && b == Integer(-1))
        return 0;
    return a % b;
}

// Comparisons of setp, by the numbers of the parser's table CMP.
enum Comparison : i32 {
    EQ,
    NE,
    LT,
    LE,
    GT,
    GE,
    EQU = 10,
    NEU,
    LTU,
    LEU,
    GTU,
    GEU, // true too if one is NaN
    NUM,
    NAN_
};

template <class Value> bool compare(i32 how, Value a, Value b) {
    const bool unordered = a != a || b != b;
    switch (how) {
    case EQ:
        return a == b;
    case NE:
        return a != b && !unordered;
    case LT:
        return a < b;
    case LE:
        return a <= b;
    case GT:
        return a > b;
    case GE:
        return a >= b;
    case EQU:
        return unordered || a == b;
    case NEU:
        return unordered || a != b;
    case LTU:
        return unordered || a < b;
    case LEU:
        return unordered || a <= b;
    case GTU:
        return unordered || a > b;
    case GEU:
        return unordered || a >= b;
    case NUM:
        return !unordered;
    default:
        return unordered;
    }
}
