#include "pyablate/head_flips.h"

#include "pyablate/dispatch.h"
#include "top_two.cuh"

namespace pyablate::cuda {

namespace {

// A magnitude; minus infinity, a class that cannot win, has none.
template <class T>
__device__ inline T magnitude(T x) {
    return x == -infinity<T>() ? T(0) : x < 0 ? -x : x;
}

// One block per image and 256 units. Every warp finds the image's lead for itself (K reads from
// cache); then each thread tests one unit without looking at the classes, and the units that it
// could not settle are scanned by the warps, one after the other.
template <class T>
__global__ void head_flips_kernel(const HeadFlipsParams p) {
    __shared__ std::int32_t open[block_threads];
    __shared__ int open_count;
    const T* __restrict__ weight = static_cast<const T*>(p.weight);  // [U, K]
    const T* __restrict__ low = static_cast<const T*>(p.bounds);     // [3, U]
    const T* __restrict__ high = low + p.units;
    const T* __restrict__ largest = high + p.units;
    const std::int64_t tiles = divide_up(p.units, block_threads);
    const T epsilon = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);
    const int lane = threadIdx.x % warp_threads;

    for (std::int64_t tile = blockIdx.x; tile < p.images * tiles; tile += gridDim.x) {
        const std::int64_t n = tile / tiles;
        const T* __restrict__ logits = static_cast<const T*>(p.logits) + n * p.classes;
        const T* __restrict__ delta = static_cast<const T*>(p.delta) + n * p.units;
        const T tolerance = static_cast<const T*>(p.tolerance)[n];
        const std::int32_t label = p.baseline[n];
        T other = -infinity<T>();
        bool nan = !in_range(label, p.classes);  // then every unit is scanned
        for (std::int64_t k = lane; k < p.classes; k += warp_threads) {
            const T x = logits[k];
            nan = nan || x != x;
            if (k != label) other = larger(other, x);
        }
        other = warp_max(other);
        nan = __any_sync(whole_warp, nan);

        if (threadIdx.x == 0) open_count = 0;
        __syncthreads();
        const std::int64_t u = tile % tiles * block_threads + threadIdx.x;
        if (u < p.units) {
            bool settled = false;
            if (!nan) {
                const T d = delta[u], own = weight[u * p.classes + label];
                const T loss = d * (d > 0 ? own - high[u] : own - low[u]);
                const T scale = larger(magnitude(logits[label]), magnitude(other));
                const T guard = 32 * epsilon * (scale + magnitude(d) * largest[u]);
                settled = (logits[label] - other) + loss > (tolerance < 0 ? 0 : tolerance) + guard;
            }
            if (settled) {
                p.out[n * p.units + u] = label;
            } else {
                open[atomicAdd(&open_count, 1)] = threadIdx.x;
            }
        }
        __syncthreads();
        for (int i = threadIdx.x / warp_threads; i < open_count;
             i += block_threads / warp_threads) {
            const std::int64_t unit = tile % tiles * block_threads + open[i];
            const T d = delta[unit];
            const T* __restrict__ column = weight + unit * p.classes;
            const std::int32_t decision = decide<T>(p.classes, tolerance, [&](std::int64_t k) {
                return changed(logits[k], d * column[k]);
            });
            if (lane == 0) p.out[n * p.units + unit] = decision;
        }
        __syncthreads();
    }
}

}  // namespace

void head_flips(const HeadFlipsParams& p, int device, void* stream) {
    if (p.images == 0 || p.units == 0) return;
    const DeviceGuard guard(device, "head_flips");
    const auto grid =
        static_cast<unsigned>(grid_size(p.images * divide_up(p.units, block_threads), 1));
    dispatch_real("head_flips", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        head_flips_kernel<T><<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    PYABLATE_CHECK_LAUNCH("head_flips");
}

}  // namespace pyablate::cuda
