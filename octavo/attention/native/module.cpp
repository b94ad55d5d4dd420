// The extension module of attention: the kernels as Python calls them.
#include "module.h"

#include <algorithm>

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
               int64_t head_bytes, uint64_t saturated) {
    return {Code(code), heads, dim, is_k, rotated, at<uint8_t>(codes), at<uint8_t>(scales), at<const float>(mu),
            at<const float>(c), at<const float>(reciprocal), at<const float>(token_scale),
            at<const float>(token_reciprocal), at<const float>(token_limit), head_bytes, at<int64_t>(saturated)};
}

// Returns how many tokens were written: slots below 0 are nowhere.
int64_t write_rows(const Side& side, uint64_t x, int type, int64_t token_stride, int64_t head_stride, uint64_t slots,
                   int64_t tokens, int threads) {
    const auto* to = at<const int64_t>(slots);
    compiled->write(side, {at<const void>(x), Float(type), token_stride, head_stride}, to, tokens, compiled.pool(threads));
    return std::count_if(to, to + tokens, [](int64_t slot) { return slot >= 0; });
}

// What a step is for all layers: where its rows are, and where they go.
struct Plan {
    Step step;
    const int64_t* slots;
    // With edges:
    int span;
    const int64_t *first, *ring, *raw_slots, *hand, *hand_slots;
};

// Attention of a layer. Rows are an address, a type, and the strides of tokens and heads. `owner`: it writes the step's
// rows into the cache; a layer that shares another's only reads.
void attend(const Side& k, const Side& v, const Side* raw_k, const Side* raw_v, const Side* hand_k, const Side* hand_v,
            const Attention& attention, const Plan& plan, bool owner, uint64_t q, int q_type, int64_t q_token,
            int64_t q_head, uint64_t new_k, int k_type, int64_t k_token, int64_t k_head, uint64_t new_v, int v_type,
            int64_t v_token, int64_t v_head, uint64_t out, int threads) {
    const NewRows fresh = {{at<const void>(new_k), Float(k_type), k_token, k_head},
                           {at<const void>(new_v), Float(v_type), v_token, v_head},
                           owner ? plan.slots : nullptr};
    Edges edges;
    if (raw_k)
        edges = {plan.span, *raw_k, *raw_v, plan.first, plan.ring, owner ? plan.raw_slots : nullptr,
                 hand_k ? *hand_k : *raw_k, hand_v ? *hand_v : *raw_v, plan.hand, hand_k ? plan.hand_slots : nullptr};
    compiled->attend(k, v, raw_k ? &edges : nullptr, attention, plan.step, fresh,
                     {at<const void>(q), Float(q_type), q_token, q_head}, at<void>(out), compiled.pool(threads));
}

void decode(const Side& k, const Side& v, const Attention& attention, const Plan& plan, uint64_t q, int type,
            int64_t token_stride, int64_t head_stride, uint64_t out, int threads) {
    compiled->decode(k, v, attention, plan.step, {at<const void>(q), Float(type), token_stride, head_stride}, at<void>(out),
                     compiled.pool(threads));
}

void read_rows(const Side& side, int head, int heads, uint64_t blocks, int64_t count, int type, uint64_t out,
               int threads) {
    compiled->read(side, head, heads, at<const int64_t>(blocks), count, Float(type), at<void>(out),
                   compiled.pool(threads));
}

int64_t stream(const Side& side, uint64_t blocks, int64_t count, int threads) {
    return compiled->stream(side, at<const int64_t>(blocks), count, compiled.pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Attention on codes for CPUs: see octavo/attention/cpu.py, which is the only caller.";
    compiled.define(m);
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
    const auto optional = nb::arg().none();
    const auto given = nb::arg();
    m.def("attend", &attend, given, given, optional, optional, optional, optional, given, given, given, given, given,
          given, given, given, given, given, given, given, given, given, given, given, given,
          nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
    m.def("stream", &stream, nb::call_guard<nb::gil_scoped_release>());
    m.def("read", &read_rows, nb::call_guard<nb::gil_scoped_release>());
}
