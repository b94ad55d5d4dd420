// Memory of a thread, kept from call to call and cut anew by each.
#pragma once

#include <cstdint>
#include <memory>

namespace octavo::ISA {

class Scratch {
public:
    // Forget what was taken; `count` floats can be taken now, from here on.
    float* reset(int64_t count) {
        if (count > size) {
            memory.reset(new float[count + LINE]);
            size = count;
        }
        next = memory.get();
        return next += -(reinterpret_cast<uintptr_t>(next) / sizeof(float)) % LINE;
    }
    // The next `count`, a multiple of 16, at the start of a line of the cache.
    float* take(int64_t count) {
        float* taken = next;
        next += count;
        return taken;
    }

private:
    static constexpr int LINE = 16;
    std::unique_ptr<float[]> memory;
    int64_t size = 0;
    float* next = nullptr;
};

}  // namespace octavo::ISA
