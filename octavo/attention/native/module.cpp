// The extension module: which instruction sets this processor has, and the kernels as Python calls them.
//
// Tensors arrive as addresses: Python owns them, and has checked their shapes, types and strides. Threads are torch's
// own: the address of its `torch_parallel_for` comes from Python too, so nothing here is compiled against torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "isas.h"  // written by CMake: OCTAVO_ISAS(X) is X(isa) for each one compiled, best first
#include "kernel.h"
#include "processor.h"

namespace nb = nanobind;
using namespace octavo;

#define OCTAVO_DECLARE(isa) namespace octavo::isa { extern const Kernels kernels; }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

struct Compiled {
    std::string isa;
    const Kernels* kernels;
};

// Best first.
const std::vector<Compiled>& compiled() {
#define OCTAVO_LIST(isa) {#isa, &octavo::isa::kernels},
    static const std::vector<Compiled> all = {OCTAVO_ISAS(OCTAVO_LIST)};
    return all;
}

const Kernels* active = nullptr;
ParallelFor parallel_for = nullptr;

int32_t sequential(int64_t begin, int64_t end, int64_t, Task task, void* context) {
    task(begin, end, context);
    return 0;
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const Compiled& c : compiled())
        if (supported(c.isa)) names.push_back(c.isa);
    return names;
}

void use(const std::string& isa) {
    for (const Compiled& c : compiled())
        if (c.isa == isa && supported(isa)) {
            active = c.kernels;
            return;
        }
    throw std::invalid_argument("no kernels for the instruction set " + isa + " here");
}

template <class T>
T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

Side make_side(int code, int heads, int dim, bool is_k, bool rotated, uint64_t codes, uint64_t scales, uint64_t mu,
               uint64_t c, uint64_t reciprocal, uint64_t token_scale, uint64_t token_reciprocal, uint64_t token_limit,
               int64_t head_bytes, uint64_t saturated) {
    return {Code(code), heads, dim, is_k, rotated, at<uint8_t>(codes), at<uint8_t>(scales), at<const float>(mu),
            at<const float>(c), at<const float>(reciprocal), at<const float>(token_scale),
            at<const float>(token_reciprocal), at<const float>(token_limit), head_bytes, at<int64_t>(saturated)};
}

Pool pool(int threads) { return {parallel_for ? parallel_for : sequential, threads}; }

void write_rows(const Side& side, uint64_t x, int type, int64_t token_stride, int64_t head_stride, uint64_t slots,
           int64_t tokens, int threads) {
    active->write(side, {at<const void>(x), Float(type), token_stride, head_stride}, at<const int64_t>(slots), tokens,
                  pool(threads));
}

void decode(const Side& k, const Side& v, const Attention& attention, const Step& step, uint64_t q, int type,
            int64_t token_stride, int64_t head_stride, uint64_t out, int threads) {
    active->decode(k, v, attention, step, {at<const void>(q), Float(type), token_stride, head_stride}, at<void>(out),
                   pool(threads));
}

void read_rows(const Side& side, int head, int heads, uint64_t blocks, int64_t count, int type, uint64_t out,
               int threads) {
    active->read(side, head, heads, at<const int64_t>(blocks), count, Float(type), at<void>(out), pool(threads));
}

int64_t stream(const Side& side, uint64_t blocks, int64_t count, int threads) {
    return active->stream(side, at<const int64_t>(blocks), count, pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Attention on codes for CPUs: see octavo/attention/cpu.py, which is the only caller.";
    use(isas().front());
    m.def("isas", &isas, "Instruction sets compiled in and supported by this processor, best first.");
    m.def("isa", [] { return std::string(active->name); }, "The instruction set in use.");
    m.def("use", &use, "Use another instruction set; for tests and benchmarks.");
    m.def("set_parallel_for", [](uint64_t address) { parallel_for = at<int32_t(int64_t, int64_t, int64_t, Task, void*)>(address); });
    nb::class_<Side>(m, "Side");
    nb::class_<Attention>(m, "Attention")
        .def("__init__", [](Attention* self, int heads, float scale, int64_t window, float softcap, uint64_t sinks) {
            new (self) Attention{heads, scale, window, softcap, at<const float>(sinks)};
        });
    nb::class_<Step>(m, "Step")
        .def("__init__", [](Step* self, int sequences, uint64_t row, uint64_t kv_len, uint64_t table,
                            int64_t table_width) {
            new (self) Step{sequences, at<const int64_t>(row), at<const int64_t>(kv_len), at<const int64_t>(table),
                            table_width};
        });
    m.def("side", &make_side);
    m.def("write", &write_rows, nb::call_guard<nb::gil_scoped_release>());
    m.def("decode", &decode, nb::call_guard<nb::gil_scoped_release>());
    m.def("stream", &stream, nb::call_guard<nb::gil_scoped_release>());
    m.def("read", &read_rows, nb::call_guard<nb::gil_scoped_release>());
}
