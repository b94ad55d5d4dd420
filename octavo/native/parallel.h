// Loops on torch's own threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "types.h"

namespace octavo::ISA {

// body(item, soon) for all items; soon() is the item that this thread most likely takes next, `items` or more if none.
template <class F>
void parallel_ahead(const Pool& pool, int64_t items, bool worth_it, F&& body) {
    if (!worth_it || pool.threads < 2 || items < 2) {
        for (int64_t i = 0; i < items; i++) body(i, [=] { return i + 1; });
        return;
    }
    struct Shared {
        F& body;
        int64_t items;
        std::atomic<int64_t> next{0};
    } shared{body, items};
    // One task a thread; each takes the next item until none is left, so that long ones do not hold up the rest.
    pool.parallel_for(0, std::min<int64_t>(pool.threads, items), 1, [](int64_t, int64_t, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1, std::memory_order_relaxed)) < s.items;)
            s.body(i, [&] { return s.next.load(std::memory_order_relaxed); });
    }, &shared);
}

template <class F>
void parallel(const Pool& pool, int64_t items, bool worth_it, F&& body) {
    parallel_ahead(pool, items, worth_it, [&](int64_t i, auto) { body(i); });
}

}  // namespace octavo::ISA
