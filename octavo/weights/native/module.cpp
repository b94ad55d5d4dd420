// The extension module of 4-bit weights: as attention/native/module.cpp, for these kernels.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "../../attention/native/processor.h"
#include "isas.h"  // written by CMake: OCTAVO_ISAS(X) is X(isa) for each one compiled, best first
#include "kernel.h"

namespace nb = nanobind;
using namespace octavo;
using weights::Matrix;

#define OCTAVO_DECLARE(isa) namespace octavo::weights::isa { extern const Kernels kernels; }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

const weights::Kernels* active = nullptr;
ParallelFor parallel_for = nullptr;

// Those that this processor has, best first.
const std::vector<const weights::Kernels*>& usable() {
    static const std::vector<const weights::Kernels*> all = [] {
        std::vector<const weights::Kernels*> found;
#define OCTAVO_LIST(isa) if (supported(#isa)) found.push_back(&weights::isa::kernels);
        OCTAVO_ISAS(OCTAVO_LIST)
        return found;
    }();
    return all;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const auto* kernels : usable()) names.push_back(kernels->name);
    return names;
}

void use(const std::string& isa) {
    for (const auto* kernels : usable())
        if (kernels->name == isa) {
            active = kernels;
            return;
        }
    throw std::invalid_argument("no kernels for the instruction set " + isa + " here");
}

template <class T>
T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

int32_t sequential(int64_t begin, int64_t end, int64_t, Task task, void* context) {
    task(begin, end, context);
    return 0;
}
Pool pool(int threads) { return {parallel_for ? parallel_for : sequential, threads}; }

void multiply(const Matrix& matrix, uint64_t x, int64_t rows, int64_t stride, int type, uint64_t bias, uint64_t y,
              int threads) {
    active->multiply(matrix, at<const void>(x), rows, stride, Float(type), at<const void>(bias), at<void>(y),
                     pool(threads));
}

void decode(const Matrix& matrix, int64_t first, int64_t count, int type, uint64_t w, int threads) {
    active->decode(matrix, first, count, Float(type), at<void>(w), pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Products with 4-bit weights for CPUs: see octavo/weights/cpu.py, which is the only caller.";
    use(isas().front());
    m.def("isas", &isas, "Instruction sets compiled in and supported by this processor, best first.");
    m.def("isa", [] { return std::string(active->name); }, "The instruction set in use.");
    m.def("use", &use, "Use another instruction set; for tests and benchmarks.");
    m.def("set_parallel_for", [](uint64_t address) { parallel_for = at<int32_t(int64_t, int64_t, int64_t, Task, void*)>(address); });
    nb::class_<Matrix>(m, "Matrix")
        .def("__init__", [](Matrix* self, int64_t out, int64_t in, int group, uint64_t codes, uint64_t scales, int scale,
                            uint64_t zeros) {
            new (self) Matrix{out, in, group, at<const uint8_t>(codes), at<const void>(scales), Float(scale),
                              at<const uint8_t>(zeros)};
        });
    m.def("multiply", &multiply, nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
}
