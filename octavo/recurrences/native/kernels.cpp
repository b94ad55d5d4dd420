#include "kernels.h"

namespace octavo::recurrences::ISA {

extern const Kernels kernels;
const Kernels kernels = {ISA_NAME, convolve, delta_rule, scan, selective_scan};

}  // namespace octavo::recurrences::ISA
