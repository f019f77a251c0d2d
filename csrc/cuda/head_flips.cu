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

// One block per image and tile of units. Every warp finds the image's lead for itself (K reads from
// cache, N at a time); then each thread tests U units without looking at the classes, and the units
// that it could not settle are scanned by the warps, one after the other.
template <class T, int N, int U>
__global__ void head_flips_kernel(const HeadFlipsParams p) {
    constexpr int tile = U * block_threads;
    __shared__ std::int32_t open[tile];
    __shared__ int open_count;
    const T* __restrict__ weight = static_cast<const T*>(p.weight);  // [U, K]
    const T* __restrict__ low = static_cast<const T*>(p.bounds);     // [3, U]
    const T* __restrict__ high = low + p.units;
    const T* __restrict__ largest = high + p.units;
    const T epsilon = sizeof(T) == 4 ? T(1.1920929e-7) : T(2.220446049250313e-16);

    for (std::int64_t n = blockIdx.y; n < p.images; n += gridDim.y) {
        const T* __restrict__ logits = static_cast<const T*>(p.logits) + n * p.classes;
        const T* __restrict__ delta = static_cast<const T*>(p.delta) + n * p.units;
        std::int32_t* __restrict__ out = p.out + n * p.units;
        const T tolerance = static_cast<const T*>(p.tolerance)[n];
        const std::int32_t label = p.baseline[n];
        T other = -infinity<T>();
        bool nan = !in_range(label, p.classes);  // then every unit is scanned
        for (std::int64_t k = N * lane(); k < p.classes; k += N * warp_threads) {
            T x[N];
            load(logits + k, x);
            for (int i = 0; i < N; ++i) {
                nan = nan || x[i] != x[i];
                if (k + i != label) other = larger(other, x[i]);
            }
        }
        other = warp_max(other);
        nan = __any_sync(whole_warp, nan);

        for (std::int64_t first = tile * static_cast<std::int64_t>(blockIdx.x); first < p.units;
             first += tile * static_cast<std::int64_t>(gridDim.x)) {
            if (threadIdx.x == 0) open_count = 0;
            __syncthreads();
            const std::int64_t u = first + U * threadIdx.x;
            if (u < p.units) {
                T d[U], least[U], greatest[U], size[U];
                load(delta + u, d);
                load(low + u, least);
                load(high + u, greatest);
                load(largest + u, size);
                std::int32_t results[U];
                for (int i = 0; i < U; ++i) {
                    bool settled = false;
                    if (!nan) {
                        const T own = weight[(u + i) * p.classes + label];
                        const T loss = d[i] * (d[i] > 0 ? own - greatest[i] : own - least[i]);
                        const T scale = larger(magnitude(logits[label]), magnitude(other));
                        const T guard = 32 * epsilon * (scale + magnitude(d[i]) * size[i]);
                        const T bound = (tolerance < 0 ? 0 : tolerance) + guard;
                        settled = (logits[label] - other) + loss > bound;
                    }
                    results[i] = settled ? label : -1;  // of an open one: written again below
                    if (!settled) {
                        open[atomicAdd(&open_count, 1)] =
                            U * static_cast<std::int32_t>(threadIdx.x) + i;
                    }
                }
                store(out + u, results);
            }
            __syncthreads();
            for (int i = threadIdx.x / warp_threads; i < open_count;
                 i += block_threads / warp_threads) {
                const std::int64_t unit = first + open[i];
                const T d = delta[unit];
                const T* __restrict__ column = weight + unit * p.classes;
                const auto value = [&](std::int64_t k, T(&x)[N]) {
                    T w[N];
                    load(logits + k, x);
                    load(column + k, w);
                    for (int j = 0; j < N; ++j) x[j] = changed(x[j], d * w[j]);
                };
                const std::int32_t decision = decide<T, N>(p.classes, tolerance, value);
                if (lane() == 0) out[unit] = decision;
            }
            __syncthreads();
        }
    }
}

}  // namespace

void head_flips(const HeadFlipsParams& p, int device, void* stream) {
    if (p.images == 0 || p.units == 0) return;
    const DeviceGuard guard(device, "head_flips");
    dispatch_real("head_flips", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const bool classes = aligned(p.logits, p.weight) && p.classes % wide<T> == 0;
        const bool units = aligned(p.delta, p.bounds, p.out) && p.units % 4 == 0;
        dispatch_width<wide<T>>(classes, [&](auto n) {
            dispatch_width<4>(units, [&](auto u) {
                const dim3 grid(static_cast<unsigned>(grid_size(p.units, u() * block_threads)),
                                cut_grid(p.images));
                head_flips_kernel<T, n(), u()>
                    <<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
            });
        });
    });
    PYABLATE_CHECK_LAUNCH("head_flips");
}

}  // namespace pyablate::cuda
