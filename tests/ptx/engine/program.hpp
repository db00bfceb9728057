// The bytecode, as the parser writes it.
#pragma once
#include "basics.hpp"

enum Op : i32 {
#define X(name) name,
#include "ops.inc"
#undef X
    N_OPS
};

inline const char *const OP_NAMES[] = {
#define X(name) #name,
#include "ops.inc"
#undef X
};

// Bits of `flags` of instructions of memory.
enum : i32 { CACHE_GLOBAL = 1, VOLATILE = 2, RELAXED = 4, ACQUIRE = 8, RELEASE = 16 };

// "Operation types": strong operations are those that are volatile, relaxed, acquire or release.
constexpr i32 STRONG = VOLATILE | RELAXED | ACQUIRE | RELEASE;

enum Scope : i32 { SCOPE_CTA, SCOPE_CLUSTER, SCOPE_GPU, SCOPE_SYS };

// Kinds of elements of matrices.
enum ElementKind : i32 { BF16, FP16, TF32 };

// Destination that is thrown away, PTX's `_`.
constexpr i32 SINK = 0x7FFFFFFF;

// Operands are numbers in the pool, `destination(0)` and on, `source(0)` and on: a register if not
// negative, else ~index into the constants; predicates as constants are ~0 and ~1.
struct Instruction {
    i32 op;
    i32 predicate; // register, or -1
    i32 predicate_negated;
    i32 n_destinations, first_destination;
    i32 n_sources, first_source;
    i32 offset; // of the address
    i32 flags;
    i32 aux, aux2;
    i32 target; // of a branch

    // Of loads and stores.
    u32 element_size() const {
        return aux;
    }
    u32 vector_length() const {
        return aux2 & 255;
    }
    u32 access_size() const {
        return element_size() * vector_length();
    }
    bool strong() const {
        return flags & STRONG;
    }
    u32 strong_size() const { // of an element
        return strong() ? element_size() : 0;
    }
    // Of fences.
    i32 scope() const {
        return aux2 >> 8;
    }
};

struct Program {
    const Instruction *code;
    const i32 *pool;
    const u32 *words; // constants
    const u64 *longs;
    const u64 *parameters;
    i32 n_code, n_words, n_longs;
    i32 n_word_registers, n_long_registers, n_predicates;
};
