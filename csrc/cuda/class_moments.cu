#include <cmath>

#include "common.cuh"
#include "pyablate/class_moments.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

constexpr unsigned all_lanes = 0xffffffffu;

// Lowers *address to value if that is less. The bits of numbers from 0 up order as signed integers
// do and lie above those of all negative ones, which order in reverse as unsigned integers.
template <class T>
__device__ inline void lower(T* address, T value);

template <>
__device__ inline void lower<float>(float* address, float value) {
    if (value >= 0.0f) {
        atomicMin(reinterpret_cast<int*>(address), __float_as_int(value + 0.0f));
    } else {
        atomicMax(reinterpret_cast<unsigned*>(address), __float_as_uint(value));
    }
}

template <>
__device__ inline void lower<double>(double* address, double value) {
    if (value >= 0.0) {
        atomicMin(reinterpret_cast<long long*>(address), __double_as_longlong(value + 0.0));
    } else {
        atomicMax(reinterpret_cast<unsigned long long*>(address),
                  static_cast<unsigned long long>(__double_as_longlong(value)));
    }
}

// One warp per (image, unit) reads the map once. What several warps add to are whole numbers and a
// minimum, which come out the same in any order.
template <class T>
__global__ void read_maps(const ClassMomentsParams p) {
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
            low = v < low ? v : low;
            positive += v > T(0);
        }
        for (int step = 16; step > 0; step /= 2) {
            sum += __shfl_down_sync(all_lanes, sum, step);
            const T other = __shfl_down_sync(all_lanes, low, step);
            low = other < low ? other : low;
            positive += __shfl_down_sync(all_lanes, positive, step);
        }
        if (lane == 0) {
            static_cast<T*>(p.pooled)[m] = static_cast<T>(sum / static_cast<double>(positions));
            lower(static_cast<T*>(p.least) + c, low);
            using Counter = unsigned long long;
            atomicAdd(reinterpret_cast<Counter*>(p.positive + c), positive);
            if (positive > 0 && in_range(p.label[n], p.classes)) {
                atomicAdd(reinterpret_cast<Counter*>(p.active + c * p.classes + p.label[n]), 1ull);
            }
        }
    }
}

// One thread per unit: adds up its pooled activations in the order of the images, for the same
// bytes on every run. pooled is [N, units], so neighbouring threads read neighbouring entries.
template <class T>
__global__ void add_up(const ClassMomentsParams p) {
    for (std::int64_t c = first_thread(); c < p.units; c += all_threads()) {
        for (std::int64_t n = 0; n < p.images; ++n) {
            if (!in_range(p.label[n], p.classes)) continue;
            const double v = static_cast<double>(static_cast<const T*>(p.pooled)[n * p.units + c]);
            const std::int64_t cell = c * p.classes + p.label[n];
            p.total[cell] += v;
            p.square[cell] += v * v;
            p.maximum[cell] = v > p.maximum[cell] ? v : p.maximum[cell];
        }
    }
}

template <class T>
__global__ void clear(const ClassMomentsParams p) {
    for (std::int64_t i = first_thread(); i < p.units * p.classes; i += all_threads()) {
        p.total[i] = p.square[i] = 0;
        p.maximum[i] = -INFINITY;
        p.active[i] = 0;
        if (i < p.units) {
            static_cast<T*>(p.least)[i] = static_cast<T>(INFINITY);
            p.positive[i] = 0;
        }
    }
}

}  // namespace

void class_moments(const ClassMomentsParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "class_moments");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_real("class_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto blocks = [](std::int64_t threads) {
            return static_cast<unsigned>(grid_size(threads, block_threads));
        };
        clear<T><<<blocks(p.units * p.classes), block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("class_moments");
        read_maps<T><<<blocks(p.images * p.units * 32), block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("class_moments");
        add_up<T><<<blocks(p.units), block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("class_moments");
    });
}

}  // namespace pyablate::cuda
