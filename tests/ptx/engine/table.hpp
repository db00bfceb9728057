// A hash table with open addressing, for what is looked up at each access of memory.
#pragma once
#include "basics.hpp"

// Keys are u64. `clear` costs nothing, and what values have allocated is used again by later ones:
// the L1 is emptied at each poll, and store buffers fill and drain all the time.
template <class Value> class Table {
    struct Slot {
        u64 key;
        u64 generation = 0; // the slot is in use if this is the table's
        Value value;
    };
    std::vector<Slot> slots;
    u64 generation = 1;
    size_t count = 0;
    int shift = 64;

    size_t home(u64 key) const {
        return key * 0x9E3779B97F4A7C15 >> shift;
    }
    size_t mask() const {
        return slots.size() - 1;
    }
    bool used(size_t i) const {
        return slots[i].generation == generation;
    }
    size_t find_slot(u64 key) const { // the slot of the key, or the free one where it belongs
        size_t i = home(key);
        while (used(i) && slots[i].key != key)
            i = (i + 1) & mask();
        return i;
    }
    void grow() {
        std::vector<Slot> old(std::max<size_t>(16, slots.size() * 2));
        old.swap(slots);
        shift = 64 - std::countr_zero(slots.size());
        for (Slot &slot : old)
            if (slot.generation == generation)
                std::swap(slots[find_slot(slot.key)], slot);
    }

public:
    bool empty() const {
        return count == 0;
    }
    void clear() {
        generation++;
        count = 0;
    }
    Value *find(u64 key) {
        if (empty())
            return nullptr;
        size_t i = find_slot(key);
        return used(i) ? &slots[i].value : nullptr;
    }
    // The value of the key; an empty one is made if there is none.
    Value &operator[](u64 key) {
        if (2 * count >= slots.size())
            grow();
        Slot &slot = slots[find_slot(key)];
        if (slot.generation != generation) {
            slot.key = key;
            slot.generation = generation;
            count++;
            if constexpr (requires { slot.value.clear(); })
                slot.value.clear();
            else
                slot.value = Value{};
        }
        return slot.value;
    }
    void erase(u64 key) {
        if (empty())
            return;
        size_t hole = find_slot(key);
        if (!used(hole))
            return;
        // What follows moves up, so that no search ends at the hole before it.
        for (size_t i = (hole + 1) & mask(); used(i); i = (i + 1) & mask()) {
            size_t distance = (i - home(slots[i].key)) & mask();
            if (distance >= ((i - hole) & mask())) {
                std::swap(slots[i], slots[hole]);
                hole = i;
            }
        }
        slots[hole].generation = 0;
        count--;
    }
    template <class Action> void for_each(Action action) { // no insertions or removals meanwhile
        for (Slot &slot : slots)
            if (slot.generation == generation)
                action(slot.key, slot.value);
    }
};
