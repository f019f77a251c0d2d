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

// What is known of some entries of a map.
template <class T>
struct Moments {
    double sum = 0;
    T low = infinity<T>();
    unsigned long long positive = 0;

    __device__ void add(T v) {
        sum += static_cast<double>(v);
        low = v < low || v != v ? v : low;
        positive += v > T(0);
    }
    __device__ void merge(double more, T other, unsigned long long above) {
        sum += more;
        low = other < low || other != other ? other : low;
        positive += above;
    }
    // What several maps of a unit add to are whole numbers and a minimum, which come out the same in
    // any order.
    __device__ void write(const MapMomentsParams& p, std::int64_t n, std::int64_t c) const {
        const double mean = sum / static_cast<double>(p.outer * p.inner);
        static_cast<T*>(p.pooled)[c * p.pooled_row + n] = static_cast<T>(mean);
        p.active[c * p.active_row + n] = positive > 0;
        lower(static_cast<T*>(p.least) + c, low);
        atomicAdd(reinterpret_cast<unsigned long long*>(p.positive + c), positive);
    }
};

// Runs of neighbouring entries: a warp, the threads in x, takes a map, N entries a lane.
template <class T, int N>
__global__ void read_rows(const MapMomentsParams p) {
    for (std::int64_t n = first_plane(); n < p.images; n += all_planes()) {
        for (std::int64_t c = first_row(); c < p.units; c += all_rows()) {
            Moments<T> all;
            for (std::int64_t o = 0; o < p.outer; ++o) {
                const T* x =
                    static_cast<const T*>(p.x) + ((n * p.outer + o) * p.units + c) * p.inner;
                for (std::int64_t i = N * threadIdx.x; i < p.inner; i += N * warp_threads) {
                    T values[N];
                    load(x + i, values);
                    for (int k = 0; k < N; ++k) all.add(values[k]);
                }
            }
            for (int step = warp_threads / 2; step > 0; step /= 2) {
                const double sum = __shfl_down_sync(all_lanes, all.sum, step);
                const T low = __shfl_down_sync(all_lanes, all.low, step);
                all.merge(sum, low, __shfl_down_sync(all_lanes, all.positive, step));
            }
            if (threadIdx.x == 0) all.write(p, n, c);
        }
    }
}

// Channels last, inner = 1: a block takes some units of an image, N of them a thread in x; its
// threads in y share the positions.
template <class T, int N>
__global__ void read_columns(const MapMomentsParams p) {
    __shared__ double sums[N * block_threads];
    __shared__ T lows[N * block_threads];
    __shared__ unsigned long long above[N * block_threads];
    const int own = static_cast<int>(N * (threadIdx.y * blockDim.x + threadIdx.x));
    for (std::int64_t n = blockIdx.y; n < p.images; n += gridDim.y) {
        // from one block of units to the next, so that all threads come to the barriers
        for (std::int64_t c = N * first_thread(); c - N * threadIdx.x < p.units;
             c += N * all_threads()) {
            Moments<T> all[N];
            if (c < p.units) {
                for (std::int64_t o = threadIdx.y; o < p.outer; o += blockDim.y) {
                    T values[N];
                    load(static_cast<const T*>(p.x) + (n * p.outer + o) * p.units + c, values);
                    for (int k = 0; k < N; ++k) all[k].add(values[k]);
                }
            }
            for (unsigned half = blockDim.y; half > 0; half /= 2) {
                if (half < blockDim.y && threadIdx.y < half) {
                    const int other = own + static_cast<int>(N * half * blockDim.x);
                    for (int k = 0; k < N; ++k) {
                        all[k].merge(sums[other + k], lows[other + k], above[other + k]);
                    }
                }
                __syncthreads();
                for (int k = 0; k < N; ++k) {
                    sums[own + k] = all[k].sum;
                    lows[own + k] = all[k].low;
                    above[own + k] = all[k].positive;
                }
                __syncthreads();
            }
            if (threadIdx.y == 0 && c < p.units) {
                for (int k = 0; k < N; ++k) all[k].write(p, n, c + k);
            }
        }
    }
}

}  // namespace

void map_moments(const MapMomentsParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "map_moments");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_real("map_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const std::int64_t along = p.inner == 1 ? p.units : p.inner;
        dispatch_width<wide<T>>(aligned(p.x) && along % wide<T> == 0, [&](auto n) {
            if (p.inner == 1) {
                const Tiles over = tiles(p.units / n(), p.outer);
                const dim3 grid(over.grid.x, cut_grid(p.images));
                read_columns<T, n()><<<grid, over.block, 0, on>>>(p);
            } else {
                const Tiles over = tiles(warp_threads, p.units, p.images);
                read_rows<T, n()><<<over.grid, over.block, 0, on>>>(p);
            }
        });
    });
    PYABLATE_CHECK_LAUNCH("map_moments");
}

}  // namespace pyablate::cuda
