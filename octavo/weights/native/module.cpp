// The extension module of products with weights: the kernels as Python calls them.
#include "module.h"

#include "elementwise.h"
#include "int4.h"
#include "layer.h"
#include "panels.h"

namespace nb = nanobind;
using namespace octavo;
using weights::Matrix;

#define OCTAVO_DECLARE(isa) \
    namespace octavo::weights::isa { \
    extern const Int4Kernels int4; \
    extern const PanelKernels panels; \
    extern const ElementwiseKernels elementwise; \
    }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

struct Kernels {
    const char* name;
    const weights::Int4Kernels& int4;
    const weights::PanelKernels& panels;
    const weights::ElementwiseKernels& elementwise;
};

#define OCTAVO_KERNELS(isa) \
    const Kernels isa = {#isa, weights::isa::int4, weights::isa::panels, weights::isa::elementwise};
OCTAVO_ISAS(OCTAVO_KERNELS)

#define OCTAVO_LIST(isa) &isa,
Compiled<Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

void multiply(const Matrix& matrix, uint64_t x, int64_t rows, int64_t stride, int type, uint64_t bias, uint64_t y,
              int threads) {
    compiled->int4.multiply(matrix, at<const void>(x), rows, stride, Float(type), at<const void>(bias), at<void>(y),
                            compiled.pool(threads));
}

void decode(const Matrix& matrix, int64_t first, int64_t count, int type, uint64_t w, int threads) {
    compiled->int4.decode(matrix, first, count, Float(type), at<void>(w), compiled.pool(threads));
}

// Of each product four numbers: outputs, and the addresses of its panels, of its bias or 0, and of its y.
void multiply_panels(const std::vector<uint64_t>& products, bool gated, int64_t in, int weight_type, uint64_t x,
                     int64_t rows, int64_t stride, int type, int threads) {
    std::vector<weights::Product> list;
    for (size_t i = 0; i + 3 < products.size(); i += 4)
        list.push_back({{int64_t(products[i]), in, at<const void>(products[i + 1]), Float(weight_type)},
                        at<const void>(products[i + 2]), at<void>(products[i + 3]), nullptr});
    compiled->panels.multiply(list.data(), int(list.size()), gated, at<const void>(x), rows, stride, Float(type),
                              compiled.pool(threads));
}

void pack_panels(uint64_t w, int64_t out, int64_t in, int64_t stride, int bytes, uint64_t panels, int threads) {
    compiled->panels.pack(at<const void>(w), out, in, stride, bytes, at<void>(panels), compiled.pool(threads));
}

void rms_norm(uint64_t x, int64_t rows, int64_t stride, int64_t dim, uint64_t weight, float epsilon, uint64_t y,
              int threads) {
    compiled->elementwise.rms_norm(at<const float>(x), rows, stride, dim, at<const float>(weight), epsilon, at<float>(y),
                                   compiled.pool(threads));
}

void gated_norm(uint64_t x, int64_t stride, uint64_t gate, int64_t gate_stride, int64_t rows, int64_t dim, int64_t group,
                uint64_t weight, float epsilon, bool gate_first, uint64_t y, int threads) {
    compiled->elementwise.gated_norm(at<const float>(x), stride, at<const float>(gate), gate_stride, rows, dim, group,
                                     at<const float>(weight), epsilon, gate_first, at<float>(y),
                                     compiled.pool(threads));
}

void activate(int function, uint64_t x, int64_t count, int type, uint64_t y, int threads) {
    compiled->elementwise.activate(weights::Function(function), at<const void>(x), count, Float(type), at<void>(y),
                                   compiled.pool(threads));
}

void silu_gate(uint64_t gate, uint64_t up, int64_t count, int threads) {
    compiled->elementwise.silu_gate(at<float>(gate), at<const float>(up), count, compiled.pool(threads));
}

void rope(uint64_t x, int64_t heads, int64_t stride, int64_t row_stride, int64_t rows, int64_t dim, uint64_t cos,
            int64_t cos_stride, uint64_t sin, int64_t sin_stride, uint64_t y, int threads) {
    compiled->elementwise.rope({at<const float>(x), heads, stride, row_stride}, rows, dim, at<const float>(cos),
                                 cos_stride, at<const float>(sin), sin_stride, at<float>(y), compiled.pool(threads));
}

using weights::Layer;

// Four norms of a weight's address and an epsilon; seven linear layers of outputs, inputs, a weight's and a bias' address.
Layer make_layer(int64_t heads, int64_t kv_heads, int64_t dim, int weight_type,
                 const std::vector<std::pair<uint64_t, float>>& norms, const std::vector<std::vector<uint64_t>>& linears) {
    auto norm = [&](int i) { return weights::Norm{at<const float>(norms.at(i).first), norms[i].second}; };
    auto linear = [&](int i) {
        const std::vector<uint64_t>& x = linears.at(i);
        const weights::Panels panels = {int64_t(x.at(0)), int64_t(x.at(1)), at<const void>(x.at(2)), Float(weight_type)};
        return weights::Linear{panels, at<const void>(x.at(3))};
    };
    return {heads, kv_heads, dim, norm(0), norm(1), norm(2), norm(3), linear(0), linear(1), linear(2), linear(3),
            linear(4), linear(5), linear(6)};
}

void before_attention(const Layer& layer, uint64_t x, int64_t rows, uint64_t cos, int64_t cos_stride, uint64_t sin,
                      int64_t sin_stride, uint64_t h, uint64_t q, uint64_t k, uint64_t v, int threads) {
    const weights::Turns turns = {at<const float>(cos), at<const float>(sin), cos_stride, sin_stride};
    weights::before_attention(*compiled, layer, at<const float>(x), rows, turns, at<float>(h), at<float>(q), at<float>(k),
                              at<float>(v), compiled.pool(threads));
}

void after_attention(const Layer& layer, uint64_t answers, uint64_t x, int64_t rows, uint64_t middle, uint64_t inner,
                     uint64_t y, int threads) {
    weights::after_attention(*compiled, layer, at<const float>(answers), at<const float>(x), rows, at<float>(middle),
                             at<float>(inner), at<float>(y), compiled.pool(threads));
}

int64_t spin(int64_t steps, int threads) { return compiled->panels.spin(steps, compiled.pool(threads)); }

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Products with weights, and what comes between them, for CPUs: see octavo/weights/cpu.py, which is the only caller.";
    compiled.define(m);
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int64_t out, int64_t in, int group, uint64_t codes, uint64_t scales, int scale,
                            uint64_t zeros) {
            new (self) Matrix{out, in, group, at<const uint8_t>(codes), at<const void>(scales), Float(scale),
                              at<const uint8_t>(zeros)};
        });
    m.def("multiply", &multiply, nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
    m.def("multiply_panels", &multiply_panels, nb::call_guard<nb::gil_scoped_release>());
    m.def("pack_panels", &pack_panels, nb::call_guard<nb::gil_scoped_release>());
    m.def("activate", &activate, nb::call_guard<nb::gil_scoped_release>());
    m.def("rms_norm", &rms_norm, nb::call_guard<nb::gil_scoped_release>());
    m.def("gated_norm", &gated_norm, nb::call_guard<nb::gil_scoped_release>());
    m.def("silu_gate", &silu_gate, nb::call_guard<nb::gil_scoped_release>());
    m.def("rope", &rope, nb::call_guard<nb::gil_scoped_release>());
    nb::class_<Layer>(m, "Layer");
    m.def("layer", &make_layer);
    m.def("before_attention", &before_attention, nb::call_guard<nb::gil_scoped_release>());
    m.def("after_attention", &after_attention, nb::call_guard<nb::gil_scoped_release>());
    m.def("spin", &spin, nb::call_guard<nb::gil_scoped_release>());
    m.attr("PANEL") = weights::PANEL;
}
