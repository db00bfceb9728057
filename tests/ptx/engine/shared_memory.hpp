// Instructions of shared memory: ld, st, ldmatrix, stmatrix. Its values are never weak: a CTA has
// one shared memory, and its accesses are done in the order of execution; races are found by
// clocks.
#pragma once
#include "shared_races.hpp"

inline bool Machine::check_shared(const Warp &warp, u32 address, u32 size, i32 pc, int lane) {
    auto describe = [&](Text &text) {
        text.add("address %u + %u of %d by ", address, size, config.shared_bytes);
        name_warp(text, warp, lane);
    };
    if (address % size) { // all accesses are aligned to their size
        report(SHARED_MISALIGNED, pc, pc, describe);
        fail(pc, "misaligned shared address");
        return false;
    }
    if (u64(address) + size > u64(config.shared_bytes)) {
        report(SHARED_OUT_OF_BOUNDS, pc, pc, describe);
        return false;
    }
    return true;
}

// "Initialization": memory without an initial value holds an unknown one.
inline void Machine::check_shared_defined(const Warp &warp, const Cta &cta, u32 address, u32 size,
                                          i32 pc, int lane) {
    const u8 *defined = &cta.shared_defined[address];
    if (std::find(defined, defined + size, 0) == defined + size)
        return;
    report(SHARED_UNINITIALISED, pc, pc, [&](Text &text) {
        text.add("byte %u by ", address);
        name_warp(text, warp, lane);
    });
}

// Wavefronts of an access: the most different words that its lanes want of one of 32 banks, for
// each half or quarter of the warp where lanes want 8 or 16 bytes.
inline void Machine::count_banks(i32 pc, u32 mask, const u32 *addresses, u32 size, i32 offset) {
    if (!config.statistics)
        return;
    constexpr u32 BANKS = 32;
    const int lanes_at_once = size <= 4 ? 32 : size == 8 ? 16 : 8;
    for (int first = 0; first < LANES; first += lanes_at_once) {
        u32 words[BANKS][LANES];
        u32 counts[BANKS] = {};
        u32 most = 0;
        u32 distinct = 0;
        const u32 part = u32((u64(1) << lanes_at_once) - 1) << first;
        for (int lane : lanes_of(mask & part))
            for (u32 byte = 0; byte < std::max(4u, size); byte += 4) {
                const u32 word = (addresses[lane] + offset + byte) >> 2;
                u32 *const begin = words[word % BANKS];
                u32 &count = counts[word % BANKS];
                if (std::find(begin, begin + count, word) != begin + count)
                    continue;
                begin[count++] = word;
                distinct++;
                most = std::max(most, count);
            }
        transactions[pc] += most;
        least_transactions[pc] += (distinct + BANKS - 1) / BANKS;
    }
}

inline void Machine::load_shared(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 size = ins.access_size();
    const u32 *addresses = words(warp, source(ins, 0));
    count_banks(pc, mask, addresses, size, ins.offset);
    for (int lane : lanes_of(mask)) {
        u32 address = addresses[lane] + ins.offset;
        u8 bytes[32];
        if (check_shared(warp, address, size, pc, lane)) {
            watch_shared_read(warp, cta, address, size, pc, lane);
            check_shared_defined(warp, cta, address, size, pc, lane);
            memcpy(bytes, &cta.shared[address], size);
        } else {
            for (u8 &byte : bytes)
                byte = random.word();
        }
        for (u32 i = 0; i < ins.vector_length(); i++) {
            const u8 *element = bytes + i * ins.element_size();
            set_element(warp, destination(ins, i), lane, element, ins.element_size());
        }
    }
}

inline void Machine::store_shared(Warp &warp, const Instruction &ins, u32 mask) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 size = ins.access_size();
    const u32 *addresses = words(warp, source(ins, 0));
    count_banks(pc, mask, addresses, size, ins.offset);
    u32 stored = 0; // lanes
    i64 highest = -1;
    for (int lane : lanes_of(mask)) {
        u32 address = addresses[lane] + ins.offset;
        if (!check_shared(warp, address, size, pc, lane))
            continue;
        u8 bytes[32];
        for (u32 i = 0; i < ins.vector_length(); i++) {
            u64 value = get_element(warp, source(ins, 1 + i), lane, ins.element_size());
            memcpy(bytes + i * ins.element_size(), &value, ins.element_size());
        }
        u8 *place = &cta.shared[address];
        bool same_value = !memcmp(place, bytes, size);
        // Aligned accesses of one size overlap only where they are equal.
        bool again = false;
        if (i64(address) <= highest)
            for (int other : lanes_of(stored))
                again |= addresses[other] == addresses[lane];
        if (!again)
            watch_shared_write(warp, cta, address, size, same_value, pc, lane);
        else if (!same_value) // which of them stays is not said
            report(SHARED_LANES_DIFFERENT, pc, pc, [&](Text &text) {
                text.add("byte %u by ", address);
                name_warp(text, warp, lane);
            });
        memcpy(place, bytes, size);
        memset(&cta.shared_defined[address], 1, size);
        stored |= 1u << lane;
        highest = std::max<i64>(highest, address);
    }
}

// ---- `ldmatrix`, `stmatrix`: 8x8 matrices of 16 bits. Lane 8 i + r has the address of row r of
// matrix i; lane l has elements 2 (l % 4) and the next of row l / 4, or of that column if .trans.

constexpr u32 MATRIX_ROW = 16; // bytes
using Matrix = std::array<std::array<u16, 8>, 8>;

inline u16 &matrix_element(Matrix &matrix, int lane, int half, bool transposed) {
    int major = lane / 4;
    int minor = lane % 4 * 2 + half;
    return transposed ? matrix[minor][major] : matrix[major][minor];
}

inline void Machine::count_matrix_banks(const Instruction &ins, const u32 *addresses) {
    for (int i = 0; i < ins.aux; i++)
        count_banks(pc_of(ins), 0xFFu << 8 * i, addresses, MATRIX_ROW, ins.offset);
}

inline void Machine::load_matrices(Warp &warp, const Instruction &ins) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 *addresses = words(warp, source(ins, 0));
    count_matrix_banks(ins, addresses);
    std::array<Matrix, 4> matrices;
    for (int lane = 0; lane < 8 * ins.aux; lane++) {
        auto &row = matrices[lane / 8][lane % 8];
        u32 address = addresses[lane] + ins.offset;
        if (!check_shared(warp, address, MATRIX_ROW, pc, lane)) {
            for (u16 &element : row)
                element = random.word();
            continue;
        }
        watch_shared_read(warp, cta, address, MATRIX_ROW, pc, lane);
        check_shared_defined(warp, cta, address, MATRIX_ROW, pc, lane);
        memcpy(row.data(), &cta.shared[address], MATRIX_ROW);
    }
    // Only now: the addresses may be in a register of the result.
    for (int i = 0; i < ins.aux; i++) {
        Words values;
        for (int lane = 0; lane < LANES; lane++)
            values[lane] = matrix_element(matrices[i], lane, 0, ins.aux2) |
                           matrix_element(matrices[i], lane, 1, ins.aux2) << 16;
        set_words(warp, destination(ins, i), values.data(), ALL_LANES);
    }
}

inline void Machine::store_matrices(Warp &warp, const Instruction &ins) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const u32 *addresses = words(warp, source(ins, 0));
    count_matrix_banks(ins, addresses);
    for (int i = 0; i < ins.aux; i++) {
        const u32 *values = words(warp, source(ins, 1 + i));
        Matrix matrix;
        for (int lane = 0; lane < LANES; lane++) {
            matrix_element(matrix, lane, 0, ins.aux2) = values[lane];
            matrix_element(matrix, lane, 1, ins.aux2) = values[lane] >> 16;
        }
        for (int row = 0; row < 8; row++) {
            int lane = 8 * i + row;
            u32 address = addresses[lane] + ins.offset;
            if (!check_shared(warp, address, MATRIX_ROW, pc, lane))
                continue;
            u8 *place = &cta.shared[address];
            bool same_value = !memcmp(place, matrix[row].data(), MATRIX_ROW);
            watch_shared_write(warp, cta, address, MATRIX_ROW, same_value, pc, lane);
            memcpy(place, matrix[row].data(), MATRIX_ROW);
            memset(&cta.shared_defined[address], 1, MATRIX_ROW);
        }
    }
}
