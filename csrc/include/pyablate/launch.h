// Arithmetic of CUDA launches in 64 bits: plain C++, so that it is tested without a GPU.
#pragma once

#include <cstdint>

namespace pyablate {

constexpr std::int64_t max_grid = 2147483647;  // gridDim.x is at most 2^31 - 1

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
    return a / b + (a % b != 0);
}

// Blocks for `elements` at `per_block` each. Kernels step by the whole grid, so a grid cut off at
// its limit still covers everything.
constexpr std::int64_t grid_size(std::int64_t elements, std::int64_t per_block) {
    const std::int64_t blocks = divide_up(elements, per_block);
    return blocks < max_grid ? blocks : max_grid;
}

// Threads of a block for rows of `width` elements: a power of two from one warp up to `most`.
constexpr int block_size(std::int64_t width, int most) {
    int threads = 32;
    while (threads < most && threads < width) threads *= 2;
    return threads;
}

}  // namespace pyablate
