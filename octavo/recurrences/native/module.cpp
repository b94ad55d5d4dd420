// The extension module of recurrences: the kernels as Python calls them.
#include "module.h"

#include "recurrences.h"

namespace nb = nanobind;
using namespace octavo;
using recurrences::Kernels;
using recurrences::Rows;
using recurrences::States;
using recurrences::Step;

#define OCTAVO_DECLARE(isa) namespace octavo::recurrences::isa { extern const Kernels kernels; }
OCTAVO_ISAS(OCTAVO_DECLARE)

#define OCTAVO_LIST(isa) &octavo::recurrences::isa::kernels,
static Compiled<Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

template <>
struct octavo::Argument<const Step&> {
    typedef std::tuple<int64_t, uint64_t, uint64_t, int64_t, int64_t> Python;  // sequences, starts, slots, rows, all slots
    static Step take(const Python& x) {
        const auto& [sequences, starts, slots, rows, all] = x;
        const Step step = {sequences, at<const int64_t>(starts), at<const int64_t>(slots)};
        expect(within(step.starts, sequences + 1, 0, rows + 1) && std::is_sorted(step.starts, step.starts + sequences + 1),
               "sequences one after another, of rows that there are");
        expect(within(step.slots, sequences, 0, all), "a slot of states of each sequence");
        return step;
    }
};
template <>
struct octavo::Argument<States> {
    typedef std::tuple<uint64_t, int64_t> Python;  // address, stride of slots
    static States take(const Python& x) { return {at<float>(std::get<0>(x)), std::get<1>(x)}; }
};
template <>
struct octavo::Argument<Rows> {
    typedef std::tuple<uint64_t, int64_t, int64_t> Python;  // address, strides of rows and of heads
    static Rows take(const Python& x) { return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }
};

NB_MODULE(_native, m) {
    m.doc() = "Recurrences and short convolutions for CPUs: see octavo/recurrences/cpu.py, which is the only caller.";
    compiled.define(m);
    compiled.def(m, "convolve", &Kernels::convolve);
    compiled.def(m, "delta_rule", &Kernels::delta_rule);
    compiled.def(m, "scan", &Kernels::scan);
    compiled.def(m, "selective_scan", &Kernels::selective_scan);
}
