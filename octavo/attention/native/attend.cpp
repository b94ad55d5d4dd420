// Attention in float32 of any number of new tokens, one or thousands; a row's bits are the same in any company.
//
// A unit of work is one KV head and some query rows that read the same pages: all query heads of a group, of one new token
// or of up to 64. Page by page: products with K, softmax, products with V (product.h). Few rows read the codes where they
// lie; for many rows a page is first widened into a tile.
//
// What a row sums, and in which order, is fixed by its position alone: pages in ascending order; after every SEGMENT of
// pages, counted from the context's start, its sums begin anew and are joined with those of the segments before. Long
// contexts are split over threads at the ends of segments only, so neither their number nor the split changes a bit.
#include "scratch.h"
#include "softmax.h"

#include <vector>

#include "parallel.h"

namespace octavo::ISA {
namespace {

constexpr int64_t SEGMENT = 8;  // pages
constexpr int DIRECT = 12;  // most rows that read codes where they lie: with more a tile pays
constexpr int ROWS = 256;  // aim of a unit: its queries and sums stay in a core's second cache
constexpr int64_t INLINE = 32;  // pages of one row: fewer are not worth waking a thread for
constexpr int UNITS_A_THREAD = 6;  // pieces for each thread to balance with

// Some query rows of one sequence and one KV head.
struct Unit {
    int sequence, head;
    int64_t first, last;  // positions of its new tokens [first, last)
    int64_t page, end;  // pages [page, end)
    int64_t cost;
    int64_t sums = -1;  // where its rows' sums stand, if the context is split
};

// What the threads of a call share.
struct Call {
    const Side &k, &v;
    const Attention& attention;
    const Step& step;
    const Rows& q;
    void* out;
    int group, v_row;

    // The oldest position that a query at `position` sees.
    int64_t oldest(int64_t position) const {
        return attention.window ? std::max<int64_t>(0, position + 1 - attention.window) : 0;
    }
    // The row, of q and of out, of a sequence's token.
    int64_t row(int sequence, int64_t position) const {
        return step.q_start[sequence + 1] - step.kv_len[sequence] + position;
    }
    void finish_row(const Unit& unit, int r, Sums sums) const {
        const int query_head = unit.head * group + r % group;
        const int64_t at = (row(unit.sequence, unit.first + r / group) * attention.heads + query_head) * v.dim;
        finish(sums, v, attention, unit.head, query_head, q.type,
               static_cast<uint8_t*>(out) + at * (q.type == Float::FP32 ? 4 : 2));
    }
    int rows(const Unit& unit) const { return int(unit.last - unit.first) * group; }
    int64_t segments(const Unit& unit) const { return (unit.end - 1) / SEGMENT - unit.page / SEGMENT + 1; }
    int64_t floats(int64_t rows) const { return padded(rows) * 2 + rows * v_row; }  // of sums
    Sums sums_at(float* at, int64_t rows) const { return {at, at + padded(rows), {at + 2 * padded(rows), v_row}}; }
};

// A page's scores become weights, relative to the row's top so far or a higher one; returns what the row's sums so far
// are to be multiplied with.
[[gnu::noinline]] float soften(float* row, const float* k_scale, const float* v_scale, float shift, float cap, Range seen,
                               Sums sums) {
    Scores s(row, k_scale, shift, cap, seen);
    const float top = std::max(s.largest(), *sums.top), keep = exp2(*sums.top - top);
    f32v total = {};
    for (int i = 0; i < s.N; i++) {
        f32v weight = exp2(s.of[i] - top);
        if (seen.from > 0 || seen.to < BLOCK) weight = s.of[i] > -INFINITE ? weight : splat(0.0f);
        total += weight;
        if (v_scale) weight *= load<f32v>(v_scale + i * W);
        store(row + i * W, weight);
    }
    *sums.top = top;
    *sums.total = *sums.total * keep + sum(total);
    return keep;
}

// One unit's rows over some of its pages.
class Pass {
public:
    Pass(const Call& call, const Unit& unit, Scratch& scratch)
        : call(call), unit(unit), rows(call.rows(unit)), tiled(rows > DIRECT), seen(rows) {
        const int64_t k_row = padded(call.k.dim), tile = int64_t(BLOCK) * std::max<int64_t>(k_row, call.v_row);
        scratch.reset(rows * (k_row + BLOCK) + 2 * padded(rows) + 2 * call.floats(rows) + (tiled ? tile : 0));
        queries = {scratch.take(rows * k_row), k_row};
        scores = {scratch.take(int64_t(rows) * BLOCK), BLOCK};
        shift = scratch.take(padded(rows));
        keep = scratch.take(padded(rows));
        sums = call.sums_at(scratch.take(call.floats(rows)), rows);
        whole = call.sums_at(scratch.take(call.floats(rows)), rows);
        panel = tiled ? scratch.take(tile) : nullptr;
        for (int r = 0; r < rows; r++) {
            float* row = queries.from(r).at;
            widen(call.q, call.row(unit.sequence, position(r)), unit.head * call.group + r % call.group, call.k.dim, row);
            shift[r] = fold(row, call.k, call.attention.scale, unit.head);
            // q·mu is the same for every key: plain softmax drops it, a soft cap and a sink do not.
            if (!call.attention.softcap && !call.attention.sinks) shift[r] = 0;
        }
    }

    Sums of_segment(int64_t first, int64_t last) {
        sums.clear(rows, call.v.dim);
        for (int64_t page = first; page < last; page++) over_page(page, page + 1 < unit.end ? page + 1 : page);
        return sums;
    }

    Sums of_all() {
        whole.clear(rows, call.v.dim);
        for (int64_t page = unit.page; page < unit.end;) {
            const int64_t last = std::min(unit.end, (page / SEGMENT + 1) * SEGMENT);
            of_segment(page, last);
            for (int r = 0; r < rows; r++) join(whole.from(r), sums.from(r), call.v.dim);
            page = last;
        }
        return whole;
    }

private:
    const Call& call;
    const Unit& unit;
    const int rows;
    const bool tiled;
    Matrix queries, scores;
    float *shift, *keep, *panel;
    Sums sums, whole;
    std::vector<Range> seen;  // tokens of the page that each row sees

    int64_t position(int r) const { return unit.first + r / call.group; }

    void over_page(int64_t page, int64_t next_page) {
        const int64_t* table = call.step.table + unit.sequence * call.step.table_width;
        const int64_t cell = table[page] * call.k.heads + unit.head, next = table[next_page] * call.k.heads + unit.head;
        alignas(64) float k_scale[BLOCK], v_scale[BLOCK];
        auto scales = [&](const Side& side, float* out) -> const float* {
            if (!side.scales) return nullptr;
            __builtin_prefetch(side.scales + next * BLOCK, 0, 3);
            for (int t = 0; t < BLOCK; t += W) store(out + t, look_up(side.token_scale, side.scales + cell * BLOCK + t));
            return out;
        };
        const float *k_scales = scales(call.k, k_scale), *v_scales = scales(call.v, v_scale);
        Range any = {BLOCK, 0};
        for (int r = 0; r < rows; r++) {
            auto within = [&](int64_t token) { return int(std::clamp<int64_t>(token - page * BLOCK, 0, BLOCK)); };
            seen[r] = {within(call.oldest(position(r))), within(position(r) + 1)};
            any = {std::min(any.from, seen[r].from), std::max(any.to, seen[r].to)};
        }
        product(call.k, cell, next, queries, {0, call.k.dim}, scores, nullptr);
        for (int r = 0; r < rows; r++)
            keep[r] = soften(scores.from(r).at, k_scales, v_scales, shift[r], call.attention.softcap, seen[r], sums.from(r));
        // Only of tokens that are seen: the rest of a page is its last owner's, and a weight of 0 does not undo a NaN.
        product(call.v, cell, next, scores, any, sums.out, keep);
    }

    // Products with a page of one side. Of a tile only what some row sees: neighbours see up to nearly the same token.
    void product(const Side& side, int64_t cell, int64_t next, Matrix a, Range k, Matrix c, const float* keep) {
        const uint8_t* codes = side.codes + cell * side.head_bytes;
        if (!tiled) return multiply(side, a, rows, codes, side.codes + next * side.head_bytes, k, c, keep);
        const int depth = side.is_k ? side.dim : BLOCK;
        widen_page(side, codes, k, panel);
        for (int i = 0; i < panels(side.is_k ? BLOCK : side.dim); i++)
            for (int r = 0; r < rows; r += TILE_ROWS) {
                const int n = std::min(TILE_ROWS, rows - r);
                const Range some = {seen[r].from, seen[r + n - 1].to};
                if (side.is_k && (some.to <= i * PANEL || some.from >= (i + 1) * PANEL)) continue;
                multiply_panel(a.from(r), n, panel + int64_t(i) * depth * PANEL, side.is_k ? k : some,
                               c.from(r, int64_t(i) * PANEL), keep ? keep + r : nullptr);
            }
    }
};

std::vector<Unit> units_of(const Call& call) {
    const Step& step = call.step;
    int64_t together = BLOCK;  // positions of a unit, cut where pages are
    while (together > 1 && together * call.group > ROWS) together /= 2;
    std::vector<Unit> units;
    for (int s = 0; s < step.sequences; s++) {
        const int64_t end = step.kv_len[s], begin = end - (step.q_start[s + 1] - step.q_start[s]);
        for (int64_t first = begin; first < std::max(end, begin + 1);) {
            const int64_t last = end > 0 ? std::min(end, (first / together + 1) * together) : first + 1;
            // A row without a context, a padded one, has no pages, and its answer is 0.
            const int64_t page = end > 0 ? call.oldest(first) / BLOCK : 0, pages_end = end > 0 ? (last - 1) / BLOCK + 1 : 0;
            const int64_t cost = (pages_end - page) * ((last - first) * call.group + 4);
            for (int h = 0; h < call.k.heads; h++) units.push_back({s, h, first, last, page, pages_end, cost});
            first = last;
        }
    }
    return units;
}

}  // namespace

void attend(const Side& k, const Side& v, const Attention& natural, const Step& step, const Rows& q, void* out,
            const Pool& pool) {
    const Attention attention = in_bits(natural);
    const Call call = {k, v, attention, step, q, out, attention.heads / k.heads, panels(v.dim) * PANEL};
    std::vector<Unit> units = units_of(call);
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
    int64_t cost = 0;
    for (const Unit& unit : units) cost += unit.cost;

    // The longest contexts are split where there are too few units for the threads.
    struct Piece {
        int unit;
        int64_t first, last;  // segments; all of them: 0, 0
    };
    std::vector<Piece> pieces;
    int64_t floats = 0;
    const bool worth_it = cost > INLINE;
    const int64_t most = std::max<int64_t>(1, cost / (int64_t(pool.threads) * UNITS_A_THREAD));
    for (size_t i = 0; i < units.size(); i++) {
        Unit& unit = units[i];
        const int64_t segments = call.segments(unit);
        const int64_t count = worth_it && pool.threads > 1 ? std::min(segments, (unit.cost + most - 1) / most) : 1;
        if (count < 2) {
            pieces.push_back({int(i), 0, 0});
            continue;
        }
        unit.sums = floats;
        floats += segments * call.floats(call.rows(unit));
        for (int64_t n = 0; n < count; n++)
            pieces.push_back({int(i), segments * n / count, segments * (n + 1) / count});
    }
    const std::unique_ptr<float[]> split(new float[floats]);
    auto sums_of = [&](const Unit& unit, int64_t segment) {
        return call.sums_at(split.get() + unit.sums + segment * call.floats(call.rows(unit)), call.rows(unit));
    };

    parallel(pool, int64_t(pieces.size()), worth_it, [&](int64_t i) {
        thread_local Scratch scratch;
        const Piece& piece = pieces[i];
        const Unit& unit = units[piece.unit];
        const int rows = call.rows(unit);
        Pass pass(call, unit, scratch);
        if (unit.sums < 0) {
            const Sums sums = pass.of_all();
            for (int r = 0; r < rows; r++) call.finish_row(unit, r, sums.from(r));
        }
        for (int64_t n = piece.first; n < piece.last; n++) {
            const int64_t segment = (unit.page / SEGMENT + n) * SEGMENT;
            const Sums sums = pass.of_segment(std::max(unit.page, segment), std::min(unit.end, segment + SEGMENT));
            const Sums to = sums_of(unit, n);
            for (int r = 0; r < rows; r++) {
                to.top[r] = sums.top[r], to.total[r] = sums.total[r];
                std::copy_n(sums.out.from(r).at, v.dim, to.out.from(r).at);
            }
        }
    });
    if (floats == 0) return;
    parallel(pool, int64_t(units.size()), worth_it, [&](int64_t i) {
        const Unit& unit = units[i];
        if (unit.sums < 0) return;
        for (int r = 0; r < call.rows(unit); r++) {
            const Sums sums = sums_of(unit, 0).from(r);
            for (int64_t n = 1; n < call.segments(unit); n++) join(sums, sums_of(unit, n).from(r), v.dim);
            call.finish_row(unit, r, sums);
        }
    });
}

}  // namespace octavo::ISA
