// Memory that is read soon.
#pragma once

#include <cstdint>

namespace octavo::ISA {

// The next page, asked for at the pace at which this one is read: a burst would only queue, and leave the memory idle in
// between. `passes`: how often the page is read; `times`: how many times as large as it the next one is.
struct Ahead {
    const uint8_t *at, *end;
    int passes, times = 1;
    void read(int bytes) {
        for (bytes *= times; bytes > 0 && at < end; bytes -= 64 * passes, at += 64) __builtin_prefetch(at, 0, 2);
    }
};
struct Near {  // nothing to ask for: it is in the cache
    void read(int) {}
};

}  // namespace octavo::ISA
