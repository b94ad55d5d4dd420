// What the kernels of every part are given beside their own structs.
#pragma once

#include <cstdint>

namespace octavo {

enum class Float : int { BF16, FP16, FP32 };

typedef void (*Task)(int64_t begin, int64_t end, void* context);
typedef int32_t (*ParallelFor)(int64_t begin, int64_t end, int64_t grain, Task task, void* context);

struct Pool {  // torch's own threads
    ParallelFor parallel_for;
    int threads;
};

}  // namespace octavo
