// What all CUDA backends share: errors, the device guard, element types.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "pyablate/bfloat16.h"
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

template <class D>
__device__ inline D narrow(Compute<D> x) {
    if constexpr (std::is_same_v<D, BFloat16>) {
        return to_bfloat16(x);
    } else {
        return x;
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

__device__ inline std::int64_t first_thread() {
    return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline std::int64_t all_threads() {
    return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

// f(z + d) - f(z). The function is chosen at run time: all threads take the same branch, and the
// memory is slower than the switch. Host too, only since what it calls is.
template <class T>
PYABLATE_HOST_DEVICE inline T change(const Activation& f, T z, T d) {
    return dispatch_activation(f.kind, [&](auto kind) {
        return activate_change<decltype(kind)::value>(z, d, static_cast<T>(f.a),
                                                      static_cast<T>(f.b));
    });
}

constexpr int block_threads = 256;
constexpr int warp_threads = 32;

}  // namespace pyablate::cuda
