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

struct Kernels : weights::Int4Kernels, weights::PanelKernels, weights::ElementwiseKernels {
    const char* name;
};

#define OCTAVO_KERNELS(isa) \
    const Kernels isa = {weights::isa::int4, weights::isa::panels, weights::isa::elementwise, #isa};
OCTAVO_ISAS(OCTAVO_KERNELS)

#define OCTAVO_LIST(isa) &isa,
Compiled<Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

// Of each product four numbers: outputs, and the addresses of its panels, of its bias or 0, and of its y.
void multiply_panels(const std::vector<uint64_t>& products, bool gated, int64_t in, int weight_type, bool pairs, uint64_t x,
                     int64_t rows, int64_t stride, int type, int threads) {
    std::vector<weights::Product> list;
    for (size_t i = 0; i + 3 < products.size(); i += 4)
        list.push_back({{int64_t(products[i]), in, at<const void>(products[i + 1]), Float(weight_type), pairs},
                        at<const void>(products[i + 2]), at<void>(products[i + 3]), nullptr});
    compiled->PanelKernels::multiply(list.data(), int(list.size()), gated, at<const void>(x), rows, stride, Float(type),
                              compiled.pool(threads));
}

using weights::Layer;

// Four norms of a weight's address and an epsilon; seven linear layers of outputs, inputs, a weight's and a bias' address.
Layer make_layer(int64_t heads, int64_t kv_heads, int64_t dim, int weight_type, bool pairs,
                 const std::vector<std::pair<uint64_t, float>>& norms, const std::vector<std::vector<uint64_t>>& linears) {
    auto norm = [&](int i) { return weights::Norm{at<const float>(norms.at(i).first), norms[i].second}; };
    auto linear = [&](int i) {
        const std::vector<uint64_t>& x = linears.at(i);
        const weights::Panels panels = {int64_t(x.at(0)), int64_t(x.at(1)), at<const void>(x.at(2)), Float(weight_type), pairs};
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

}  // namespace

template <>
struct octavo::Argument<const weights::Heads&> {
    typedef std::tuple<uint64_t, int64_t, int64_t, int64_t> Python;  // address, heads, strides of heads and of rows
    static weights::Heads take(const Python& x) {
        return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x), std::get<3>(x)};
    }
};

NB_MODULE(_native, m) {
    m.doc() = "Products with weights, and what comes between them, for CPUs: see octavo/weights/cpu.py, which is the only caller.";
    compiled.define(m);
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int64_t out, int64_t in, int group, uint64_t codes, uint64_t scales, int scale,
                            uint64_t zeros) {
            new (self) Matrix{out, in, group, at<const uint8_t>(codes), at<const void>(scales), Float(scale),
                              at<const uint8_t>(zeros)};
        });
    compiled.def(m, "multiply", &weights::Int4Kernels::multiply);
    compiled.def(m, "decode", &weights::Int4Kernels::decode);
    m.def("multiply_panels", &multiply_panels, nb::call_guard<nb::gil_scoped_release>());
    m.def("multiplies_pairs", [] { return compiled->pairs && has_bf16(); });
    m.def("has_tiles", [] { return compiled->pairs && has_bf16() && compiled->has_tiles(); });
    compiled.def(m, "pack_panels", &weights::PanelKernels::pack);
    compiled.def(m, "activate", &Kernels::activate);
    compiled.def(m, "rms_norm", &Kernels::rms_norm);
    compiled.def(m, "gated_norm", &Kernels::gated_norm);
    compiled.def(m, "silu_gate", &Kernels::silu_gate);
    compiled.def(m, "rope", &Kernels::rope);
    nb::class_<Layer>(m, "Layer");
    m.def("layer", &make_layer);
    m.def("before_attention", &before_attention, nb::call_guard<nb::gil_scoped_release>());
    m.def("after_attention", &after_attention, nb::call_guard<nb::gil_scoped_release>());
    compiled.def(m, "spin", &Kernels::spin);
    using weights::Function;
    m.attr("FUNCTIONS") = numbers<Function>(
        {{"silu", Function::SILU}, {"gelu", Function::GELU}, {"gelu_tanh", Function::GELU_TANH}});
    m.attr("TILE") = weights::TILE;
    m.attr("PANEL") = weights::PANEL;
}
