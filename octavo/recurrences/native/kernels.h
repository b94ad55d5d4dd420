// What the kernels of one instruction set have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "recurrences.h"
#include "vectors.h"

namespace octavo::recurrences::ISA {

using namespace octavo::ISA;

constexpr int64_t SMALL = 1 << 14;  // elements: fewer are not worth waking a thread for
constexpr int64_t TILE = 32;  // rows whose gates and norms are computed ahead of the states

inline int64_t whole(int64_t n) { return (n + W - 1) / W * W; }  // registers hold so many
inline float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

void convolve(const Step&, Rows x, int64_t channels, const float* weight, int64_t taps, const float* bias, bool silu,
              States, int64_t kept, float* y, const Pool&);
void delta_rule(const Step&, Rows q, Rows k, Rows v, Rows g, Rows beta, int64_t heads, int64_t group, int64_t k_dim,
                int64_t v_dim, bool by_channel, bool normalize, States, float* y, const Pool&);
void scan(const Step&, Rows x, Rows dt, Rows b, Rows c, const float* a, const float* d, const float* bias, bool softplus,
          float low, float high, int64_t heads, int64_t group, int64_t p_dim, int64_t n_dim, States, float* y,
          const Pool&);
void selective_scan(const Step&, Rows x, Rows dt, Rows b, Rows c, Rows z, const float* a, const float* d,
                    const float* bias, bool softplus, int64_t channels, int64_t n_dim, States, float* y, const Pool&);

}  // namespace octavo::recurrences::ISA
