// The products of one instruction set against plain arithmetic, on random weights of awkward shapes. Compiled by
// test_native_build.py, with sanitizers and for other processors. Memory is allocated to the byte.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernel.h"

namespace octavo::weights::TESTED { extern const Kernels kernels; }

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

}  // namespace

int main() {
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
        const auto& kernels = weights::TESTED::kernels;
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
                        return 1;
                    }
                    exact += double(value) * x[size_t(r) * in + k];
                }
                error = std::fmax(error, std::fabs(y[size_t(r) * out + o] - exact));
                size = std::fmax(size, std::fabs(exact));
            }
        if (!(error <= 2e-4 * size)) {
            std::printf("case %d: error %g of %g\n", i, error, size);
            return 1;
        }
    }
    std::printf("%s is right in 60 cases\n", weights::TESTED::kernels.name);
    return 0;
}
