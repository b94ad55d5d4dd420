// The matrix unit of Intel's processors (AMX): eight registers of 16 rows of 64 bytes.
//
//     c [16, 16 floats] += a [16, 16 pairs of bf16] · b [16 pairs, 16]      in one instruction
//
// Sources: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBF16PS.
// With EMULATE_TILES the same is plain C++, for tests on other processors, but for denormals, which the unit takes for 0.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <utility>

#if !defined(EMULATE_TILES) && defined(__AVX512F__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define ASSEMBLE_TILES  // the compiler is new enough that its assembler knows their instructions
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace octavo::ISA {

#if defined(EMULATE_TILES) || defined(ASSEMBLE_TILES)
constexpr bool TILES = true;
#else
constexpr bool TILES = false;  // the functions below are then declared only
#endif
constexpr int TILE_ROWS = 16;

struct Tiles {
    static bool permitted();  // whether the processor has them, and the system lets this process use them
    static void begin();      // call first, on each thread that uses tiles
    static void end();
    template <int I> static void zero();
    template <int I> static void load(const void* from, int64_t stride);  // bytes from row to row
    template <int I> static void save(void* to, int64_t stride);
    template <int C, int A, int B> static void multiply_add();
};

#if defined(EMULATE_TILES)

inline bool Tiles::permitted() { return true; }
inline void Tiles::begin() {}
inline void Tiles::end() {}
template <int I> struct Emulated { static inline thread_local uint32_t tile[TILE_ROWS][16]; };
template <int I> void Tiles::zero() { std::memset(Emulated<I>::tile, 0, sizeof Emulated<I>::tile); }
template <int I> void Tiles::load(const void* from, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) std::memcpy(Emulated<I>::tile[r], static_cast<const char*>(from) + r * stride, 64);
}
template <int I> void Tiles::save(void* to, int64_t stride) {
    for (int r = 0; r < TILE_ROWS; r++) std::memcpy(static_cast<char*>(to) + r * stride, Emulated<I>::tile[r], 64);
}
template <int C, int A, int B> void Tiles::multiply_add() {
    const auto half = [](uint32_t pair, int i) { return std::bit_cast<float>(i ? pair & 0xffff0000 : pair << 16); };
    for (int m = 0; m < TILE_ROWS; m++)
        for (int n = 0; n < 16; n++) {
            float sums[2] = {};
            for (int k = 0; k < 16; k++)
                for (int i = 0; i < 2; i++) sums[i] += half(Emulated<A>::tile[m][k], i) * half(Emulated<B>::tile[k][n], i);
            uint32_t& c = Emulated<C>::tile[m][n];
            c = std::bit_cast<uint32_t>(std::bit_cast<float>(c) + (sums[0] + sums[1]));
        }
}

#elif defined(ASSEMBLE_TILES)

inline bool Tiles::permitted() {
    // Linux is asked to save the tiles of this process's threads: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
    constexpr long REQUEST = 0x1023, DATA = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool there = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1) && (edx >> 24 & 1);
    return there && syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
}
inline void Tiles::begin() {
    const struct {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof shape == 64);
    asm volatile("ldtilecfg %0" ::"m"(shape));
}
inline void Tiles::end() { asm volatile("tilerelease" ::: "memory"); }
template <int I> void Tiles::zero() { asm volatile("tilezero %%tmm%c0" ::"i"(I)); }
template <int I> void Tiles::load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(I) : "memory");
}
template <int I> void Tiles::save(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(I) : "memory");
}
template <int C, int A, int B> void Tiles::multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// Whether there are tiles, and a product of small numbers is right: a unit that was never tried is not trusted. Not to be
// called between begin and end.
inline bool tiles_are_right() {
    if constexpr (TILES) {
        uint16_t a[TILE_ROWS][32], b[16][32];
        float c[TILE_ROWS][16];
        const auto left = [](int m, int k) { return (7 * m + 3 * k) % 11 - 5; };
        const auto right = [](int k, int n) { return (5 * k + 2 * n) % 13 - 6; };
        const auto bf16 = [](int value) { return uint16_t(std::bit_cast<uint32_t>(float(value)) >> 16); };
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 32; j++) {
                a[i][j] = bf16(left(i, j));
                b[i][j] = bf16(right(2 * i + j % 2, j / 2));
            }
        const auto by = [&]<int C, int A, int B>(std::integer_sequence<int, C, A, B>) {
            Tiles::begin();
            Tiles::zero<C>();
            Tiles::load<A>(a, sizeof a[0]);
            Tiles::load<B>(b, sizeof b[0]);
            Tiles::multiply_add<C, A, B>();
            Tiles::multiply_add<C, A, B>();
            Tiles::save<C>(c, sizeof c[0]);
            Tiles::end();
            for (int m = 0; m < TILE_ROWS; m++)
                for (int n = 0; n < 16; n++) {
                    int exact = 0;
                    for (int k = 0; k < 32; k++) exact += left(m, k) * right(k, n);
                    if (c[m][n] != float(2 * exact)) return false;
                }
            return true;
        };
        return Tiles::permitted() && by(std::integer_sequence<int, 0, 4, 6>()) && by(std::integer_sequence<int, 1, 4, 7>()) &&
               by(std::integer_sequence<int, 2, 5, 6>()) && by(std::integer_sequence<int, 3, 5, 7>());
    }
    return false;
}

inline bool has_tiles() {
    static const bool found = TILES && tiles_are_right();
    return found;
}

}  // namespace octavo::ISA
