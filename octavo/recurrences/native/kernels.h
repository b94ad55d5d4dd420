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

std::remove_pointer_t<decltype(Kernels::convolve)> convolve;
std::remove_pointer_t<decltype(Kernels::delta_rule)> delta_rule;
std::remove_pointer_t<decltype(Kernels::scan)> scan;
std::remove_pointer_t<decltype(Kernels::selective_scan)> selective_scan;

}  // namespace octavo::recurrences::ISA
