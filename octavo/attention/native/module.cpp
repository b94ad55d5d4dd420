// The extension module of attention: the kernels as Python calls them.
#include "module.h"

#include "kernel.h"

namespace nb = nanobind;
using namespace octavo;

#define OCTAVO_DECLARE(isa) namespace octavo::isa { extern const Kernels kernels; }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

#define OCTAVO_LIST(isa) &octavo::isa::kernels,
Compiled<Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

Side make_side(int code, int heads, int dim, bool is_k, bool rotated, uint64_t codes, uint64_t scales, uint64_t mu,
               uint64_t c, uint64_t reciprocal, uint64_t token_scale, uint64_t token_reciprocal, uint64_t token_limit,
               int64_t head_bytes, uint64_t saturated, int64_t blocks) {
    return {Code(code), heads, dim, is_k, rotated, at<uint8_t>(codes), at<uint8_t>(scales), at<const float>(mu),
            at<const float>(c), at<const float>(reciprocal), at<const float>(token_scale),
            at<const float>(token_reciprocal), at<const float>(token_limit), head_bytes, at<int64_t>(saturated), blocks};
}

// What a step is for all layers: where its rows are, and where they go.
struct Plan {
    Step step;
    const int64_t* slots;
    // With edges:
    int span;
    const int64_t *first, *ring, *raw_slots, *hand, *hand_slots;
    int64_t rows() const { return step.q_start[step.sequences]; }

    // What it names lies within a cache of so many blocks.
    void check(int64_t blocks) const {
        const auto& [sequences, q_start, kv_len, table, width] = step;
        expect(q_start[0] == 0, "rows from the first one on");
        for (int s = 0; s < sequences; s++) {
            const int64_t own = q_start[s + 1] - q_start[s], pages = (kv_len[s] + BLOCK - 1) / BLOCK;
            expect(own > 0 && (kv_len[s] == 0 || kv_len[s] >= own), "new rows of each sequence, the last that it has");
            expect(pages <= width && within(table + s * width, pages, 0, blocks), "tables of blocks that there are");
        }
        expect(within(slots, rows(), -1, blocks * BLOCK), "slots in blocks that there are");
    }
    // The same of its raw pages.
    void check_raw(int64_t pages, int64_t pages_in_hand) const {
        expect(within(first, step.sequences, 0, pages) && within(raw_slots, rows(), -1, pages * BLOCK) &&
               within(ring, step.sequences, 0, pages - span / BLOCK + 1), "raw pages that there are");
        for (int s = 0; s < step.sequences; s++) {
            const int64_t end = step.kv_len[s], begin = (end - (step.q_start[s + 1] - step.q_start[s])) / span * span;
            expect(hand[s] < 0 || hand[s] + (end - begin + BLOCK - 1) / BLOCK <= pages_in_hand, "raw pages in hand");
        }
        expect(within(hand_slots, rows(), -1, pages_in_hand * BLOCK), "slots in raw pages in hand");
    }
};

typedef std::tuple<uint64_t, int, int64_t, int, int, int64_t, int64_t> Given;  // address, type, shape, strides but the last

Rows rows_of(const Given& x, int64_t rows, int heads, int dim) {
    const auto& [address, type, own_rows, own_heads, own_dim, row, head] = x;
    expect(own_rows == rows && own_heads == heads && own_dim == dim, "rows as many and as long as the step and the cache have");
    return {at<const void>(address), Float(type), row, head};
}

// Returns how many rows were written: slots below 0 are nowhere.
int64_t write_rows(const Side& side, const Given& x, uint64_t slots, int64_t rows, int threads) {
    const auto* to = at<const int64_t>(slots);
    expect(within(to, rows, -1, side.blocks * BLOCK), "slots in blocks that there are");
    compiled->write(side, rows_of(x, rows, side.heads, side.dim), to, rows, compiled.pool(threads));
    return std::count_if(to, to + rows, [](int64_t slot) { return slot >= 0; });
}

// Attention of a layer. `owner`: it writes the step's rows into the cache; a layer that shares another's only reads.
void attend(const Side& k, const Side& v, const Side* raw_k, const Side* raw_v, const Side* hand_k, const Side* hand_v,
            const Attention& attention, const Plan& plan, bool owner, const Given& q, const Given& new_k,
            const Given& new_v, uint64_t out, bool bytes, int threads) {
    const int64_t rows = plan.rows();
    plan.check(k.blocks);
    const NewRows fresh = {rows_of(new_k, rows, k.heads, k.dim), rows_of(new_v, rows, v.heads, v.dim),
                           owner ? plan.slots : nullptr};
    Edges edges;
    if (raw_k) {
        plan.check_raw(raw_k->blocks, hand_k ? hand_k->blocks : 0);
        edges = {plan.span, *raw_k, *raw_v, plan.first, plan.ring, owner ? plan.raw_slots : nullptr,
                 hand_k ? *hand_k : *raw_k, hand_v ? *hand_v : *raw_v, plan.hand, hand_k ? plan.hand_slots : nullptr};
    }
    compiled->attend(k, v, raw_k ? &edges : nullptr, attention, plan.step, fresh,
                     rows_of(q, rows, attention.heads, k.dim), at<void>(out), bytes, compiled.pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Attention on codes for CPUs: see octavo/attention/cpu.py, which is the only caller.";
    compiled.define(m);
    m.attr("CODES") = numbers<Code>({{"bfloat16", Code::BF16}, {"float16", Code::FP16}, {"float32", Code::FP32},
                                     {"int8", Code::INT8}, {"uint8", Code::INT4}, {"float8_e4m3fn", Code::FP8}});
    m.attr("BLOCK") = BLOCK;
    m.attr("LARGEST") = LARGEST;
    nb::class_<Side>(m, "Side");
    nb::class_<Attention>(m, "Attention")
        .def("__init__", [](Attention* self, int heads, float scale, int64_t window, float softcap, uint64_t sinks) {
            new (self) Attention{heads, scale, window, softcap, at<const float>(sinks)};
        });
    nb::class_<Plan>(m, "Plan")
        .def("__init__", [](Plan* self, int sequences, uint64_t q_start, uint64_t kv_len, uint64_t table,
                            int64_t table_width, uint64_t slots, int span, uint64_t first, uint64_t ring,
                            uint64_t raw_slots, uint64_t hand, uint64_t hand_slots) {
            auto numbers = [](uint64_t address) { return at<const int64_t>(address); };
            const Step step = {sequences, numbers(q_start), numbers(kv_len), numbers(table), table_width};
            new (self) Plan{step, numbers(slots), span, numbers(first), numbers(ring), numbers(raw_slots), numbers(hand),
                            numbers(hand_slots)};
        });
    m.def("side", &make_side);
    m.def("write", &write_rows, nb::call_guard<nb::gil_scoped_release>());
    const auto given = nb::arg();
    const auto optional = nb::arg().none();
    m.def("attend", &attend, given, given, optional, optional, optional, optional, given, given, given, given, given,
          given, given, given, given, nb::call_guard<nb::gil_scoped_release>());
    compiled.def(m, "stream", &Kernels::stream);
}
