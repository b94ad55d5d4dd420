// What Python hands to the kernels of recurrences. All numbers are float32, strides count floats, and what is not given
// a stride is contiguous. A sequence's states are read and written in its own slot.
#pragma once

#include <cstdint>
#include <type_traits>

#include "types.h"

namespace octavo::recurrences {

// Rows of a step: those of sequence i are starts[i] … starts[i + 1] − 1, and its states lie in slot slots[i].
struct Step {
    int64_t sequences;
    const int64_t *starts, *slots;
};

// The states of all slots.
struct States {
    float* first;
    int64_t stride;  // from one slot to the next
};

// Numbers by row and head (or channel).
struct Rows {
    const float* first;
    int64_t row, head;
};

struct Kernels {
    const char* name;
    // y [T, channels]: each channel's convolution over its last `taps` rows, weight [channels, taps], plus bias (or
    // null), and silu of it where asked for. States are the last `kept` rows, [channels, kept].
    void (*convolve)(const Step&, Rows x, int64_t channels, const float* weight, int64_t taps, const float* bias,
                     bool silu, States, int64_t kept, float* y, const Pool&);
    // The gated delta rule, S [k_dim, v_dim] of each of `heads` heads:
    //     S = exp(g) ∘ S;  S += k (beta (v − Sᵀ k))ᵀ;  y = Sᵀ q / √k_dim
    // g has one number for each head, or with `by_channel` one for each of its k_dim rows of S. q and k are those of
    // head / `group`, and are normalized first where asked for. y [T, heads, v_dim].
    void (*delta_rule)(const Step&, Rows q, Rows k, Rows v, Rows g, Rows beta, int64_t heads, int64_t group,
                       int64_t k_dim, int64_t v_dim, bool by_channel, bool normalize, States, float* y, const Pool&);
    // A state-space model with one decay for each head (Mamba-2), S [p_dim, n_dim] of each head, δ = softplus(dt + bias)
    // within limits:
    //     S = exp(δ A) S + δ x Bᵀ;  y = S C + D x
    // B and C are those of head / `group`. y [T, heads, p_dim].
    void (*scan)(const Step&, Rows x, Rows dt, Rows b, Rows c, const float* a, const float* d, const float* bias,
                 bool softplus, float low, float high, int64_t heads, int64_t group, int64_t p_dim, int64_t n_dim,
                 States, float* y, const Pool&);
    // One with a decay for each channel and state (Mamba), S [channels, n_dim], A [channels, n_dim]; a gate z (or null):
    //     S = exp(δ A) ∘ S + δ x B;  y = (S C + D x) silu(z)
    // y [T, channels].
    void (*selective_scan)(const Step&, Rows x, Rows dt, Rows b, Rows c, Rows z, const float* a, const float* d,
                           const float* bias, bool softplus, int64_t channels, int64_t n_dim, States, float* y,
                           const Pool&);
};

}  // namespace octavo::recurrences
