// `wgmma.mma_async`, `wgmma.commit_group`, `wgmma.wait_group`: each warp of a warpgroup does its 16
// rows of 64 ("Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions").
//
// The operands are read, and the accumulators written, when the product is waited for: the latest
// that the ISA allows, so that what changes or reads them too early shows. In between the registers
// of the accumulators hold noise. wgmma.fence does nothing here: registers written before it are
// always seen, which is stronger than the ISA.
#pragma once
#include "mma.hpp"
#include "shared_memory.hpp"

constexpr u32 CHUNK = 16; // bytes; swizzles and core matrices leave as many side by side

// A matrix in shared memory, by "Matrix Descriptor" and "Swizzling Modes". `mn` is a row of A or a
// column of B. K-major matrices have the elements of a row side by side, MN-major those of one k.
struct SharedMatrix {
    u64 descriptor;
    bool mn_major;
    u32 element; // bytes
    u32 depth;   // of k

    u32 chunk_elements() const {
        return CHUNK / element;
    }

    u32 address(u32 mn, u32 k) const {
        const u32 start = (descriptor & 0x3FFF) << 4;
        const u32 leading = (descriptor >> 16 & 0x3FFF) << 4; // leading dimension byte offset
        const u32 stride = (descriptor >> 32 & 0x3FFF) << 4;  // stride dimension byte offset
        const u32 mode = descriptor >> 62;                    // 0 none, 1 128 bytes, 2 64, 3 32
        if (mode == 0) {                                      // core matrices of 8 rows of 16 bytes
            if (mn_major)
                return start + mn % 8 * element + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
            const u32 byte = k * element;
            return start + mn / 8 * stride + mn % 8 * 16 + byte / 16 * leading + byte % 16;
        }
        const u32 width = 256u >> mode; // of 8 rows side by side
        u32 linear;
        if (mn_major) {
            const u32 across = width / element;
            linear = start + mn % across * element + mn / across * leading + k % 8 * width +
                     k / 8 * stride;
        } else {
            linear = start + mn / 8 * stride + mn % 8 * width + k * element;
        }
        // A swizzle: bits of the row into the number of the chunk.
        const u32 rows = (8u >> (mode - 1)) - 1;
        return linear ^ (linear >> 7 & rows) << 4;
    }

    // `action(address, mn, k)` for the first element of each chunk.
    template <class Action> void for_chunks(u32 first_mn, u32 count, Action action) const {
        const u32 mn_step = mn_major ? chunk_elements() : 1;
        const u32 k_step = mn_major ? 1 : chunk_elements();
        for (u32 mn = first_mn; mn < first_mn + count; mn += mn_step)
            for (u32 k = 0; k < depth; k += k_step)
                action(address(mn, k), mn, k);
    }

    // `set(mn, k, value)` for each element.
    template <class Set>
    void read(const std::vector<u8> &shared, i32 kind, u32 first_mn, u32 count, Set set) const {
        for_chunks(first_mn, count, [&](u32 address, u32 mn, u32 k) {
            u8 bytes[CHUNK] = {};
            if (address + CHUNK <= shared.size())
                memcpy(bytes, &shared[address], CHUNK);
            for (u32 i = 0; i < chunk_elements(); i++) {
                u32 bits = 0;
                memcpy(&bits, bytes + i * element, element);
                set(mn_major ? mn + i : mn, mn_major ? k : k + i, matrix_value(kind, bits));
            }
        });
    }
};

constexpr u32 K_BYTES = 32; // of a product

inline SharedMatrix left_matrix(const Instruction &ins, u64 descriptor) {
    const u32 element = ins.aux == TF32 ? 4 : 2;
    return {descriptor, bool(ins.aux2 & 1), element, K_BYTES / element};
}

inline SharedMatrix right_matrix(const Instruction &ins, u64 descriptor) {
    const u32 element = ins.aux == TF32 ? 4 : 2;
    return {descriptor, bool(ins.aux2 & 2), element, K_BYTES / element};
}

inline bool left_in_registers(const Instruction &ins) {
    return ins.flags;
}

inline u32 first_row(const Warp &warp) {
    return warp.index % 4 * TILE_ROWS;
}

inline std::vector<u32> Machine::wgmma_rows(const Warp &warp, const Wgmma &product) const {
    const Instruction &ins = program.code[product.pc];
    std::vector<u32> rows;
    auto add = [&](u32 address, u32, u32) { rows.push_back(address); };
    if (!left_in_registers(ins))
        left_matrix(ins, product.a).for_chunks(first_row(warp), TILE_ROWS, add);
    right_matrix(ins, product.b).for_chunks(0, ins.offset, add);
    // With a comparison of its own, as libc++ has sort of plain integers in the library only.
    std::sort(rows.begin(), rows.end(), [](u32 a, u32 b) { return a < b; });
    rows.erase(std::unique(rows.begin(), rows.end()), rows.end());
    return rows;
}

// The descriptors are the first lane's; the ISA wants them the same in all lanes.
inline void Machine::issue_wgmma(Warp &warp, const Instruction &ins) {
    Cta &cta = ctas[warp.cta];
    const i32 pc = pc_of(ins);
    const bool in_registers = left_in_registers(ins);
    const int right = in_registers ? 4 : 1; // operands before it
    Wgmma product{pc, warp.wgmma_group, 0, 0, false, {}};
    product.a = in_registers ? 0 : longs(warp, source(ins, 0))[0];
    product.b = longs(warp, source(ins, right))[0];
    product.accumulate = predicate(warp, source(ins, right + 1)) & 1;
    for (int i = 0; i < ins.n_destinations; i++) {
        i32 accumulator = destination(ins, i);
        auto [values, added] = warp.accumulators.try_emplace(accumulator);
        if (added)
            memcpy(values->second.data(), words(warp, accumulator), sizeof(Words));
        Words noise;
        for (u32 &word : noise)
            word = random.word();
        set_words(warp, accumulator, noise.data(), ALL_LANES);
    }
    for (u32 row : wgmma_rows(warp, product)) {
        if (!check_shared(warp, row, CHUNK, pc, -1))
            continue;
        check_shared_defined(warp, cta, row, CHUNK, pc, -1);
        product.rows.push_back(row);
        watch_shared_read(warp, cta, row, CHUNK, pc, -1);
        check_proxy(warp, cta, row, CHUNK, pc);
        for_granules(cta, row, CHUNK, [](SharedShadow &shadow) { shadow.wgmmas++; });
    }
    warp.wgmmas.push_back(std::move(product));
}

inline void Machine::perform_wgmma(Warp &warp, const Wgmma &product) {
    constexpr int MOST_COLUMNS = 256;
    const Instruction &ins = program.code[product.pc];
    Cta &cta = ctas[warp.cta];
    const i32 kind = ins.aux;
    const int columns = ins.offset;

    LeftTile left;
    if (left_in_registers(ins)) {
        const u32 *registers[4];
        for (int i = 0; i < 4; i++)
            registers[i] = words(warp, source(ins, i));
        unpack_left(kind, registers, 4, left);
    } else {
        const u32 first = first_row(warp);
        auto set = [&](u32 row, u32 k, float value) { left[row - first][k] = value; };
        left_matrix(ins, product.a).read(cta.shared, kind, first, TILE_ROWS, set);
    }
    float right[MOST_K][MOST_COLUMNS];
    const SharedMatrix right_shared = right_matrix(ins, product.b);
    auto set = [&](u32 column, u32 k, float value) { right[k][column] = value; };
    right_shared.read(cta.shared, kind, 0, columns, set);

    float sums[TILE_ROWS][MOST_COLUMNS] = {};
    auto for_accumulators = [&](auto action) { // "Register Fragments": 4 registers for 8 columns
        for (int i = 0; i < ins.n_destinations; i++) {
            Words &values = warp.accumulators[destination(ins, i)];
            for (int lane = 0; lane < LANES; lane++)
                action(values[lane], sums[accumulator_row(lane, i % 4)]
                                         [i / 4 * 8 + accumulator_column(lane, i % 4)]);
        }
    };
    if (product.accumulate)
        for_accumulators([](u32 bits, float &sum) { sum = as_float(bits); });
    for (int row = 0; row < TILE_ROWS; row++)
        for (u32 k = 0; k < right_shared.depth; k++)
            for (int column = 0; column < columns; column++)
                sums[row][column] += left[row][k] * right[k][column];
    for_accumulators([](u32 &bits, float sum) { bits = float_bits(sum); });

    for (u32 row : product.rows) {
        for_granules(cta, row, CHUNK, [](SharedShadow &shadow) { shadow.wgmmas--; });
        // The read ends here: who overwrites has to come after this point.
        watch_shared_read(warp, cta, row, CHUNK, product.pc, -1);
    }
}

// `wgmma.wait_group`: the newest groups may go on.
inline void Machine::wait_wgmmas(Warp &warp, i32 groups_left) {
    std::vector<Wgmma> left;
    for (Wgmma &product : warp.wgmmas) {
        if (product.group >= warp.wgmma_group - groups_left)
            left.push_back(std::move(product));
        else
            perform_wgmma(warp, product);
    }
    warp.wgmmas.swap(left);
    std::map<i32, Words> still;
    for (const Wgmma &product : warp.wgmmas) {
        const Instruction &ins = program.code[product.pc];
        for (int i = 0; i < ins.n_destinations; i++)
            if (auto found = warp.accumulators.extract(destination(ins, i)))
                still.insert(std::move(found));
    }
    for (const auto &[accumulator, values] : warp.accumulators)
        set_words(warp, accumulator, values.data(), ALL_LANES);
    warp.accumulators.swap(still);
}
