// What all CUDA backends share: errors, the device guard, element types, how blocks lie on tensors,
// access to several numbers at a time.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "pyablate/bfloat16.h"
#include "pyablate/dispatch.h"
#include "pyablate/float16.h"
#include "pyablate/launch.h"
#include "pyablate/math.h"

namespace pyablate::cuda {

inline void check_cuda(cudaError_t status, const char* op, const char* file, int line) {
    if (status == cudaSuccess) return;
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(status) + " (" + file +
                             ":" + std::to_string(line) + ")");
}

// After every launch: a launch that was refused is reported here, with the operation's name.
#define PYABLATE_CHECK_LAUNCH(op) \
    ::pyablate::cuda::check_cuda(cudaGetLastError(), op, __FILE__, __LINE__)

// The tensors' device for the length of one call.
class DeviceGuard {
  public:
    DeviceGuard(int device, const char* op) {
        check_cuda(cudaGetDevice(&previous_), op, __FILE__, __LINE__);
        if (previous_ != device) check_cuda(cudaSetDevice(device), op, __FILE__, __LINE__);
        changed_ = previous_ != device;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

__device__ inline float widen(float x) {
    return x;
}
__device__ inline double widen(double x) {
    return x;
}
__device__ inline float widen(BFloat16 x) {
    return to_float(x);
}
__device__ inline float widen(Float16 x) {
    return to_float(x);
}

template <class D>
__device__ inline D narrow(Compute<D> x) {
    if constexpr (std::is_same_v<D, BFloat16>) {
        return to_bfloat16(x);
    } else if constexpr (std::is_same_v<D, Float16>) {
        return to_float16(x);
    } else {
        return x;
    }
}

// As dispatch_change, for float16 too, which processors do not take.
template <class F>
void dispatch_gpu_change(const char* op, DType delta, DType base, F&& f) {
    if (delta == DType::float16 && base == DType::float32) {
        f(Type<Float16>{}, Type<float>{});
    } else if (delta == DType::float16 && base == DType::float16) {
        f(Type<Float16>{}, Type<Float16>{});
    } else {
        dispatch_change(op, delta, base, f);
    }
}

// A row whose index is out of range is not read; its results are this.
template <class D>
__device__ inline D not_a_number() {
    return narrow<D>(static_cast<Compute<D>>(NAN));
}

template <class T>
__device__ inline T infinity() {
    return static_cast<T>(INFINITY);
}

__device__ inline bool in_range(std::int64_t i, std::int64_t size) {
    return i >= 0 && i < size;
}

// --- blocks on tensors ---------------------------------------------------------------------------

constexpr int block_threads = 256;
constexpr int warp_threads = 32;

// Threads in x, y and z take the columns, rows and planes of something three-dimensional, so that
// none of them divides to find its place. Each axis of a block is the smallest power of two that
// covers what is left of its block_threads.
struct Tiles {
    dim3 grid, block;
};

// Blocks along y or z; where there may not be as many as asked for, the kernel goes on by the grid.
inline unsigned cut_grid(std::int64_t blocks) {
    return static_cast<unsigned>(blocks < 65535 ? blocks : 65535);
}

inline Tiles tiles(std::int64_t columns, std::int64_t rows, std::int64_t planes = 1) {
    const auto cover = [](std::int64_t size, std::int64_t most) {
        std::int64_t threads = 1;
        while (threads < size && threads < most) threads *= 2;
        return threads;
    };
    const std::int64_t x = cover(columns, block_threads), y = cover(rows, block_threads / x);
    const std::int64_t z = cover(planes, std::min<std::int64_t>(block_threads / x / y, 64));
    return {dim3(static_cast<unsigned>(grid_size(columns, x)), cut_grid(divide_up(rows, y)),
                 cut_grid(divide_up(planes, z))),
            dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z))};
}

__device__ inline std::int64_t first_thread() {  // along x, as all_threads
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline std::int64_t all_threads() {
    return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}
__device__ inline std::int64_t first_row() {
    return static_cast<std::int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}
__device__ inline std::int64_t all_rows() {
    return static_cast<std::int64_t>(gridDim.y) * blockDim.y;
}
__device__ inline std::int64_t first_plane() {
    return static_cast<std::int64_t>(blockIdx.z) * blockDim.z + threadIdx.z;
}
__device__ inline std::int64_t all_planes() {
    return static_cast<std::int64_t>(gridDim.z) * blockDim.z;
}

// --- several numbers at a time -------------------------------------------------------------------

constexpr int access = 16;  // bytes that one access moves at most

// How many numbers of a type that is. Kernels for any function, which take more registers, keep to
// `some`.
template <class T>
constexpr int wide = access / static_cast<int>(sizeof(T));
template <class T>
constexpr int some = wide<T> < 4 ? wide<T> : 4;

template <class... Pointers>
bool aligned(Pointers... pointers) {
    return (... && (reinterpret_cast<std::uintptr_t>(pointers) % access == 0));
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
    T at[N];
};

// N neighbours, in as few accesses as they fit; `from` and `to` are aligned for these.
template <int N, class T>
__device__ inline void load(const T* from, T (&values)[N]) {
    constexpr int n = N < wide<T> ? N : wide<T>;
    for (int i = 0; i < N; i += n) {
        const auto pack = *reinterpret_cast<const Pack<T, n>*>(from + i);
        for (int k = 0; k < n; ++k) values[i + k] = pack.at[k];
    }
}

template <int N, class T>
__device__ inline void store(T* to, const T (&values)[N]) {
    if constexpr (N == 1) {
        *to = values[0];
    } else {
        constexpr int n = N < wide<T> ? N : wide<T>;
        using Words = std::conditional_t<n == wide<T>, uint4, uint2>;
        static_assert(sizeof(Words) == n * sizeof(T));
        for (int i = 0; i < N; i += n) {
            Words words;
            std::memcpy(&words, values + i, sizeof words);
            __stwb(reinterpret_cast<Words*>(to + i), words);  // nvcc splits some plain stores
        }
    }
}

// f(std::integral_constant<int, N>): N numbers at a time if that is possible, else one.
template <int N, class F>
void dispatch_width(bool possible, F&& f) {
    if (possible) {
        f(std::integral_constant<int, N>{});
    } else {
        f(std::integral_constant<int, 1>{});
    }
}

// --- elementwise functions -----------------------------------------------------------------------

// What a kernel is for: any function, or one that many networks have, which then needs fewer
// registers than all of them together.
struct AnyActivation {};
template <ActivationKind K>
using OneActivation = std::integral_constant<ActivationKind, K>;

// f(OneActivation<kind>{}), to be called outside of loops
template <class A, class F>
__device__ inline void with_activation(ActivationKind kind, F&& f) {
    if constexpr (std::is_same_v<A, AnyActivation>) {
        dispatch_activation(kind, f);
    } else {
        f(A{});
    }
}

// f(std::integral_constant<int, n>, A{}): the numbers that a thread takes at a time, and the kernel,
// which is one of its own for the functions OWN. Where that is one number, memory is not what a
// kernel waits for, and one kernel does.
template <int N, int OWN_N, ActivationKind... OWN, class F>
void dispatch_width(bool possible, const Activation& activation, F&& f) {
    const auto own = [&](auto kind) {
        const bool found = activation.kind == kind();
        if (found) f(std::integral_constant<int, OWN_N>{}, kind);
        return found;
    };
    if (!possible) {
        f(std::integral_constant<int, 1>{}, AnyActivation{});
    } else if (!(... || own(OneActivation<OWN>{}))) {
        f(std::integral_constant<int, N>{}, AnyActivation{});
    }
}

}  // namespace pyablate::cuda
