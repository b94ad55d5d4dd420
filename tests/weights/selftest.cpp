// The products of one instruction set against plain arithmetic, on random weights of awkward shapes: those of 4 bits and
// those in panels; and activations. Compiled by test_native_build.py, with sanitizers and for other processors. Memory is allocated to
// the byte.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "elementwise.h"
#include "int4.h"
#include "panels.h"
#include "processor.h"

namespace octavo::weights::TESTED {
extern const Int4Kernels int4;
extern const PanelKernels panels;
extern const ElementwiseKernels elementwise;
}

using namespace octavo;
using weights::Matrix;
using weights::TILE;

namespace {

std::mt19937 random_source(0);
int pick(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_source); }

int32_t run_inline(int64_t begin, int64_t end, int64_t, Task task, void* context) {
    for (int64_t i = begin; i < end; i++) task(i, i + 1, context);
    return 0;
}
const Pool POOL{run_inline, 3};

bool int4_is_right() {
    for (int i = 0; i < 60; i++) {
        const int group = 16 << pick(0, 3), groups = pick(1, 4), in = group * groups, out = pick(1, 70), rows = pick(1, 20);
        const int tiles = (out + TILE - 1) / TILE;
        std::vector<uint8_t> codes(size_t(tiles) * TILE * in / 2), zeros(size_t(tiles) * groups * TILE);
        std::vector<float> scales(zeros.size()), x(size_t(rows) * in), bias(out), y(size_t(rows) * out);
        std::vector<float> w(size_t(out) * in);
        for (auto& byte : codes) byte = uint8_t(pick(0, 255));
        for (auto& zero : zeros) zero = uint8_t(pick(0, 15));
        for (auto& scale : scales) scale = pick(1, 100) / 1000.0f;
        for (auto* values : {&x, &bias})
            for (float& value : *values) value = std::normal_distribution<float>()(random_source);
        const Matrix matrix{out, in, group, codes.data(), scales.data(), Float::FP32, zeros.data()};
        const auto& kernels = weights::TESTED::int4;
        kernels.multiply(matrix, x.data(), rows, in, Float::FP32, bias.data(), y.data(), POOL);
        kernels.decode(matrix, 0, out, Float::FP32, w.data(), POOL);
        double error = 0, size = 0;
        for (int r = 0; r < rows; r++)
            for (int o = 0; o < out; o++) {
                double exact = bias[o];
                for (int k = 0; k < in; k++) {
                    const size_t tile = o / TILE, lane = o % TILE, at = (tile * groups + k / group) * TILE + lane;
                    const uint8_t byte = codes[((tile * in / 8 + k / 8) * TILE + lane) * 4 + k % 4];
                    const float value = float((k % 8 < 4 ? byte & 15 : byte >> 4) - zeros[at]) * scales[at];
                    if (r == 0 && value != w[size_t(o) * in + k]) {
                        std::printf("case %d: weight %d, %d decoded as %g\n", i, o, k, w[size_t(o) * in + k]);
                        return false;
                    }
                    exact += double(value) * x[size_t(r) * in + k];
                }
                error = std::fmax(error, std::fabs(y[size_t(r) * out + o] - exact));
                size = std::fmax(size, std::fabs(exact));
            }
        if (!(error <= 2e-4 * size)) {
            std::printf("case %d: error %g of %g\n", i, error, size);
            return false;
        }
    }
    return true;
}

// Products with two weights in one pass are those of each alone, bit for bit; gated they are silu of one times the other,
// and a row's bits are the same alone.
bool products_together_are_right() {
    for (int i = 0; i < 40; i++) {
        const int in = pick(1, 700), rows = pick(1, i % 4 ? 40 : 200);
        int out[] = {pick(1, 300), pick(1, 300)};
        const bool gated = i % 2;
        if (gated) out[1] = out[0];
        std::vector<float> x(size_t(rows) * in), bias[2], own[2], y[2];
        for (float& value : x) value = std::normal_distribution<float>()(random_source);
        std::vector<uint16_t> packed[2];
        std::vector<weights::Product> products;
        const auto& kernels = weights::TESTED::panels;
        for (int n = 0; n < 2; n++) {
            std::vector<uint16_t> w(size_t(out[n]) * in);
            for (auto& value : w) value = uint16_t(pick(0, 1) << 15 | pick(0x3c00, 0x3f00));
            packed[n].resize(size_t(out[n] + weights::PANEL - 1) / weights::PANEL * weights::PANEL * in);
            bias[n].resize(out[n]), own[n].resize(size_t(rows) * out[n]), y[n].resize(own[n].size());
            for (float& value : bias[n]) value = std::normal_distribution<float>()(random_source);
            kernels.pack(w.data(), out[n], in, in, 2, packed[n].data(), POOL);
            const weights::Panels weight{out[n], in, packed[n].data(), Float::BF16, false};
            const weights::Product alone{weight, n || gated ? bias[n].data() : nullptr, own[n].data()};
            kernels.multiply(&alone, 1, false, x.data(), rows, in, Float::FP32, POOL);
            products.push_back({weight, alone.bias, n && gated ? nullptr : y[n].data()});
        }
        kernels.multiply(products.data(), 2, gated, x.data(), rows, in, Float::FP32, POOL);
        bool right = gated || (y[0] == own[0] && y[1] == own[1]);
        for (size_t j = 0; gated && j < own[0].size(); j++) {
            const double expected = own[0][j] / (1 + std::exp(-double(own[0][j]))) * own[1][j];
            right = right && std::fabs(y[0][j] - expected) <= 1e-5 * (1 + std::fabs(expected));
        }
        for (int r = 0; gated && r < rows; r++) {
            std::vector<float> alone(out[0]);
            products[0].y = alone.data();
            kernels.multiply(products.data(), 2, true, x.data() + size_t(r) * in, 1, in, Float::FP32, POOL);
            right = right && !std::memcmp(alone.data(), y[0].data() + size_t(r) * out[0], out[0] * sizeof(float));
        }
        if (!right) {
            std::printf("case %d: %d rows of %d, %d and %d outputs, gated %d\n", i, rows, in, out[0], out[1], gated);
            return false;
        }
    }
    return true;
}

// Against double, and each row against itself alone, bit for bit. Every other one as pairs, where they can be multiplied.
bool panels_are_right() {
    for (int i = 0; i < 60; i++) {
        const bool pairs = weights::TESTED::panels.pairs && has_bf16() && i % 2;
        const int in = pairs ? 2 * pick(1, 1100) : pick(1, 1100), out = pick(1, 70), rows = pick(1, i % 10 ? 40 : 400), stride = in + pick(0, 5);
        const int panels = (out + weights::PANEL - 1) / weights::PANEL;
        std::vector<uint16_t> w(size_t(out) * in), packed(size_t(panels) * weights::PANEL * in);
        std::vector<float> x(size_t(rows - 1) * stride + in), bias(out), y(size_t(rows) * out), alone(out);
        for (auto& value : w) value = uint16_t(pick(0, 1) << 15 | pick(0x3c00, 0x3fff));  // bf16: 2⁻⁷ … 2
        for (auto* values : {&x, &bias})
            for (float& value : *values) value = float(pick(-255, 255)) / 64;  // bf16 holds it
        const auto& kernels = weights::TESTED::panels;
        const int step = pairs ? 2 : 1;
        kernels.pack(w.data(), out, in / step, in / step, 2 * step, packed.data(), POOL);
        const weights::Panels matrix{out, in, packed.data(), Float::BF16, pairs};
        const weights::Product product{matrix, bias.data(), y.data()};
        kernels.multiply(&product, 1, false, x.data(), rows, stride, Float::FP32, POOL);
        for (int r = 0; r < rows; r++) {
            const weights::Product one{matrix, bias.data(), alone.data()};
            kernels.multiply(&one, 1, false, x.data() + size_t(r) * stride, 1, stride, Float::FP32, POOL);
            for (int o = 0; o < out; o++) {
                double exact = bias[o], size = 1;
                for (int k = 0; k < in; k++) {
                    const uint32_t bits = uint32_t(w[size_t(o) * in + k]) << 16;
                    float value;
                    std::memcpy(&value, &bits, 4);
                    exact += double(value) * x[size_t(r) * stride + k];
                    size += std::fabs(value * x[size_t(r) * stride + k]);
                }
                const float found = y[size_t(r) * out + o];
                if (!(std::fabs(found - exact) <= 1e-6 * size) || std::memcmp(&found, &alone[o], 4)) {
                    std::printf("case %d of %d × %d: row %d of %d, output %d: %g, alone %g, instead of %g\n", i, out, in, r,
                                rows, o, found, alone[o], exact);
                    return false;
                }
            }
        }
    }
    return true;
}

// Against double, and each number against itself alone, bit for bit.
bool activations_are_right() {
    for (int i = 0; i < 60; i++) {
        const int n = pick(1, i % 10 ? 100 : 40000), function = i % 3;
        std::vector<float> x(n), y(n);
        for (float& value : x) value = std::normal_distribution<float>()(random_source) * 3;
        const auto of = [&](const float* from, int count, float* to) {
            weights::TESTED::elementwise.activate(weights::Function(function), from, count, Float::FP32, to, POOL);
        };
        of(x.data(), n, y.data());
        for (int j = 0; j < n; j++) {
            const double v = x[j], u = 0.7978845608 * (v + 0.044715 * v * v * v);
            const double exact = function == 0   ? v / (1 + std::exp(-v))
                                 : function == 1 ? v / 2 * (1 + std::erf(v / std::sqrt(2.0)))
                                                 : v / 2 * (1 + std::tanh(u));
            float alone;
            of(&x[j], 1, &alone);
            if (!(std::fabs(y[j] - exact) <= 2e-6) || std::memcmp(&alone, &y[j], 4)) {
                std::printf("function %d of %g: %g, alone %g, instead of %g\n", function, v, y[j], alone, exact);
                return false;
            }
        }
    }
    return true;
}

}  // namespace

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)

int main() {
    if (!int4_is_right() || !panels_are_right() || !products_together_are_right() || !activations_are_right()) return 1;
    std::printf("%s is right in 220 cases\n", NAME(TESTED));
    return 0;
}
