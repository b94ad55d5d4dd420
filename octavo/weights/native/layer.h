// A decoder layer of the usual form, around its attention, in two calls: between products Python would find its own
// memory thrown out of the caches by the weights that have passed.
//
//     h = norm(x);  q, k, v = rope(norm(h·Wq)), rope(norm(h·Wk)), h·Wv           before attention
//     m = x + answers·Wo;  h = norm(m);  y = m + (silu(h·Wgate) ∘ h·Wup)·Wdown   after it
#pragma once

#include "elementwise.h"
#include "panels.h"

namespace octavo::weights {

struct Norm {
    const float* weight;  // null: none
    float epsilon;
};

struct Linear {
    Panels weight;
    const void* bias;
    Product to(float* y, const float* plus = nullptr) const { return {weight, bias, y, plus}; }
};

struct Layer {
    int64_t heads, kv_heads, dim;
    Norm before, after, of_q, of_k;
    Linear q, k, v, o, gate, up, down;
};

struct Turns {  // cos and sin [rows, dim]
    const float *cos, *sin;
    int64_t cos_stride, sin_stride;
};

// x and h [rows, width], q [rows, heads, dim], k and v [rows, kv_heads, dim].
template <class Kernels>
void before_attention(const Kernels& kernels, const Layer& layer, const float* x, int64_t rows, const Turns& turns, float* h,
                      float* q, float* k, float* v, const Pool& pool) {
    const int64_t width = layer.q.weight.in, dim = layer.dim;
    kernels.rms_norm(x, rows, width, width, layer.before.weight, layer.before.epsilon, h, pool);
    const Product products[] = {layer.q.to(q), layer.k.to(k), layer.v.to(v)};
    kernels.PanelKernels::multiply(products, 3, false, h, rows, width, Float::FP32, pool);
    auto turn = [&](float* y, int64_t heads, const Norm& norm) {
        if (norm.weight) kernels.rms_norm(y, rows * heads, dim, dim, norm.weight, norm.epsilon, y, pool);
        kernels.rope({y, heads, dim, heads * dim}, rows, dim, turns.cos, turns.cos_stride, turns.sin, turns.sin_stride, y,
                     pool);
    };
    turn(q, layer.heads, layer.of_q);
    turn(k, layer.kv_heads, layer.of_k);
}

// answers [rows, heads, dim], x, middle and y [rows, width], inner [rows, inputs of down].
template <class Kernels>
void after_attention(const Kernels& kernels, const Layer& layer, const float* answers, const float* x, int64_t rows,
                     float* middle, float* inner, float* y, const Pool& pool) {
    const int64_t width = layer.q.weight.in;
    const auto multiply = [&](const Product* products, int count, bool gated, const float* from) {
        kernels.PanelKernels::multiply(products, count, gated, from, rows, products->weight.in, Float::FP32, pool);
    };
    const Product output = layer.o.to(middle, x), gate_and_up[] = {layer.gate.to(inner), layer.up.to(nullptr)};
    multiply(&output, 1, false, answers);
    kernels.rms_norm(middle, rows, width, width, layer.after.weight, layer.after.epsilon, y, pool);
    multiply(gate_and_up, 2, true, y);
    const Product down = layer.down.to(y, middle);
    multiply(&down, 1, false, inner);
}

}  // namespace octavo::weights
