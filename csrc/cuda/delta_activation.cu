#include "pyablate/delta_activation.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// Pairs of one image follow each other. A thread takes some of them, so that it reads the clean numbers
// of an image once: in float32 these are half of what goes through the cache otherwise.
constexpr int together = 4;

// N neighbours of each of these pairs at a time: all are read before any is written, since out may be
// delta.
template <ActivationKind K, class D, class B, int N>
__device__ inline void carry(const DeltaActivationParams& p) {
    using T = Compute<D>;
    const T a = static_cast<T>(p.activation.a), b = static_cast<T>(p.activation.b);
    const D* addend = static_cast<const D*>(p.addend);
    for (std::int64_t first = together * first_row(); first < p.pairs;
         first += together * all_rows()) {
        const int pairs = p.pairs - first < together ? static_cast<int>(p.pairs - first) : together;
#pragma unroll 1
        for (std::int64_t i = N * first_thread(); i < p.width; i += N * all_threads()) {
            const std::int64_t at = first * p.width + i;  // [P, M]
            D changes[together][N], more[together][N] = {};
#pragma unroll
            for (int q = 0; q < together; ++q) {
                if (q >= pairs) continue;
                load(static_cast<const D*>(p.delta) + at + q * p.width, changes[q]);
                if (addend != nullptr) load(addend + at + q * p.width, more[q]);
            }
            B clean[N] = {};
            std::int64_t held = -1;  // the image of these
#pragma unroll
            for (int q = 0; q < together; ++q) {
                if (q >= pairs) continue;
                const std::int64_t image = p.image[first + q];
                const bool valid = in_range(image, p.images);
                if (K != ActivationKind::identity && valid && image != held) {
                    load(static_cast<const B*>(p.base) + image * p.width + i, clean);  // [N, M]
                    held = image;
                }
                const T scale = p.scale == nullptr ? T(1) : T(p.scale[first + q]);
                const T addend_scale =
                    p.addend_scale == nullptr ? T(1) : T(p.addend_scale[first + q]);
                D results[N];
                for (int k = 0; k < N; ++k) {
                    T d = widen(changes[q][k]) * scale;
                    if (addend != nullptr) d += widen(more[q][k]) * addend_scale;
                    results[k] = valid ? narrow<D>(activate_change<K>(T(widen(clean[k])), d, a, b))
                                       : not_a_number<D>();
                }
                store(static_cast<D*>(p.out) + at + q * p.width, results);
            }
        }
    }
}

template <class D, class B, int N, class A>
__global__ void delta_activation_kernel(const DeltaActivationParams p) {
    with_activation<A>(p.activation.kind,
                       [&](auto kind) { carry<decltype(kind)::value, D, B, N>(p); });
}

}  // namespace

void delta_activation(const DeltaActivationParams& p, int device, void* stream) {
    if (p.pairs * p.width == 0) return;
    const DeviceGuard guard(device, "delta_activation");
    dispatch_gpu_change("delta_activation", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        const bool packs = aligned(p.base, p.delta, p.addend, p.out) && p.width % wide<D> == 0;
        using K = ActivationKind;
        dispatch_width<some<D>, wide<D>, K::relu, K::hardtanh>(
            packs, p.activation, [&](auto n, auto kernel) {
                const Tiles on = tiles(p.width / n(), divide_up(p.pairs, together));
                delta_activation_kernel<D, B, n(), decltype(kernel)>
                    <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
            });
    });
    PYABLATE_CHECK_LAUNCH("delta_activation");
}

}  // namespace pyablate::cuda
