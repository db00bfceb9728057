// `mma.sync`: products of 16x8 by a warp, sums in float32 in order of k.
//
// Which lane has which element is in "Warp Level Matrix Multiply-Accumulate Instructions", "Matrix
// Fragments for mma.m16n8k16" and its neighbors: lane l is number l % 4 of group l / 4. The ISA
// leaves the order and the rounding of the sums open.
#pragma once
#include "machine.hpp"
#include "numbers.hpp"

constexpr int TILE_ROWS = 16;
constexpr int MOST_K = 16;
using LeftTile = float[TILE_ROWS][MOST_K];

// Operand A, also of wgmma. Register r has rows of group + 8 (r % 2), and the r / 2-th part of k.
inline void unpack_left(i32 kind, const u32 *const *registers, int count, LeftTile &tile) {
    for (int r = 0; r < count; r++)
        for (int lane = 0; lane < LANES; lane++) {
            float *row = tile[lane / 4 + 8 * (r % 2)];
            u32 bits = registers[r][lane];
            if (kind == TF32) {
                row[lane % 4 + 4 * (r / 2)] = matrix_value(kind, bits);
            } else {
                int k = lane % 4 * 2 + 8 * (r / 2);
                row[k] = matrix_value(kind, bits);
                row[k + 1] = matrix_value(kind, bits >> 16);
            }
        }
}

// Accumulators, also of wgmma: register r of 4 has an element of 8 columns.
inline int accumulator_row(int lane, int r) {
    return lane / 4 + 8 * (r / 2);
}
inline int accumulator_column(int lane, int r) {
    return lane % 4 * 2 + r % 2;
}

struct MmaShape {
    int k;
    int left_registers, right_registers;
};

inline MmaShape mma_shape(i32 op) {
    switch (op) {
    case MMA16816:
        return {16, 4, 2};
    case MMA1688:
        return {8, 2, 1};
    case MMA1688TF32:
        return {8, 4, 2};
    default: // MMA1684TF32
        return {4, 2, 1};
    }
}

inline void Machine::mma(Warp &warp, const Instruction &ins) {
    constexpr int COLUMNS = 8;
    const auto [depth, n_left, n_right] = mma_shape(ins.op);
    const i32 kind = ins.aux;
    const u32 *registers[4 + 2 + 4];
    for (int i = 0; i < n_left + n_right + 4; i++)
        registers[i] = words(warp, source(ins, i));
    const u32 *const *right_registers = registers + n_left;
    const u32 *const *accumulators = right_registers + n_right;

    LeftTile left;
    unpack_left(kind, registers, n_left, left);
    float right[MOST_K][COLUMNS];
    for (int r = 0; r < n_right; r++)
        for (int lane = 0; lane < LANES; lane++) {
            u32 bits = right_registers[r][lane];
            if (kind == TF32) {
                right[lane % 4 + 4 * r][lane / 4] = matrix_value(kind, bits);
            } else {
                int k = lane % 4 * 2 + 8 * r;
                right[k][lane / 4] = matrix_value(kind, bits);
                right[k + 1][lane / 4] = matrix_value(kind, bits >> 16);
            }
        }

    float sums[TILE_ROWS][COLUMNS];
    for (int r = 0; r < 4; r++)
        for (int lane = 0; lane < LANES; lane++)
            sums[accumulator_row(lane, r)][accumulator_column(lane, r)] =
                as_float(accumulators[r][lane]);
    for (int row = 0; row < TILE_ROWS; row++)
        for (int k = 0; k < depth; k++)
            for (int column = 0; column < COLUMNS; column++)
                sums[row][column] += left[row][k] * right[k][column];
    for (int r = 0; r < 4; r++) {
        Words values;
        for (int lane = 0; lane < LANES; lane++)
            values[lane] = float_bits(sums[accumulator_row(lane, r)][accumulator_column(lane, r)]);
        set_words(warp, destination(ins, r), values.data(), ALL_LANES);
    }
}
