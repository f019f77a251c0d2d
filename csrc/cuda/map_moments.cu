#include <cmath>

#include "common.cuh"
#include "pyablate/dispatch.h"
#include "pyablate/map_moments.h"

namespace pyablate::cuda {

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

// Lowers *address to value if that is less, or NaN. The bits of numbers from 0 up order as signed
// integers do and lie above those of all negative ones, which order in reverse as unsigned
// integers; a NaN with its sign set lies beyond them.
template <class T>
__device__ inline void lower(T* address, T value);

template <>
__device__ inline void lower<float>(float* address, float value) {
    if (value >= 0.0f) {
        atomicMin(reinterpret_cast<int*>(address), __float_as_int(value + 0.0f));
    } else {
        const unsigned bits = __float_as_uint(value) | 0x80000000u;
        atomicMax(reinterpret_cast<unsigned*>(address), bits);
    }
}

template <>
__device__ inline void lower<double>(double* address, double value) {
    if (value >= 0.0) {
        atomicMin(reinterpret_cast<long long*>(address), __double_as_longlong(value + 0.0));
    } else {
        const auto bits = static_cast<unsigned long long>(__double_as_longlong(value));
        atomicMax(reinterpret_cast<unsigned long long*>(address), bits | 0x8000000000000000u);
    }
}

// One warp per (image, unit) reads the map once. What several warps add to are whole numbers and a
// minimum, which come out the same in any order.
template <class T>
__global__ void read_maps(const MapMomentsParams p) {
    const std::int64_t maps = p.images * p.units, positions = p.outer * p.inner;
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (std::int64_t m = first_thread() / 32; m < maps; m += all_threads() / 32) {
        const std::int64_t n = m / p.units, c = m % p.units;
        double sum = 0;
        T low = static_cast<T>(INFINITY);
        unsigned long long positive = 0;
        for (std::int64_t i = lane; i < positions; i += 32) {
            const std::int64_t row = (n * p.outer + i / p.inner) * p.units + c;
            const T v = static_cast<const T*>(p.x)[row * p.inner + i % p.inner];
            sum += static_cast<double>(v);
            low = v < low || v != v ? v : low;
            positive += v > T(0);
        }
        for (int step = 16; step > 0; step /= 2) {
            sum += __shfl_down_sync(all_lanes, sum, step);
            const T other = __shfl_down_sync(all_lanes, low, step);
            low = other < low || other != other ? other : low;
            positive += __shfl_down_sync(all_lanes, positive, step);
        }
        if (lane == 0) {
            const double mean = sum / static_cast<double>(positions);
            static_cast<T*>(p.pooled)[c * p.pooled_row + n] = static_cast<T>(mean);
            p.active[c * p.active_row + n] = positive > 0;
            lower(static_cast<T*>(p.least) + c, low);
            atomicAdd(reinterpret_cast<unsigned long long*>(p.positive + c), positive);
        }
    }
}

}  // namespace

void map_moments(const MapMomentsParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "map_moments");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_real("map_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto grid = static_cast<unsigned>(grid_size(p.images * p.units * 32, block_threads));
        read_maps<T><<<grid, block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("map_moments");
    });
}

}  // namespace pyablate::cuda
