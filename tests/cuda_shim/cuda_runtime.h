// Stands in for CUDA's header, so that the .cu files compile as C++ and run on the CPU.
//
// Only what the kernels use is here; a kernel that needs more fails to compile, and the missing
// function is added. A launch, `kernel<<<grid, block, shared, stream>>>(arguments)`, and variables
// in shared memory are no C++: tests/support/cuda_on_cpu.py rewrites them into the calls below.
// Device pointers are host pointers, and a launch is over when it returns.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// --- the runtime --------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;

namespace shim {

inline cudaError_t last_error = cudaSuccess;

// What a real launch would refuse: no threads, too many, or more shared memory than is given
// unasked.
inline bool can_launch(dim3 grid, dim3 block, std::size_t shared) {
    const std::uint64_t count = std::uint64_t{block.x} * block.y * block.z;
    return count > 0 && count <= 1024 && block.z <= 64 && grid.x > 0 && grid.x <= 0x7fffffffu &&
           grid.y > 0 && grid.y <= 0xffffu && grid.z > 0 && grid.z <= 0xffffu &&
           shared <= 48 * 1024;
}

// launch(kernel, grid, block)(arguments)
template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t shared = 0,
            cudaStream_t = nullptr) {
    return [=](P... arguments) {
        if (!can_launch(grid, block, shared)) {
            last_error = cudaErrorInvalidConfiguration;
        } else {
            run_grid(grid, block, shared, [&] { kernel(arguments...); });
        }
    };
}

}  // namespace shim

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = shim::last_error;
    shim::last_error = cudaSuccess;
    return error;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "invalid argument";
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

// --- barriers and warps -------------------------------------------------------------------------

#define SHIM_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SHIM_PLACE) {
    shim::meet_block("__syncthreads", {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SHIM_PLACE) {
    shim::meet_warp("__syncwarp", mask, 0, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_PLACE) {
    const shim::Lanes& lanes = shim::meet_warp("__ballot_sync", mask, predicate != 0, {file, line});
    unsigned votes = 0;
    for (int i = 0; i < warpSize; ++i) votes |= static_cast<unsigned>(lanes.bits[i]) << i;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate, SHIM_PLACE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SHIM_PLACE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}

namespace shim {

// The value of lane `source`. `source` outside the segment of `width` lanes means the own value.
template <class T>
T shuffle(const char* what, unsigned mask, T value, int source, bool inside, Place place) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                  "shuffles move numbers of 4 or 8 bytes");
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const Lanes& lanes = meet_warp(what, mask, bits, place);
    if (!inside) return value;
    if ((lanes.present >> source & 1u) == 0) {
        fail(what, "reads a lane that does not take part", place);
    }
    std::memcpy(&value, &lanes.bits[source], sizeof value);
    return value;
}

// op over the lanes in mask; CUDA knows it for int and unsigned only
template <class T, class F>
T reduce(const char* what, unsigned mask, T value, Place place, F op) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
    const Lanes& lanes = meet_warp(what, mask, static_cast<unsigned>(value), place);
    T result = value;
    for (int i = 0; i < warpSize; ++i) {
        const bool other = i != lane() && (lanes.present >> i & 1u) != 0;
        if (other) result = op(result, static_cast<T>(static_cast<unsigned>(lanes.bits[i])));
    }
    return result;
}

}  // namespace shim

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, SHIM_PLACE) {
    const int from = (shim::lane() & -width) + (source & (width - 1));
    return shim::shuffle("__shfl_sync", mask, value, from, true, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, SHIM_PLACE) {
    const int from = shim::lane() ^ lanes;
    const bool inside = from < (shim::lane() & -width) + width;
    return shim::shuffle("__shfl_xor_sync", mask, value, from, inside, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize, SHIM_PLACE) {
    const int from = shim::lane() - static_cast<int>(by);
    const bool inside = from >= (shim::lane() & -width);
    return shim::shuffle("__shfl_up_sync", mask, value, from, inside, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize, SHIM_PLACE) {
    const int from = shim::lane() + static_cast<int>(by);
    const bool inside = from < (shim::lane() & -width) + width;
    return shim::shuffle("__shfl_down_sync", mask, value, from, inside, {file, line});
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, SHIM_PLACE) {
    const auto add = [](T a, T b) {
        return static_cast<T>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
    };
    return shim::reduce("__reduce_add_sync", mask, value, {file, line}, add);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, SHIM_PLACE) {
    const auto larger = [](T a, T b) { return std::max(a, b); };
    return shim::reduce("__reduce_max_sync", mask, value, {file, line}, larger);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, SHIM_PLACE) {
    const auto smaller = [](T a, T b) { return std::min(a, b); };
    return shim::reduce("__reduce_min_sync", mask, value, {file, line}, smaller);
}

// --- the bits of a number ----------------------------------------------------------------------

namespace shim {
template <class To, class From>
To bits_of(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}
}  // namespace shim

inline int __float_as_int(float value) {
    return shim::bits_of<int>(value);
}
inline unsigned __float_as_uint(float value) {
    return shim::bits_of<unsigned>(value);
}
inline long long __double_as_longlong(double value) {
    return shim::bits_of<long long>(value);
}

// --- several numbers at a time -------------------------------------------------------------------

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

// Stores, with the cache's default.
inline void __stwb(uint2* to, uint2 value) {
    *to = value;
}
inline void __stwb(uint4* to, uint4 value) {
    *to = value;
}

// --- atomics: threads change places only where they wait, so plain reads and writes are whole ----

namespace shim {

template <class T, class... Allowed>
constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
constexpr bool is_atomic_integer = is_one_of<T, int, unsigned, unsigned long long>;

template <class T>
struct Same {  // keeps the second argument out of the deduction
    using type = T;
};

}  // namespace shim

template <class T>
T atomicAdd(T* at, typename shim::Same<T>::type value) {
    static_assert(shim::is_atomic_integer<T> || shim::is_one_of<T, float, double>);
    const T before = *at;
    *at = before + value;
    return before;
}
template <class T>
T atomicMax(T* at, typename shim::Same<T>::type value) {
    static_assert(shim::is_atomic_integer<T> || shim::is_one_of<T, long long>);
    const T before = *at;
    *at = std::max(before, value);
    return before;
}
template <class T>
T atomicMin(T* at, typename shim::Same<T>::type value) {
    static_assert(shim::is_atomic_integer<T> || shim::is_one_of<T, long long>);
    const T before = *at;
    *at = std::min(before, value);
    return before;
}
template <class T>
T atomicExch(T* at, typename shim::Same<T>::type value) {
    static_assert(shim::is_atomic_integer<T> || shim::is_one_of<T, float>);
    const T before = *at;
    *at = value;
    return before;
}
template <class T>
T atomicCAS(T* at, typename shim::Same<T>::type expected, typename shim::Same<T>::type value) {
    static_assert(shim::is_atomic_integer<T>);
    const T before = *at;
    if (before == expected) *at = value;
    return before;
}
