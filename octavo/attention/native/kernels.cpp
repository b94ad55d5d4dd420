// The kernels of one instruction set (see CMakeLists.txt and simd.h); nothing of them is called before module.cpp has
// looked at the processor.
#include "kernel.h"

namespace octavo::ISA {

std::remove_pointer_t<decltype(Kernels::write)> write;
std::remove_pointer_t<decltype(Kernels::attend)> attend;
std::remove_pointer_t<decltype(Kernels::stream)> stream;

extern const Kernels kernels;
const Kernels kernels = {ISA_NAME, write, attend, stream};

}  // namespace octavo::ISA
