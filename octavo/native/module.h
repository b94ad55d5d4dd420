// What every extension module has beside its kernels' own functions: a choice of instruction set, and torch's threads.
//
// Tensors arrive as addresses: Python owns them, and checks their types and shapes (cpu.py of each part). Numbers in them
// that say where something lies may differ each time a call is repeated (engine/tapes.py): they are checked here. Threads
// are torch's own: the address of its `torch_parallel_for` comes from Python too, so nothing here is compiled against
// torch. Numbers that stand for names are given to Python, which has no copies of them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "isas.h"  // written by CMake: OCTAVO_ISAS(X) is X(isa) for each one compiled, best first
#include "processor.h"
#include "types.h"

namespace octavo {

template <class T>
T* at(uint64_t address) { return reinterpret_cast<T*>(address); }

// Where a kernel would read or write beyond a tensor: a ValueError in Python.
inline void expect(bool right, const char* what) {
    if (!right) throw std::invalid_argument(std::string("the native kernels expect ") + what);
}
inline bool within(const int64_t* numbers, int64_t count, int64_t least, int64_t end) {
    return std::all_of(numbers, numbers + count, [=](int64_t x) { return x >= least && x < end; });
}

// The numbers of names, as a dictionary.
template <class Enum>
nanobind::dict numbers(std::initializer_list<std::pair<const char*, Enum>> names) {
    nanobind::dict found;
    for (const auto& [name, value] : names) found[name] = int(value);
    return found;
}

inline ParallelFor parallel_for = [](int64_t begin, int64_t end, int64_t, Task task, void* context) -> int32_t {
    task(begin, end, context);
    return 0;
};

// What Python gives for an argument of a kernel: an address for a pointer, a number for a type, threads for a pool.
template <class T>
struct Argument {
    typedef T Python;
    static T take(T x) { return x; }
};
template <class T>
struct Argument<T*> {
    typedef uint64_t Python;
    static T* take(uint64_t address) { return at<T>(address); }
};
template <class T>
    requires std::is_enum_v<T>
struct Argument<T> {
    typedef int Python;
    static T take(int number) { return T(number); }
};
template <>
struct Argument<const Pool&> {
    typedef int Python;
    static Pool take(int threads) { return {parallel_for, threads}; }
};

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

    // A kernel of the instruction set in use, as Python calls it.
    template <class Table, class R, class... Args>
    void def(nanobind::module_& m, const char* name, R (*Table::*kernel)(Args...)) {
        m.def(name, [this, kernel](typename Argument<Args>::Python... args) -> R {
            return (active->*kernel)(Argument<Args>::take(args)...);
        }, nanobind::call_guard<nanobind::gil_scoped_release>());
    }

    void define(nanobind::module_& m) {
        nanobind::set_leak_warnings(false);  // a command ends without looking for garbage (cli/__init__.py)
        m.def("isas", [this] {
            std::vector<std::string> names;
            for (const Kernels* kernels : usable) names.push_back(kernels->name);
            return names;
        }, "Instruction sets compiled in and supported by this processor, best first.");
        m.def("isa", [this] { return std::string(active->name); }, "The instruction set in use.");
        m.def("use", [this](const std::string& isa) { use(isa); }, "Use another one; for tests and benchmarks.");
        m.def("has_bf16", &has_bf16, "Whether the processor multiplies bf16 numbers.");
        m.def("set_parallel_for", [](uint64_t address) { parallel_for = reinterpret_cast<ParallelFor>(address); });
        m.attr("FLOATS") =
            numbers<Float>({{"bfloat16", Float::BF16}, {"float16", Float::FP16}, {"float32", Float::FP32}});
    }

private:
    std::vector<const Kernels*> usable;
    const Kernels* active;

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
