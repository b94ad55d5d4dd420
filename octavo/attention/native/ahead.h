// Memory that is read soon.
#pragma once

#include <cstdint>

namespace octavo::ISA {

struct Bytes {
    const uint8_t* at;
    int64_t count, step = 64;  // of each so many only the first 64
};

// The next page, asked for at the pace at which this one is read for the first time: a burst would only queue, and leave the
// memory idle in between.
struct Ahead {
    const uint8_t *at, *end;
    int64_t step;  // from line to line
    int64_t asked, total;  // bytes that are asked for while so many are read
    int64_t owed = 0;
    Ahead(Bytes next, int64_t total)
        : at(next.at), end(next.at + next.count), step(next.step), asked(next.count / next.step * 64), total(total) {}
    void read(int bytes) {
        for (owed += bytes * asked; owed > 0 && at < end; owed -= 64 * total, at += step) __builtin_prefetch(at, 0, 2);
    }
};
struct Near {  // nothing to ask for: it is in the cache
    void read(int) {}
};

}  // namespace octavo::ISA
