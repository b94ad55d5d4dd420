// Attention of any number of new tokens, one or thousands. In float32 a row's bits are the same in any company; by products
// of bytes, which only sequences with one new token take (integer.h), they are the same among other such sequences.
//
// A step's rows are written first. Where each sequence has one, whoever reads its newest page writes it, just before:
// nobody else of the step reads that row, and the page's memory is then in the nearest cache once, for both.
//
// A unit of work is one KV head and some query rows that read the same pages: all query heads of a group, of one new token
// or of up to 64. Page by page: products with K, softmax, products with V (product.h). Few rows read the codes where they
// lie; for many rows a page is first widened into a tile.
//
// What a row sums, and in which order, is fixed by its position alone: pages in ascending order; after every SEGMENT of
// pages, counted from the context's start, its sums begin anew and are joined with those of the segments before. Raw
// pages of formats with edges are a part of their own, joined last. Long contexts are split over threads at the ends of
// parts only, so neither their number nor the split changes a bit.
#include <memory>
#include <vector>

#include "integer.h"
#include "parallel.h"
#include "scratch.h"
#include "softmax.h"
#include "write.h"

namespace octavo::ISA {
namespace {

constexpr int64_t SEGMENT = 8;  // pages
constexpr int DIRECT = 12;  // most rows that read codes where they lie: with more a tile pays
constexpr int ROWS_OF_A_UNIT = 256;  // aim: its queries and sums stay in a core's second cache
constexpr int64_t INLINE = 32;  // pages of one row: fewer are not worth waking a thread for
constexpr int UNITS_A_THREAD = 6;  // pieces for each thread to balance with

// Some query rows of one sequence and one KV head.
struct Unit {
    int sequence, head;
    int64_t first, last;  // positions of its new tokens [first, last)
    int64_t page, end;  // pages that some of them see [page, end)
    int64_t own;  // first page of their own span; without edges `end`
    int64_t parts = 0;  // segments of coded pages; then, with edges, the raw pages
    int64_t cost = 0;
    int64_t sums = -1;  // where its rows' sums stand, if the context is split
};

struct Place {  // of one head's rows of a page
    const Side &k, &v;
    int64_t cell, rows;  // rows: how many of them are there
    const uint8_t* codes(const Side& side) const { return side.codes + cell * side.head_bytes; }
    Bytes keys() const {  // of a few, a line of each channel
        return {codes(k), k.head_bytes, rows * octavo::cell(k) <= 64 ? std::max<int64_t>(64, BLOCK * octavo::cell(k)) : 64};
    }
    Bytes values() const { return {codes(v), v.head_bytes / BLOCK * (is_integer(v.code) ? (rows + 3) / 4 * 4 : rows)}; }
};

struct Part {  // pages that are summed together: page 0, or not, and those of a range
    bool page_0;
    int64_t first, last;
    int64_t pages() const { return page_0 + std::max<int64_t>(0, last - first); }
    int64_t page(int64_t i) const { return page_0 ? (i == 0 ? 0 : first + i - 1) : first + i; }
};

bool is_single(const Step& step, int sequence) { return step.q_start[sequence + 1] - step.q_start[sequence] == 1; }

// What the threads of a call share.
struct Call {
    const Side &k, &v;
    const Edges* edges;
    const Attention& attention;
    const Step& step;
    const NewRows& fresh;
    const Rows& q;
    void* out;
    int group, v_row;
    bool write_late;  // where it is read, each row
    bool bytes;  // where a sequence has one new token, integer codes are multiplied as bytes

    // The oldest position that a query at `position` sees.
    int64_t oldest(int64_t position) const {
        return attention.window ? std::max<int64_t>(0, position + 1 - attention.window) : 0;
    }
    int64_t oldest_new(int s) const { return step.kv_len[s] - (step.q_start[s + 1] - step.q_start[s]); }
    // The row, of q and of out, of a sequence's token.
    int64_t row(int s, int64_t position) const { return step.q_start[s] + position - oldest_new(s); }
    int rows(const Unit& unit) const { return int(unit.last - unit.first) * group; }
    bool in_bytes(const Unit& unit) const { return bytes && is_single(step, unit.sequence); }

    bool is_raw(const Unit& unit, int64_t page) const { return edges && (page == 0 || page >= unit.own); }
    Place place(const Unit& unit, int64_t page) const {
        const int s = unit.sequence;
        const int64_t rows = std::clamp<int64_t>(unit.last - page * BLOCK, 0, BLOCK);
        if (!is_raw(unit, page)) return {k, v, step.table[s * step.table_width + page] * k.heads + unit.head, rows};
        const int64_t pages = edges->span / BLOCK;
        if (page > 0 && edges->hand[s] >= 0) {
            const int64_t at = edges->hand[s] + page - oldest_new(s) / edges->span * pages;
            return {edges->hand_k, edges->hand_v, at * k.heads + unit.head, rows};
        }
        const int64_t at = page > 0 ? edges->ring[s] + page % pages : edges->first[s];
        return {edges->k, edges->v, at * k.heads + unit.head, rows};
    }

    Part coded(const Unit& unit) const {
        return {false, std::max<int64_t>(unit.page, edges ? 1 : 0), std::min(unit.own, unit.end)};
    }
    int64_t coded_parts(const Unit& unit) const { return unit.parts - (edges ? 1 : 0); }
    Part part(const Unit& unit, int64_t number) const {
        const Part all = coded(unit);
        if (number == coded_parts(unit)) return {unit.page == 0 && unit.end > 0, std::max(all.first, unit.own), unit.end};
        const int64_t at = (all.first / SEGMENT + number) * SEGMENT;
        return {false, std::max(all.first, at), std::min(all.last, at + SEGMENT)};
    }

    // The places of one head's codes of a new row, if no query reads what lies around them, are fetched before.
    void expect(int64_t t, int head) const {
        if (!edges || !fresh.slots) return;
        expect_row(k, head, fresh.slots[t]);
        expect_row(v, head, fresh.slots[t]);
    }
    // One head's K and V of a new row go to their places.
    void put(int64_t t, int head) const {
        alignas(64) float row[LARGEST];
        auto each = [&](const Side& side, const Rows& x, const Side* raw, const Side* hand) {
            widen(x, t, head, side.dim, row);
            if (raw && edges->slots) put_row(*raw, head, edges->slots[t], row);
            if (hand && edges->hand_slots) put_row(*hand, head, edges->hand_slots[t], row);
            if (fresh.slots) put_row(side, head, fresh.slots[t], row);
        };
        each(k, fresh.k, edges ? &edges->k : nullptr, edges ? &edges->hand_k : nullptr);
        each(v, fresh.v, edges ? &edges->v : nullptr, edges ? &edges->hand_v : nullptr);
    }

    int64_t floats(int64_t rows) const { return padded(rows) * 2 + rows * v_row; }  // of sums
    Sums sums_at(float* at, int64_t rows) const { return {at, at + padded(rows), {at + 2 * padded(rows), v_row}}; }

    void finish_rows(const Unit& unit, Sums coded, const Sums* raw) const {
        for (int r = 0; r < rows(unit); r++) {
            const int query_head = unit.head * group + r % group;
            const Sums raws = raw ? raw->from(r) : coded;
            finish(coded.from(r), raw ? &raws : nullptr, v, attention, unit.head,
                   row(unit.sequence, unit.first + r / group), query_head, q.type, out);
        }
    }
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
        : call(call), unit(unit), rows(call.rows(unit)), tiled(rows > DIRECT), bytes(call.in_bytes(unit)), seen(rows) {
        const int64_t k_row = padded(call.k.dim), tile = int64_t(BLOCK) * std::max<int64_t>(k_row, call.v_row);
        const int64_t sets = call.edges ? 2 : 1, rounded = bytes ? rows * int64_t(sizeof(IntegerRow) / sizeof(float)) : 0;
        scratch.reset(rows * (sets * k_row + BLOCK) + 2 * (padded(rows) + call.floats(rows) + rounded) + tile);
        folded = natural = {scratch.take(rows * k_row), k_row};
        if (call.edges) natural = {scratch.take(rows * k_row), k_row};
        scores = {scratch.take(int64_t(rows) * BLOCK), BLOCK};
        shift = scratch.take(padded(rows));
        keep = scratch.take(padded(rows));
        sums = call.sums_at(scratch.take(call.floats(rows)), rows);
        whole = call.sums_at(scratch.take(call.floats(rows)), rows);
        panel = scratch.take(tile);
        queries = reinterpret_cast<IntegerRow*>(scratch.take(rounded));
        weights = reinterpret_cast<IntegerRow*>(scratch.take(rounded));
        if (call.write_late) call.expect(call.row(unit.sequence, unit.first), unit.head);
        for (int r = 0; r < rows; r++) {
            float* row = folded.from(r).at;
            widen(call.q, call.row(unit.sequence, position(r)), unit.head * call.group + r % call.group, call.k.dim, row);
            if (call.edges)
                for (int d = 0; d < call.k.dim; d++) natural.from(r).at[d] = row[d] * call.attention.scale;
            // q·mu is the same for every code: plain softmax over codes alone drops it.
            const bool shifted = call.attention.softcap || call.attention.sinks || call.edges;
            shift[r] = fold(row, call.k, call.attention.scale, unit.head, shifted);
            if (bytes) round_query(row, call.k.dim, queries[r]);
        }
    }

    // Sums of one part of the parts up to `end`; valid until the next. after(): the place that is read behind them.
    template <class F>
    Sums of_part(int64_t number, int64_t end, F&& after) {
        sums.clear(rows, call.v.dim);
        const Part part = call.part(unit, number);
        for (int64_t i = 0; i < part.pages(); i++) {
            const bool last = i + 1 == part.pages();
            over_page(part.page(i), !last ? call.place(unit, part.page(i + 1))
                                    : number + 1 < end ? call.place(unit, call.part(unit, number + 1).page(0)) : after());
        }
        return sums;
    }

    template <class F>
    void of_all(F&& after) {
        whole.clear(rows, call.v.dim);
        for (int64_t part = 0; part < unit.parts; part++) {
            of_part(part, unit.parts, after);
            for (int r = 0; r < rows && part < call.coded_parts(unit); r++)
                join(whole.from(r), sums.from(r), call.v.dim);
        }
        call.finish_rows(unit, whole, call.edges ? &sums : nullptr);
    }

private:
    const Call& call;
    const Unit& unit;
    const int rows;
    const bool tiled, bytes;
    Matrix folded, natural, scores;  // queries for codes, for raw rows
    float *shift, *keep, *panel;
    IntegerRow *queries, *weights;  // with `bytes`: those for codes, and of the page
    Sums sums, whole;
    std::vector<Range> seen;  // tokens of the page that each row sees

    int64_t position(int r) const { return unit.first + r / call.group; }

    void over_page(int64_t page, const Place& next) {
        if (call.write_late && page == unit.end - 1) call.put(call.row(unit.sequence, unit.first), unit.head);
        const bool raw = call.is_raw(unit, page);
        const Place here = call.place(unit, page);
        alignas(64) float k_scale[BLOCK], v_scale[BLOCK];
        const float* k_scales = scales_of(here.k, here.cell, next.k, next.cell, k_scale);
        const float* v_scales = scales_of(here.v, here.cell, next.v, next.cell, v_scale);
        const Range any = see(page);
        product(here.k, here, next.keys(), raw ? natural : folded, any, scores, nullptr);
        for (int r = 0; r < rows; r++)
            keep[r] = soften(scores.from(r).at, k_scales, v_scales, raw ? 0 : shift[r], call.attention.softcap, seen[r],
                             sums.from(r));
        // Only of tokens that are seen: the rest of a page is its last owner's, and a weight of 0 does not undo a NaN.
        product(here.v, here, next.values(), scores, any, sums.out, keep);
    }

    // Sets what each row sees of the page; returns what any of them sees.
    Range see(int64_t page) {
        const int64_t start = page * BLOCK;
        if (start + BLOCK <= unit.first + 1 && call.oldest(unit.last - 1) <= start) {
            std::fill(seen.begin(), seen.end(), Range{0, BLOCK});
            return {0, BLOCK};
        }
        auto within = [&](int64_t token) { return int(std::clamp<int64_t>(token - start, 0, BLOCK)); };
        for (int r = 0; r < rows; r++) seen[r] = {within(call.oldest(position(r))), within(position(r) + 1)};
        return {seen.front().from, seen.back().to};
    }

    // Products with a page of one side, of which some row sees `tokens`. Of a tile only what some of its rows see:
    // neighbours see up to nearly the same token.
    void product(const Side& side, const Place& place, Bytes next, Matrix a, Range tokens, Matrix c, const float* keep) {
        if (bytes && is_integer(side.code)) {
            for (int r = 0; r < rows && !side.is_k; r++) round_weights(a.from(r).at, weights[r]);
            return multiply(side, side.is_k ? queries : weights, rows, place.codes(side), next, tokens, c, keep);
        }
        if (!tiled) return multiply(side, a, rows, place.codes(side), next, tokens, c, keep);
        const int depth = side.is_k ? side.dim : BLOCK;
        const Range k = side.is_k ? Range{0, depth} : tokens;
        widen_page(side, place.codes(side), k, panel);
        for (int i = 0; i < panels(side.is_k ? BLOCK : side.dim); i++)
            for (int r = 0; r < rows; r += TILE_ROWS) {
                const int n = std::min(TILE_ROWS, rows - r);
                const Range some = {seen[r].from, seen[r + n - 1].to};
                if (side.is_k && (some.to <= i * PANEL || some.from >= (i + 1) * PANEL)) continue;
                multiply_panel(side, a.from(r), n, panel + int64_t(i) * depth * PANEL, side.is_k ? k : some,
                               c.from(r, int64_t(i) * PANEL), keep ? keep + r : nullptr);
            }
    }
};

std::vector<Unit> units_of(const Call& call) {
    int64_t together = BLOCK;  // positions of a unit, cut where pages are
    while (together > 1 && together * call.group > ROWS_OF_A_UNIT) together /= 2;
    std::vector<Unit> units;
    auto add = [&](Unit unit) {
        const Part coded = call.coded(unit);
        if (coded.pages() > 0) unit.parts = (coded.last - 1) / SEGMENT - coded.first / SEGMENT + 1;
        unit.parts += call.edges ? 1 : 0;
        unit.cost = (unit.end - unit.page) * ((unit.last - unit.first) * call.group + 4);
        for (; unit.head < call.k.heads; unit.head++) units.push_back(unit);
    };
    for (int s = 0; s < call.step.sequences; s++) {
        const int64_t end = call.step.kv_len[s], begin = call.oldest_new(s);
        if (end == 0) add({s, 0, begin, end, 0, 0, 0});  // a padded row has no pages, and its answer is 0
        for (int64_t first = begin, last; 0 < end && first < end; first = last) {
            last = std::min(end, (first / together + 1) * together);
            const int64_t page = call.oldest(first) / BLOCK, pages_end = (last - 1) / BLOCK + 1;
            add({s, 0, first, last, page, pages_end,
                 call.edges ? first / call.edges->span * (call.edges->span / BLOCK) : pages_end});
        }
    }
    return units;
}

bool one_each(const Step& step) {
    for (int s = 0; s < step.sequences; s++)
        if (!is_single(step, s)) return false;
    return true;
}

struct Piece {
    int unit;
    int64_t first, last;  // parts
};

}  // namespace

void attend(const Side& k, const Side& v, const Edges* edges, const Attention& natural, const Step& step,
            const NewRows& fresh, const Rows& q, void* out, bool bytes, const Pool& pool) {
    const Attention attention = in_bits(natural);
    const int64_t rows = step.q_start[step.sequences];
    const Call call = {k, v, edges, attention, step, fresh, q, out, attention.heads / k.heads, panels(v.dim) * PANEL,
                       one_each(step), bytes};
    if (!call.write_late)
        over_rows(rows, k.heads, k.dim + v.dim, pool, [&](int64_t t, int head) { call.put(t, head); });
    std::vector<Unit> units = units_of(call);
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
    int64_t cost = 0;
    for (const Unit& unit : units) cost += unit.cost;

    // The longest contexts are split where there are too few units for the threads.
    std::vector<Piece> pieces;
    int64_t floats = 0;
    const bool worth_it = cost > INLINE;
    const int64_t most = std::max<int64_t>(1, cost / (int64_t(pool.threads) * UNITS_A_THREAD));
    for (size_t i = 0; i < units.size(); i++) {
        Unit& unit = units[i];
        const int64_t parts = unit.parts;
        const int64_t count = worth_it && pool.threads > 1 ? std::min(parts, (unit.cost + most - 1) / most) : 1;
        if (count < 2) {
            pieces.push_back({int(i), 0, parts});
            continue;
        }
        unit.sums = floats;
        floats += parts * call.floats(call.rows(unit));
        for (int64_t n = 0; n < count; n++) pieces.push_back({int(i), parts * n / count, parts * (n + 1) / count});
    }
    const std::unique_ptr<float[]> split(new float[floats]);
    auto sums_of = [&](const Unit& unit, int64_t part) {
        return call.sums_at(split.get() + unit.sums + part * call.floats(call.rows(unit)), call.rows(unit));
    };

    parallel_ahead(pool, int64_t(pieces.size()), worth_it, [&](int64_t i, auto soon) {
        thread_local Scratch scratch;
        const Piece& piece = pieces[i];
        const Unit& unit = units[piece.unit];
        const auto after = [&] {
            const int64_t at = soon();
            const Piece& next = at < int64_t(pieces.size()) && units[pieces[at].unit].end > 0 ? pieces[at] : piece;
            return call.place(units[next.unit], call.part(units[next.unit], next.first).page(0));
        };
        Pass pass(call, unit, scratch);
        if (unit.sums < 0) return pass.of_all(after);
        for (int64_t part = piece.first; part < piece.last; part++) {
            const Sums sums = pass.of_part(part, piece.last, after), to = sums_of(unit, part);
            for (int r = 0; r < call.rows(unit); r++) {
                to.top[r] = sums.top[r], to.total[r] = sums.total[r];
                std::copy_n(sums.out.from(r).at, v.dim, to.out.from(r).at);
            }
        }
    });
    if (floats == 0) return;
    parallel(pool, int64_t(units.size()), worth_it, [&](int64_t i) {
        const Unit& unit = units[i];
        if (unit.sums < 0) return;
        const int64_t coded = call.coded_parts(unit);
        const Sums whole = sums_of(unit, 0), raw = sums_of(unit, coded);
        for (int64_t part = 1; part < coded; part++)
            for (int r = 0; r < call.rows(unit); r++) join(whole.from(r), sums_of(unit, part).from(r), v.dim);
        call.finish_rows(unit, whole, edges ? &raw : nullptr);
    });
}

}  // namespace octavo::ISA
