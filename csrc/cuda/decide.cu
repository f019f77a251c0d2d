// head_flips and classify: see the formulas in their headers.
#include <climits>

#include "common.cuh"
#include "pyablate/classify.h"
#include "pyablate/dispatch.h"
#include "pyablate/head_flips.h"

namespace pyablate::cuda {

namespace {

constexpr unsigned whole_warp = 0xffffffffu;

template <class T>
struct Top {
    T best = -infinity<T>();
    T second = -infinity<T>();
    std::int32_t index = INT_MAX;
    bool nan = false;

    __device__ void add(T x, std::int32_t k) {
        nan = nan || x != x;
        if (x > best) {
            second = best;
            best = x;
            index = k;
        } else if (x > second) {
            second = x;
        }
    }

    __device__ void merge(const Top& other) {
        nan = nan || other.nan;
        const bool theirs = other.best > best || (other.best == best && other.index < index);
        const T loser = theirs ? best : other.best;
        const T runner_up = theirs ? other.second : second;
        second = loser > runner_up ? loser : runner_up;
        if (theirs) {
            best = other.best;
            index = other.index;
        }
    }
};

// The decision over value(k), k in [0, classes), by the 32 lanes of a warp: neighbouring lanes take
// neighbouring classes, then the lanes' top twos are merged by halves.
template <class T, class F>
__device__ std::int32_t decide(std::int64_t classes, T limit, F value) {
    Top<T> top;
    for (std::int64_t k = threadIdx.x % warp_threads; k < classes; k += warp_threads) {
        top.add(value(k), static_cast<std::int32_t>(k));
    }
    for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
        Top<T> other;
        other.best = __shfl_xor_sync(whole_warp, top.best, offset);
        other.second = __shfl_xor_sync(whole_warp, top.second, offset);
        other.index = __shfl_xor_sync(whole_warp, top.index, offset);
        other.nan = __shfl_xor_sync(whole_warp, static_cast<int>(top.nan), offset) != 0;
        top.merge(other);
    }
    const bool finite = top.best - top.best == 0;
    if (top.nan || !finite || !(top.best - top.second > limit)) return -1;
    return top.index;
}

// A logit and its change; NaN where the change is not finite.
template <class T>
__device__ inline T changed(T logit, T change) {
    return logit + change + (change - change);
}

// A magnitude; minus infinity, a class that cannot win, has none.
template <class T>
__device__ inline T magnitude(T x) {
    return x == -infinity<T>() ? T(0) : x < 0 ? -x : x;
}

template <class T>
__device__ inline T larger(T a, T b) {
    return b > a ? b : a;
}

template <class T>
__device__ inline T warp_max(T x) {
    for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
        x = larger(x, __shfl_xor_sync(whole_warp, x, offset));
    }
    return x;
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

// One warp per pair.
template <class T>
__global__ void classify_kernel(const ClassifyParams p) {
    const int lane = threadIdx.x % warp_threads;
    const std::int64_t step = all_threads() / warp_threads;
    for (std::int64_t pair = first_thread() / warp_threads; pair < p.pairs; pair += step) {
        const std::int64_t image = p.image[pair];
        if (!in_range(image, p.images)) {
            if (lane == 0) p.out[pair] = -1;
            continue;
        }
        const T* __restrict__ logits = static_cast<const T*>(p.logits) + image * p.classes;
        const T* __restrict__ delta = static_cast<const T*>(p.delta) + pair * p.classes;
        T limit = static_cast<const T*>(p.tolerance)[image];
        if (p.relative != 0) {
            T high = -infinity<T>(), low = -infinity<T>();  // low: of the negated changes
            for (std::int64_t k = lane; k < p.classes; k += warp_threads) {
                high = larger(high, delta[k]);
                low = larger(low, -delta[k]);
            }
            limit = limit + static_cast<T>(p.relative) * (warp_max(high) + warp_max(low));
        }
        const std::int32_t decision = decide<T>(
            p.classes, limit, [&](std::int64_t k) { return changed(logits[k], delta[k]); });
        if (lane == 0) p.out[pair] = decision;
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

void classify(const ClassifyParams& p, int device, void* stream) {
    if (p.pairs == 0) return;
    const DeviceGuard guard(device, "classify");
    const auto grid = static_cast<unsigned>(grid_size(p.pairs, block_threads / warp_threads));
    dispatch_real("classify", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        classify_kernel<T><<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    PYABLATE_CHECK_LAUNCH("classify");
}

}  // namespace pyablate::cuda
