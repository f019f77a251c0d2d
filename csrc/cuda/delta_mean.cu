#include "pyablate/delta_mean.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// Loads of several positions at a time pay where the function is cheap.
template <ActivationKind K>
constexpr int unrolled = K == ActivationKind::identity || K == ActivationKind::relu ? 4 : 1;

// f(base + d) - f(base) of N neighbours, added to N sums or to one.
template <ActivationKind K, class D, class B, int N>
struct Changes {
    using T = Compute<D>;
    const B* base;    // of the pair's image
    const D* delta;   // of the pair
    const D* addend;  // of the pair, or null
    T scale, addend_scale, a, b;

    __device__ Changes(const DeltaMeanParams& p, std::int64_t pair) {
        const std::int64_t row = p.channels * p.positions, image = p.image[pair];
        base = static_cast<const B*>(p.base) + (in_range(image, p.images) ? image * row : 0);
        delta = static_cast<const D*>(p.delta) + pair * row;
        addend = static_cast<const D*>(p.addend);
        if (addend != nullptr) addend += pair * row;
        scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        addend_scale = p.addend_scale == nullptr ? T(1) : T(p.addend_scale[pair]);
        a = static_cast<T>(p.activation.a);
        b = static_cast<T>(p.activation.b);
    }

    template <int SUMS>  // N or 1
    __device__ void add(std::int64_t at, T (&sums)[SUMS]) const {
        B clean[N] = {};
        D changes[N], more[N] = {};
        if constexpr (K != ActivationKind::identity) load(base + at, clean);
        load(delta + at, changes);
        if (addend != nullptr) load(addend + at, more);
        for (int k = 0; k < N; ++k) {
            T d = widen(changes[k]) * scale;
            if (addend != nullptr) d += widen(more[k]) * addend_scale;
            sums[k % SUMS] += activate_change<K>(T(widen(clean[k])), d, a, b);
        }
    }
};

// Channels last. A block takes some channels of a pair, N of them a thread in x; its threads in y
// share the positions, and add up what they have in shared memory, part [block_threads, N].
template <ActivationKind K, class D, class B, int N>
__device__ inline void average_columns(const DeltaMeanParams& p, Compute<D> share,
                                       Compute<D>* part) {
    using T = Compute<D>;
    T* out = static_cast<T*>(p.out);  // [P, C]
    T* const own = part + (threadIdx.y * blockDim.x + threadIdx.x) * N;
    for (std::int64_t pair = blockIdx.y; pair < p.pairs; pair += gridDim.y) {
        const bool valid = in_range(p.image[pair], p.images);
        const Changes<K, D, B, N> changes(p, pair);
        // from one block of channels to the next, so that all threads come to the barriers
        for (std::int64_t c = N * first_thread(); c - N * threadIdx.x < p.channels;
             c += N * all_threads()) {
            T sums[N] = {};
            if (valid && c < p.channels) {
#pragma unroll unrolled < K>
                for (std::int64_t m = threadIdx.y; m < p.positions; m += blockDim.y) {
                    changes.add(m * p.channels + c, sums);
                }
            }
            for (int k = 0; k < N; ++k) own[k] = sums[k];
            __syncthreads();
            for (unsigned half = blockDim.y / 2; half > 0; half /= 2) {
                if (threadIdx.y < half) {
                    for (int k = 0; k < N; ++k) own[k] += own[half * blockDim.x * N + k];
                }
                __syncthreads();
            }
            if (threadIdx.y == 0 && c < p.channels) {
                for (int k = 0; k < N; ++k) {
                    sums[k] = valid ? own[k] * share : not_a_number<T>();
                }
                store(out + pair * p.channels + c, sums);
            }
            __syncthreads();
        }
    }
}

// Otherwise a warp, the threads in x, takes a channel of a pair, N positions a lane.
template <ActivationKind K, class D, class B, int N>
__device__ inline void average_rows(const DeltaMeanParams& p, Compute<D> share) {
    using T = Compute<D>;
    T* out = static_cast<T*>(p.out);  // [P, C]
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const bool valid = in_range(p.image[pair], p.images);
        const Changes<K, D, B, N> changes(p, pair);
        for (std::int64_t c = first_row(); c < p.channels; c += all_rows()) {
            T sum[1] = {};
            if (valid) {
#pragma unroll unrolled < K>
                for (std::int64_t m = N * threadIdx.x; m < p.positions; m += N * warp_threads) {
                    changes.add(c * p.positions + m, sum);
                }
            }
            for (int other = warp_threads / 2; other > 0; other /= 2) {
                sum[0] += __shfl_down_sync(0xffffffffu, sum[0], static_cast<unsigned>(other));
            }
            if (threadIdx.x == 0) {
                out[pair * p.channels + c] = valid ? sum[0] * share : not_a_number<T>();
            }
        }
    }
}

template <class D, class B, int N, class A>
__global__ void delta_mean_columns(const DeltaMeanParams p, Compute<D> share) {
    __shared__ Compute<D> part[block_threads * N];
    with_activation<A>(p.activation.kind, [&](auto kind) {
        average_columns<decltype(kind)::value, D, B, N>(p, share, part);
    });
}

template <class D, class B, int N, class A>
__global__ void delta_mean_rows(const DeltaMeanParams p, Compute<D> share) {
    with_activation<A>(p.activation.kind,
                       [&](auto kind) { average_rows<decltype(kind)::value, D, B, N>(p, share); });
}

}  // namespace

void delta_mean(const DeltaMeanParams& p, int device, void* stream) {
    if (p.pairs * p.channels == 0) return;
    const DeviceGuard guard(device, "delta_mean");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_gpu_change("delta_mean", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        const std::int64_t along = p.channels_last ? p.channels : p.positions;
        const bool packs =
            aligned(p.base, p.delta, p.addend, p.out) && along % wide<D> == 0 && p.positions > 0;
        using T = Compute<D>;
        const auto share = static_cast<T>(1) / static_cast<T>(p.positions);
        if (p.channels_last) {
            dispatch_width<some<D>, wide<D>, ActivationKind::relu>(
                packs, p.activation, [&](auto n, auto kernel) {
                    const Tiles over = tiles(p.channels / n(), p.positions);
                    const dim3 grid(over.grid.x, cut_grid(p.pairs));
                    delta_mean_columns<D, B, n(), decltype(kernel)>
                        <<<grid, over.block, 0, on>>>(p, share);
                });
        } else {  // an odd layout: of functions other than ReLU there is one kernel for all
            dispatch_width<1, wide<D>, ActivationKind::relu>(
                packs, p.activation, [&](auto n, auto kernel) {
                    const Tiles over = tiles(warp_threads, p.channels, p.pairs);
                    delta_mean_rows<D, B, n(), decltype(kernel)>
                        <<<over.grid, over.block, 0, on>>>(p, share);
                });
        }
    });
    PYABLATE_CHECK_LAUNCH("delta_mean");
}

}  // namespace pyablate::cuda
