// Which of the compiled instruction sets this processor has.
#pragma once

#include <string>

#if defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace octavo {

inline bool supported(const std::string& isa) {
    if (isa == "portable") return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (isa == "avx2") return avx2;
    if (isa == "avxvnni") return avx2 && __builtin_cpu_supports("avxvnni");
    if (isa == "avx512vnni")
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
    if (isa == "neon_dotprod") return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
    if (isa == "neon_i8mm") return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
#elif defined(__aarch64__) && defined(__APPLE__)
    if (isa == "neon_dotprod") return true;
#endif
    return false;
}

}  // namespace octavo
