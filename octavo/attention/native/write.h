// Rows on their way into a page.
#pragma once

#include <algorithm>

#include "kernel.h"
#include "parallel.h"

namespace octavo::ISA {

// One head's row, of dim numbers and zeros to a whole number of registers, goes to its slot; below 0 that is nowhere.
// Raw pages leave `row` as it is, codes do not.
void put_row(const Side& side, int head, int64_t slot, float* row);

// Fetches the memory of that place.
void expect_row(const Side& side, int head, int64_t slot);

// f(t, head) for every row and head, some rows at a time.
template <class F>
void over_rows(int64_t rows, int heads, int64_t dim, const Pool& pool, F&& f) {
    constexpr int64_t PIECE = 16;  // rows of one head: a few microseconds
    const int64_t pieces = (rows + PIECE - 1) / PIECE;
    parallel(pool, pieces * heads, rows * heads * dim >= 1 << 15, [&](int64_t item) {
        const int64_t first = item / heads * PIECE;
        for (int64_t t = first; t < std::min(first + PIECE, rows); t++) f(t, int(item % heads));
    });
}

}  // namespace octavo::ISA
