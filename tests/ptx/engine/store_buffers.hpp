// A CTA's stores on their way to memory.
//
// Stores to different bytes leave in any order: what another warp observes is bound by "Causality
// Order" alone. Those to the same bytes keep theirs ("Coherence", "Sequential Consistency Per
// Location"). Once a store has left, all CTAs see it at the same time; that is stronger than the
// ISA, which promises it of nothing. What weaker hardware may do is for the clocks to find.
#pragma once
#include "global_races.hpp"

inline bool overlap(const Store &a, const Store &b) {
    return a.address < b.address + b.size && b.address < a.address + a.size;
}

// Its own ("Program Order"), and those of its CTA from before a barrier, by which they come before
// in "Causality Order". Any barrier of the CTA counts, of whichever warps: stronger than the ISA.
inline bool Machine::knows(const Warp &warp, const Cta &cta, const Store &store) const {
    return store.owner == warp.id || cta.epoch > store.epoch;
}

inline void Machine::perform(const Store &store) {
    i32 index = i32(store.address >> REGION_SHIFT) - 1;
    const Region &region = regions[index];
    u64 offset = store.address - region.base;
    if (memcmp(region.bytes + offset, &store.value, store.size))
        note_progress();
    memcpy(region.bytes + offset, &store.value, store.size);
    memset(region.defined + offset, 1, store.size);
    mark_visible(index, store.address, store.size, store.owner, store.clock);
    counters.drained++;
}

inline void Machine::buffer_store(Warp &warp, Cta &cta, u64 address, u64 value, u32 size) {
    cta.l1.erase(address >> 5); // stores go around L1, which forgets the sector
    Store store{address, value, u8(size), warp.id, cta.epoch, warp.clock[warp.id]};
    if (config.drain == DRAIN_AT_ONCE) {
        perform(store);
        return;
    }
    cta.stores.by_word[address >> 3].push_back(store);
    cta.stores.words.push_back(address >> 3);
    constexpr size_t CAPACITY = 8192; // so that lazy drains do not hoard without end
    if (cta.stores.words.size() > CAPACITY)
        drain_some(cta, 64);
}

inline void Machine::drain_one(Cta &cta) {
    auto &[by_word, words] = cta.stores;
    u32 i = random.below(words.size());
    u64 word = words[i];
    std::vector<Store> &stores = *by_word.find(word);
    auto chosen = stores.begin() + random.below(stores.size());
    auto older = [&](const Store &store) { return overlap(store, *chosen); };
    chosen = std::find_if(stores.begin(), chosen, older);
    perform(*chosen);
    stores.erase(chosen);
    if (stores.empty())
        by_word.erase(word);
    words[i] = words.back();
    words.pop_back();
}

inline void Machine::drain_some(Cta &cta, u32 count) {
    for (; count && !cta.stores.words.empty(); count--)
        drain_one(cta);
}

inline void Machine::drain_all(Cta &cta) {
    while (!cta.stores.words.empty())
        drain_one(cta);
}

// Before a release: what a warp knows of is in memory before what it stores next. It includes what
// others stored: "Causality Order" goes on from what was observed to what is released.
inline void Machine::drain_known(Warp &warp, Cta &cta) {
    auto &[by_word, words] = cta.stores;
    if (words.empty())
        return;
    words.clear();
    std::vector<u64> emptied;
    by_word.for_each([&](u64 word, std::vector<Store> &stores) {
        std::vector<Store> kept;
        for (const Store &store : stores) {
            // Not past an older one to the same bytes that stays.
            auto blocks = [&](const Store &older) { return overlap(older, store); };
            if (!knows(warp, cta, store) || std::any_of(kept.begin(), kept.end(), blocks))
                kept.push_back(store);
            else
                perform(store);
        }
        words.insert(words.end(), kept.size(), word);
        if (kept.empty())
            emptied.push_back(word);
        else
            stores.swap(kept);
    });
    for (u64 word : emptied)
        by_word.erase(word);
}

// Before an atomic there: its CTA's stores to the place come first ("Atomicity").
inline void Machine::drain_word(Cta &cta, u64 address) {
    u64 word = address >> 3;
    auto *stores = cta.stores.by_word.find(word);
    if (!stores)
        return;
    for (const Store &store : *stores)
        perform(store);
    std::erase(cta.stores.words, word);
    cta.stores.by_word.erase(word);
}

// Puts what a warp knows of over bytes from memory; which of them, a bit for each.
inline u32 Machine::forward(const Warp &warp, Cta &cta, u64 address, u32 size, u8 *bytes) {
    u32 forwarded = 0;
    if (cta.stores.words.empty())
        return forwarded;
    for (u64 word = address >> 3; word <= (address + size - 1) >> 3; word++) {
        const auto *stores = cta.stores.by_word.find(word);
        if (!stores)
            continue;
        for (const Store &store : *stores) {
            if (!knows(warp, cta, store))
                continue;
            u64 begin = std::max(store.address, address);
            u64 end = std::min(store.address + store.size, address + size);
            if (begin >= end)
                continue;
            u64 value = store.value >> 8 * (begin - store.address);
            memcpy(bytes + (begin - address), &value, end - begin);
            forwarded |= u32((u64(1) << (end - begin)) - 1) << (begin - address);
        }
    }
    return forwarded;
}
