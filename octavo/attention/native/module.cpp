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

void attend(const Side& k, const Side& v, const Edges* edges, const Attention& attention, const Step& step, uint64_t q,
            int type, int64_t token_stride, int64_t head_stride, uint64_t out, int threads) {
    compiled->attend(k, v, edges, attention, step, {at<const void>(q), Float(type), token_stride, head_stride},
                     at<void>(out), compiled.pool(threads));
}

void decode(const Side& k, const Side& v, const Attention& attention, const Step& step, uint64_t q, int type,
            int64_t token_stride, int64_t head_stride, uint64_t out, int threads) {
    compiled->decode(k, v, attention, step, {at<const void>(q), Float(type), token_stride, head_stride}, at<void>(out),
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
    nb::class_<Step>(m, "Step")
        .def("__init__", [](Step* self, int sequences, uint64_t q_start, uint64_t kv_len, uint64_t table,
                            int64_t table_width) {
            new (self) Step{sequences, at<const int64_t>(q_start), at<const int64_t>(kv_len), at<const int64_t>(table),
                            table_width};
        });
    nb::class_<Edges>(m, "Edges")
        .def("__init__", [](Edges* self, int span, const Side& k, const Side& v, uint64_t first, uint64_t ring,
                            const Side& hand_k, const Side& hand_v, uint64_t hand) {
            new (self) Edges{span, k, v, at<const int64_t>(first), at<const int64_t>(ring), hand_k, hand_v,
                             at<const int64_t>(hand)};
        });
    m.def("side", &make_side);
    m.def("write", &write_rows, nb::call_guard<nb::gil_scoped_release>());
    m.def("attend", &attend, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
          nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
    m.def("stream", &stream, nb::call_guard<nb::gil_scoped_release>());
    m.def("read", &read_rows, nb::call_guard<nb::gil_scoped_release>());
}
