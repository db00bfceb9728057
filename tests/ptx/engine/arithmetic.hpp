// Instructions that work on registers alone, lane by lane.
#pragma once
#include "machine.hpp"
#include "numbers.hpp"

// `compute` is a table: a line for each operation, with what a lane does to its operands a, b, c. A
// missing operand is a again. The forms, by the registers that they read and write:
//
//   WORD     words to a word              FLOAT    the same, of float32
//   LONG     longs to a long              PAIR     the same, of two float32
//   SHIFT    a long and a word to a long  WIDE     words and a long c to a long
//   NARROW   a long to a word             COMPARE  two of a type to a predicate
//   MASK     predicates, all lanes in one

template <class Result, class A, class B, class C, class Lane>
std::array<Result, LANES> each_lane(const A *a, const B *b, const C *c, Lane of_lane) {
    std::array<Result, LANES> results;
    for (int lane = 0; lane < LANES; lane++)
        results[lane] = of_lane(a[lane], b[lane], c[lane]);
    return results;
}

template <class Value, class Row> u32 compare_lanes(i32 how, const Row *a, const Row *b) {
    u32 result = 0;
    for (int lane = 0; lane < LANES; lane++)
        result |= u32(compare(how, Value(a[lane]), Value(b[lane]))) << lane;
    return result;
}

// What `compare` compares, made of a register's bits.
template <float (*convert)(u32)> struct FloatOf {
    float value;
    explicit FloatOf(u32 bits) : value(convert(bits)) {
    }
    operator float() const {
        return value;
    }
};
using Float = FloatOf<as_float>;
using BFloat16 = FloatOf<[](u32 bits) { return from_bf16(bits); }>;
using Float16 = FloatOf<[](u32 bits) { return from_fp16(bits); }>;

template <class Operation> u32 of_floats(u32 a, u32 b, u32 c, Operation operation) {
    return float_bits(operation(as_float(a), as_float(b), as_float(c)));
}

template <class Operation> u64 of_pairs(u64 a, u64 b, u64 c, Operation operation) {
    u32 low = of_floats(a, b, c, operation);
    u32 high = of_floats(a >> 32, b >> 32, c >> 32, operation);
    return low | u64(high) << 32;
}

// `setp`: with a second predicate, and with the complement as a second result. aux2 is 1 and, 2 or,
// 3 xor; + 4 if the second predicate is negated.
inline void Machine::set_comparison(Warp &warp, const Instruction &ins, u32 mask, u32 result) {
    u32 complement = ~result;
    if (ins.aux2) {
        u32 other = predicate(warp, source(ins, 2));
        if (ins.aux2 & 4)
            other = ~other;
        switch (ins.aux2 & 3) {
        case 1:
            result &= other;
            complement &= other;
            break;
        case 2:
            result |= other;
            complement |= other;
            break;
        default:
            result ^= other;
            complement ^= other;
        }
    }
    set_predicate(warp, destination(ins, 0), result, mask);
    if (ins.n_destinations > 1)
        set_predicate(warp, destination(ins, 1), complement, mask);
}

// False if the operation is none of these.
inline bool Machine::compute(Warp &warp, const Instruction &ins, u32 mask) {
    auto word = [&](int i) { return words(warp, source(ins, i < ins.n_sources ? i : 0)); };
    auto wide = [&](int i) { return longs(warp, source(ins, i < ins.n_sources ? i : 0)); };
    auto bits = [&](int i) { return predicate(warp, source(ins, i)); };
    auto put_words = [&](int i, const Words &values) {
        set_words(warp, destination(ins, i), values.data(), mask);
    };
    auto put_longs = [&](const Longs &values) {
        set_longs(warp, destination(ins, 0), values.data(), mask);
    };
#define RETURNS(type, expression)                                                                  \
    [=]([[maybe_unused]] auto a, [[maybe_unused]] auto b, [[maybe_unused]] auto c) -> type {       \
        return expression;                                                                         \
    }
#define WORD(op, expression)                                                                       \
    case op:                                                                                       \
        put_words(0, each_lane<u32>(word(0), word(1), word(2), RETURNS(u32, expression)));         \
        return true;
#define FLOAT(op, expression) WORD(op, of_floats(a, b, c, RETURNS(float, expression)))
#define LONG(op, expression)                                                                       \
    case op:                                                                                       \
        put_longs(each_lane<u64>(wide(0), wide(1), wide(2), RETURNS(u64, expression)));            \
        return true;
#define PAIR(op, expression) LONG(op, of_pairs(a, b, c, RETURNS(float, expression)))
#define SHIFT(op, expression)                                                                      \
    case op:                                                                                       \
        put_longs(each_lane<u64>(wide(0), word(1), word(1), RETURNS(u64, expression)));            \
        return true;
#define WIDE(op, expression)                                                                       \
    case op:                                                                                       \
        put_longs(each_lane<u64>(word(0), word(1),                                                 \
                                 ins.n_sources > 2 ? wide(2) : constant_longs.data(),              \
                                 RETURNS(u64, expression)));                                       \
        return true;
#define NARROW(op, expression)                                                                     \
    case op:                                                                                       \
        put_words(0, each_lane<u32>(wide(0), wide(0), wide(0), RETURNS(u32, expression)));         \
        return true;
#define COMPARE(op, type, row)                                                                     \
    case op:                                                                                       \
        set_comparison(warp, ins, mask, compare_lanes<type>(ins.aux, row(0), row(1)));             \
        return true;
#define MASK(op, expression)                                                                       \
    case op:                                                                                       \
        set_predicate(warp, destination(ins, 0), expression, mask);                                \
        return true;

    // clang-format off
    switch (ins.op) {
    WORD(MOV32, a)
    LONG(MOV64, a)

    WORD(ADD32, a + b)
    WORD(SUB32, a - b)
    WORD(MULLO32, a * b)
    WORD(MADLO32, a * b + c)
    WORD(MULHIS32, i64(i32(a)) * i32(b) >> 32)
    WORD(MULHIU32, u64(a) * b >> 32)
    WORD(AND32, a & b)
    WORD(OR32, a | b)
    WORD(XOR32, a ^ b)
    WORD(NOT32, ~a)
    WORD(NEG32, 0 - a)
    WORD(ABS32, i32(a) < 0 ? 0 - a : a)
    WORD(SHL32, b > 31 ? 0 : a << b)
    WORD(SHRU32, b > 31 ? 0 : a >> b)
    WORD(SHRS32, i32(a) >> std::min(b, 31u))
    WORD(MINS32, std::min(i32(a), i32(b)))
    WORD(MAXS32, std::max(i32(a), i32(b)))
    WORD(MINU32, std::min(a, b))
    WORD(MAXU32, std::max(a, b))
    WORD(DIVS32, quotient(i32(a), i32(b)))
    WORD(DIVU32, quotient(a, b))
    WORD(REMS32, remainder_of(i32(a), i32(b)))
    WORD(REMU32, remainder_of(a, b))
    WORD(BFEU32, extract_bits(a, b, c, false))
    WORD(BFES32, extract_bits(a, b, c, true))
    WORD(PRMT, permute_bytes(a, b, c))
    WORD(POPC32, std::popcount(a))
    WORD(CLZ32, std::countl_zero(a))
    WORD(BREV32, reversed_bits(a))
    WORD(SHFLWRAPL, (u64(b) << 32 | a) << (c & 31) >> 32)
    WORD(SHFLWRAPR, (u64(b) << 32 | a) >> (c & 31))

    WORD(ADD16, u16(a + b))
    WORD(SUB16, u16(a - b))
    WORD(MULLO16, u16(a * b))
    WORD(NOT16, u16(~a))
    WORD(NEG16, u16(0 - a))
    WORD(SHL16, b > 15 ? 0 : u16(a << b))
    WORD(SHRU16, b > 15 ? 0 : u16(a) >> b)
    WORD(SHRS16, u16(i16(a) >> std::min(b, 15u)))
    WORD(MINS16, u16(std::min(i16(a), i16(b))))
    WORD(MAXS16, u16(std::max(i16(a), i16(b))))
    WORD(MINU16, std::min(u16(a), u16(b)))
    WORD(MAXU16, std::max(u16(a), u16(b)))
    WORD(MINU16X2, std::min(u16(a), u16(b)) | std::min(a >> 16, b >> 16) << 16)
    WORD(MAXU16X2, std::max(u16(a), u16(b)) | std::max(a >> 16, b >> 16) << 16)

    LONG(ADD64, a + b)
    LONG(SUB64, a - b)
    LONG(MULLO64, a * b)
    LONG(MADLO64, a * b + c)
    LONG(AND64, a & b)
    LONG(OR64, a | b)
    LONG(XOR64, a ^ b)
    LONG(NOT64, ~a)
    LONG(NEG64, 0 - a)
    SHIFT(SHL64, b > 63 ? 0 : a << b)
    SHIFT(SHRU64, b > 63 ? 0 : a >> b)
    SHIFT(SHRS64, i64(a) >> std::min(b, 63u))
    LONG(MINS64, std::min(i64(a), i64(b)))
    LONG(MAXS64, std::max(i64(a), i64(b)))
    LONG(MINU64, std::min(a, b))
    LONG(MAXU64, std::max(a, b))
    LONG(DIVS64, quotient(i64(a), i64(b)))
    LONG(DIVU64, quotient(a, b))
    LONG(REMS64, remainder_of(i64(a), i64(b)))
    LONG(REMU64, remainder_of(a, b))
    WIDE(MULWS32, i64(i32(a)) * i32(b))
    WIDE(MULWU32, u64(a) * b)
    WIDE(MADWS32, i64(i32(a)) * i32(b) + c)
    WIDE(MADWU32, u64(a) * b + c)

    // .approx and .full are exact here; the hardware is within 2 ulp.
    FLOAT(ADDF, a + b)
    FLOAT(SUBF, a - b)
    FLOAT(MULF, a * b)
    FLOAT(FMAF, __builtin_fmaf(a, b, c))
    WORD(NEGF, a ^ 0x80000000)
    WORD(ABSF, a & 0x7FFFFFFF)
    FLOAT(MINF, float_min(a, b))
    FLOAT(MAXF, float_max(a, b))
    FLOAT(DIVF, a / b)
    FLOAT(EX2F, exp2f(a))
    FLOAT(LG2F, log2f(a))
    FLOAT(RCPF, 1.0f / a)
    FLOAT(SQRTF, sqrtf(a))
    FLOAT(RSQRTF, 1.0f / sqrtf(a))
    FLOAT(TANHF, tanhf(a))
    FLOAT(SINF, sinf(a))
    FLOAT(COSF, cosf(a))
    PAIR(ADDF2, a + b)
    PAIR(SUBF2, a - b)
    PAIR(MULF2, a * b)
    PAIR(FMAF2, __builtin_fmaf(a, b, c))

    COMPARE(SETPS32, i32, word)
    COMPARE(SETPU32, u32, word)
    COMPARE(SETPS16, i16, word)
    COMPARE(SETPU16, u16, word)
    COMPARE(SETPS64, i64, wide)
    COMPARE(SETPU64, u64, wide)
    COMPARE(SETPF, Float, word)
    COMPARE(SETPBF16, BFloat16, word)
    COMPARE(SETPF16, Float16, word)
    MASK(MOVP, bits(0))
    MASK(ANDP, bits(0) & bits(1))
    MASK(ORP, bits(0) | bits(1))
    MASK(XORP, bits(0) ^ bits(1))
    MASK(NOTP, ~bits(0))

    WORD(CVT_F32_BF16, a << 16)
    WORD(CVT_F32_F16, float_bits(from_fp16(a)))
    WORD(CVT_BF16_F32, to_bf16(as_float(a)))
    WORD(CVT_F16_F32, to_fp16(as_float(a)))
    WORD(CVT_BF16X2_F32, to_bf16(as_float(b)) | u32(to_bf16(as_float(a))) << 16)
    WORD(CVT_F16X2_F32, to_fp16(as_float(b)) | u32(to_fp16(as_float(a))) << 16)
    WORD(CVT_TF32_RNA, to_tf32(a, true))
    WORD(CVT_TF32_RN, to_tf32(a, false))
    WORD(CVT_F32_S32, float_bits(i32(a)))
    WORD(CVT_F32_U32, float_bits(a))
    WORD(CVT_S32_F32_RZ, truncated<i32>(as_float(a)))
    WORD(CVT_U32_F32_RZ, truncated<u32>(as_float(a)))
    WORD(CVT_U16_32, u16(a))
    WORD(CVT_U32_U16, u16(a))
    WORD(CVT_S32_S16, i16(a))
    WORD(CVT_U32_U8, u8(a))
    WORD(CVT_S32_S8, i8(a))
    WORD(CVT_S16_S8, u16(i8(a)))
    NARROW(CVT_32_64, a)
    NARROW(CVT_16_64, u16(a))
    WIDE(CVT_U64_U32, a)
    WIDE(CVT_S64_S32, i64(i32(a)))
    WIDE(CVT_U64_U16, u16(a))
    WIDE(CVT_S64_S16, i64(i16(a)))
        // clang-format on
#undef RETURNS
#undef WORD
#undef FLOAT
#undef LONG
#undef PAIR
#undef SHIFT
#undef WIDE
#undef NARROW
#undef COMPARE
#undef MASK

    // Those with more operands or results.
    case BFI32: {
        Words result;
        for (int lane = 0; lane < LANES; lane++)
            result[lane] = insert_bits(word(0)[lane], word(1)[lane], word(2)[lane], word(3)[lane]);
        put_words(0, result);
        return true;
    }
    case LOP3: {
        Words result;
        for (int lane = 0; lane < LANES; lane++)
            result[lane] = logic(word(0)[lane], word(1)[lane], word(2)[lane], word(3)[lane]);
        put_words(0, result);
        return true;
    }
    case SELP32: {
        const u32 choice = bits(2);
        Words result;
        for (int lane = 0; lane < LANES; lane++)
            result[lane] = has(choice, lane) ? word(0)[lane] : word(1)[lane];
        put_words(0, result);
        return true;
    }
    case SELP64: {
        const u32 choice = bits(2);
        Longs result;
        for (int lane = 0; lane < LANES; lane++)
            result[lane] = has(choice, lane) ? wide(0)[lane] : wide(1)[lane];
        put_longs(result);
        return true;
    }
    case PACK32_16:
    case PACK64_32:
    case PACK64_16: {
        const int part = ins.op == PACK64_32 ? 32 : 16;
        Longs result{};
        for (int i = 0; i < ins.n_sources; i++)
            for (int lane = 0; lane < LANES; lane++)
                result[lane] |= (word(i)[lane] & ((u64(1) << part) - 1)) << part * i;
        if (ins.op != PACK32_16) {
            put_longs(result);
            return true;
        }
        Words low;
        std::copy(result.begin(), result.end(), low.begin());
        put_words(0, low);
        return true;
    }
    case UNPACK32_16:
    case UNPACK64_32:
    case UNPACK64_16: {
        const int part = ins.op == UNPACK64_32 ? 32 : 16;
        Longs whole; // a copy: the source may be one of the destinations
        for (int lane = 0; lane < LANES; lane++)
            whole[lane] = ins.op == UNPACK32_16 ? word(0)[lane] : wide(0)[lane];
        for (int i = 0; i < ins.n_destinations; i++) {
            Words result;
            for (int lane = 0; lane < LANES; lane++)
                result[lane] = whole[lane] >> part * i & ((u64(1) << part) - 1);
            put_words(i, result);
        }
        return true;
    }
    case LDPARAM32:
    case LDPARAM64: {
        const u64 value = program.parameters[ins.aux] >> 8 * ins.offset;
        Words word_values;
        word_values.fill(value);
        Longs long_values;
        long_values.fill(value);
        if (ins.op == LDPARAM32)
            put_words(0, word_values);
        else
            put_longs(long_values);
        return true;
    }
    default:
        return false;
    }
}
