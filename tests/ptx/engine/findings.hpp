// What is wrong with a kernel: counted by kind and by the instructions that take part.
#pragma once
#include "machine.hpp"

// `describe(text)` writes the example, for the first of its kind and place only.
template <class Describe>
void Machine::report(Kind kind, i32 first_pc, i32 second_pc, Describe describe) {
    constexpr int PC_BITS = 28;
    constexpr u64 PC_MASK = (u64(1) << PC_BITS) - 1;
    u64 key = u64(kind) << 2 * PC_BITS | (first_pc & PC_MASK) << PC_BITS | (second_pc & PC_MASK);
    if (const u32 *index = finding_index.find(key)) {
        findings[*index].count++;
        return;
    }
    finding_index[key] = findings.size();
    Text text;
    describe(text);
    Finding finding{kind, first_pc, second_pc, 1, ""};
    memcpy(finding.example, text.text, sizeof finding.example);
    findings.push_back(finding);
}

// The launch ends here.
inline void Machine::fail(i32 pc, const char *reason, const char *detail) {
    failed = true;
    report(FATAL, pc, pc, [&](Text &text) { text.add("%s%s", reason, detail); });
}

inline void Machine::name_warp(Text &text, const Warp &warp, int lane) const {
    const Cta &cta = ctas[warp.cta];
    text.add("CTA (%d,%d,%d) warp %d", cta.x, cta.y, cta.z, warp.index);
    if (lane >= 0)
        text.add(" lane %d", lane);
}

inline void Machine::name_address(Text &text, u64 address) const {
    u64 index = (address >> REGION_SHIFT) - 1;
    if (index >= regions.size()) {
        text.add("address 0x%llx of no tensor", (unsigned long long)address);
        return;
    }
    const Region &region = regions[index];
    text.add("tensor #%d byte %lld of %llu", int(index), (long long)(address - region.base),
             (unsigned long long)region.size);
}

inline std::vector<Stuck> Machine::stuck() const {
    std::vector<Stuck> all;
    for (const Cta &cta : ctas) {
        if (!cta.live)
            continue;
        for (i32 i = 0; i < config.warps; i++) {
            const Warp &warp = warps[cta.first_warp + i];
            if (!warp.alive)
                continue;
            for (const Fragment &part : warp.fragments)
                all.push_back({cta.x, cta.y, cta.z, i, part.pc, part.mask, part.wait});
        }
    }
    return all;
}
