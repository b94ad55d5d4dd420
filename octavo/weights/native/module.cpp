// The extension module of 4-bit weights: the kernels as Python calls them.
#include "module.h"

#include "kernel.h"

namespace nb = nanobind;
using namespace octavo;
using weights::Matrix;

#define OCTAVO_DECLARE(isa) namespace octavo::weights::isa { extern const Kernels kernels; }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

#define OCTAVO_LIST(isa) &weights::isa::kernels,
Compiled<weights::Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

void multiply(const Matrix& matrix, uint64_t x, int64_t rows, int64_t stride, int type, uint64_t bias, uint64_t y,
              int threads) {
    compiled->multiply(matrix, at<const void>(x), rows, stride, Float(type), at<const void>(bias), at<void>(y),
                       compiled.pool(threads));
}

void decode(const Matrix& matrix, int64_t first, int64_t count, int type, uint64_t w, int threads) {
    compiled->decode(matrix, first, count, Float(type), at<void>(w), compiled.pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Products with 4-bit weights for CPUs: see octavo/weights/cpu.py, which is the only caller.";
    compiled.define(m);
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int64_t out, int64_t in, int group, uint64_t codes, uint64_t scales, int scale,
                            uint64_t zeros) {
            new (self) Matrix{out, in, group, at<const uint8_t>(codes), at<const void>(scales), Float(scale),
                              at<const uint8_t>(zeros)};
        });
    m.def("multiply", &multiply, nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
}
