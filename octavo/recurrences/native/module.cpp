// The extension module of recurrences: the kernels as Python calls them.
#include "module.h"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "recurrences.h"

namespace nb = nanobind;
using namespace octavo;
using recurrences::Rows;
using recurrences::States;
using recurrences::Step;

#define OCTAVO_DECLARE(isa) \
    namespace octavo::recurrences::isa { \
    extern const Kernels kernels; \
    }
OCTAVO_ISAS(OCTAVO_DECLARE)

namespace {

struct Kernels {
    const char* name;
    const recurrences::Kernels& kernels;
};

#define OCTAVO_KERNELS(isa) const Kernels isa = {#isa, recurrences::isa::kernels};
OCTAVO_ISAS(OCTAVO_KERNELS)

#define OCTAVO_LIST(isa) &isa,
Compiled<Kernels> compiled{OCTAVO_ISAS(OCTAVO_LIST)};

typedef std::tuple<int64_t, uint64_t, uint64_t> StepArgs;  // sequences, starts, slots
typedef std::tuple<uint64_t, int64_t> StatesArgs;          // address, stride of slots
typedef std::tuple<uint64_t, int64_t, int64_t> RowsArgs;   // address, strides of rows and of heads

Step step(const StepArgs& x) { return {std::get<0>(x), at<const int64_t>(std::get<1>(x)), at<const int64_t>(std::get<2>(x))}; }
States states(const StatesArgs& x) { return {at<float>(std::get<0>(x)), std::get<1>(x)}; }
Rows rows(const RowsArgs& x) { return {at<const float>(std::get<0>(x)), std::get<1>(x), std::get<2>(x)}; }

void convolve(const StepArgs& s, const RowsArgs& x, int64_t channels, uint64_t weight, int64_t taps, uint64_t bias,
              bool silu, const StatesArgs& state, int64_t kept, uint64_t y, int threads) {
    nb::gil_scoped_release release;
    compiled->kernels.convolve(step(s), rows(x), channels, at<const float>(weight), taps, at<const float>(bias), silu,
                               states(state), kept, at<float>(y), compiled.pool(threads));
}

void delta_rule(const StepArgs& s, const RowsArgs& q, const RowsArgs& k, const RowsArgs& v, const RowsArgs& g,
                const RowsArgs& beta, int64_t heads, int64_t group, int64_t k_dim, int64_t v_dim, bool by_channel,
                bool normalize, const StatesArgs& state, uint64_t y, int threads) {
    nb::gil_scoped_release release;
    compiled->kernels.delta_rule(step(s), rows(q), rows(k), rows(v), rows(g), rows(beta), heads, group, k_dim, v_dim,
                                 by_channel, normalize, states(state), at<float>(y), compiled.pool(threads));
}

void scan(const StepArgs& s, const RowsArgs& x, const RowsArgs& dt, const RowsArgs& b, const RowsArgs& c, uint64_t a,
          uint64_t d, uint64_t bias, bool softplus, float low, float high, int64_t heads, int64_t group, int64_t p_dim,
          int64_t n_dim, const StatesArgs& state, uint64_t y, int threads) {
    nb::gil_scoped_release release;
    compiled->kernels.scan(step(s), rows(x), rows(dt), rows(b), rows(c), at<const float>(a), at<const float>(d),
                           at<const float>(bias), softplus, low, high, heads, group, p_dim, n_dim, states(state),
                           at<float>(y), compiled.pool(threads));
}

void selective_scan(const StepArgs& s, const RowsArgs& x, const RowsArgs& dt, const RowsArgs& b, const RowsArgs& c,
                    const RowsArgs& z, uint64_t a, uint64_t d, uint64_t bias, bool softplus, int64_t channels,
                    int64_t n_dim, const StatesArgs& state, uint64_t y, int threads) {
    nb::gil_scoped_release release;
    compiled->kernels.selective_scan(step(s), rows(x), rows(dt), rows(b), rows(c), rows(z), at<const float>(a),
                                     at<const float>(d), at<const float>(bias), softplus, channels, n_dim, states(state),
                                     at<float>(y), compiled.pool(threads));
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Recurrences and short convolutions for CPUs: see octavo/recurrences/cpu.py, which is the only caller.";
    compiled.define(m);
    m.def("convolve", &convolve);
    m.def("delta_rule", &delta_rule);
    m.def("scan", &scan);
    m.def("selective_scan", &selective_scan);
}
