// Arithmetic of CUDA launches in 64 bits: plain C++, so that it is tested without a GPU.
#pragma once

#include <cstdint>

#include "pyablate/host_device.h"

namespace pyablate {

constexpr std::int64_t max_grid = 2147483647;  // gridDim.x is at most 2^31 - 1

PYABLATE_HOST_DEVICE constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) {
    return a / b + (a % b != 0);
}

// Blocks for `elements` at `per_block` each. Kernels step by the whole grid, so a grid cut off at
// its limit still covers everything.
constexpr std::int64_t grid_size(std::int64_t elements, std::int64_t per_block) {
    const std::int64_t blocks = divide_up(elements, per_block);
    return blocks < max_grid ? blocks : max_grid;
}

}  // namespace pyablate
