// What every extension module has beside its kernels' own functions: a choice of instruction set, and torch's threads.
//
// Tensors arrive as addresses: Python owns them, and has checked their shapes, types and strides. Threads are torch's
// own: the address of its `torch_parallel_for` comes from Python too, so nothing here is compiled against torch.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "isas.h"  // written by CMake: OCTAVO_ISAS(X) is X(isa) for each one compiled, best first
#include "processor.h"
#include "types.h"

namespace octavo {

template <class T>
T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

// The kernels of one part, compiled for several instruction sets.
template <class Kernels>
class Compiled {
public:
    Compiled(std::initializer_list<const Kernels*> best_first) {
        for (const Kernels* kernels : best_first)
            if (supported(kernels->name)) usable.push_back(kernels);
        active = usable.front();
    }
    const Kernels* operator->() const { return active; }
    const Kernels& operator*() const { return *active; }
    Pool pool(int threads) const { return {parallel_for, threads}; }

    void define(nanobind::module_& m) {
        m.def("isas", [this] {
            std::vector<std::string> names;
            for (const Kernels* kernels : usable) names.push_back(kernels->name);
            return names;
        }, "Instruction sets compiled in and supported by this processor, best first.");
        m.def("isa", [this] { return std::string(active->name); }, "The instruction set in use.");
        m.def("use", [this](const std::string& isa) { use(isa); }, "Use another one; for tests and benchmarks.");
        m.def("has_bf16", &has_bf16, "Whether the processor multiplies bf16 numbers.");
        m.def("set_parallel_for", [this](uint64_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); });
    }

private:
    std::vector<const Kernels*> usable;
    const Kernels* active;
    ParallelFor parallel_for = [](int64_t begin, int64_t end, int64_t, Task task, void* context) -> int32_t {
        task(begin, end, context);
        return 0;
    };

    void use(const std::string& isa) {
        for (const Kernels* kernels : usable)
            if (kernels->name == isa) {
                active = kernels;
                return;
            }
        throw std::invalid_argument("no kernels for the instruction set " + isa + " here");
    }
};

}  // namespace octavo
