// silu of a register.
#pragma once

#include "simd.h"

namespace octavo::weights::ISA {

constexpr float LOG2E = 1.44269504f;

inline octavo::ISA::f32v sigmoid(octavo::ISA::f32v x) {
    using namespace octavo::ISA;
    const f32v e = exp2(abs(x) * -LOG2E);  // of what is not above 0
    return (x < 0.0f ? e : splat(1.0f)) / (1.0f + e);
}
inline octavo::ISA::f32v silu(octavo::ISA::f32v x) { return x * sigmoid(x); }

}  // namespace octavo::weights::ISA
