// The threads of a CUDA block as fibres of one host thread: they run one at a time, in random
// order, and change places only where they wait for one another.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
    unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Those of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace shim {

struct Place {
    const char* file;
    int line;
};

// What the lanes of a warp brought to a meeting.
struct Lanes {
    std::uint32_t present = 0;  // a bit for each lane that took part
    std::array<std::uint64_t, warpSize> bits{};
};

// Runs the kernel for each thread of each block, the blocks one after the other. Throws
// std::runtime_error if threads wait for others that do not come.
void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& kernel);

// Kernels of this project step by the whole grid, so that a grid cut off at its limit covers
// everything. To try that, launches get at most so many blocks as a draw from 1, 2, 7 and 64 says.
extern bool cut_grids;

// Shared memory of the running block: on the heap with its exact size, so that AddressSanitizer
// sees its ends, and filled with a pattern that is no sensible value when the block starts.
void* dynamic_shared_bytes();
void* static_shared_bytes(const char* name, int line, std::size_t bytes);

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(dynamic_shared_bytes());
}
template <class T>
T& static_shared(const char* name, int line) {
    return *static_cast<T*>(static_shared_bytes(name, line, sizeof(T)));
}

// The running thread waits until all threads of its block wait at the same place.
void meet_block(const char* what, Place place);

// The running thread waits until the lanes in `mask` wait at the same place with the same mask;
// lanes that do not exist or have ended are not waited for.
const Lanes& meet_warp(const char* what, std::uint32_t mask, std::uint64_t bits, Place place);

// The running thread's number within its warp.
int lane();

// Ends the launch: run_grid throws. To be called by a running thread.
[[noreturn]] void fail(const char* what, const char* why, Place place);

}  // namespace shim
