#include "pyablate/delta_activation.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// A thread takes N neighbours of a pair at a time: all are read before any is written, since out may
// be delta.
template <ActivationKind K, class D, class B, int N>
__device__ inline void carry(const DeltaActivationParams& p) {
    using T = Compute<D>;
    const T a = static_cast<T>(p.activation.a), b = static_cast<T>(p.activation.b);
    for (std::int64_t pair = first_row(); pair < p.pairs; pair += all_rows()) {
        const std::int64_t image = p.image[pair];
        const bool valid = in_range(image, p.images);
        const B* base = static_cast<const B*>(p.base) + (valid ? image * p.width : 0);  // [N, M]
        const D* delta = static_cast<const D*>(p.delta) + pair * p.width;               // [P, M]
        const D* addend = static_cast<const D*>(p.addend);
        if (addend != nullptr) addend += pair * p.width;  // [P, M]
        D* out = static_cast<D*>(p.out) + pair * p.width;
        const T scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        const T addend_scale = p.addend_scale == nullptr ? T(1) : T(p.addend_scale[pair]);
#pragma unroll 1
        for (std::int64_t i = N * first_thread(); i < p.width; i += N * all_threads()) {
            D results[N];
            if (valid) {
                B clean[N] = {};
                D changes[N], more[N] = {};
                if constexpr (K != ActivationKind::identity) load(base + i, clean);
                load(delta + i, changes);
                if (addend != nullptr) load(addend + i, more);
                for (int k = 0; k < N; ++k) {
                    T d = widen(changes[k]) * scale;
                    if (addend != nullptr) d += widen(more[k]) * addend_scale;
                    results[k] = narrow<D>(activate_change<K>(T(widen(clean[k])), d, a, b));
                }
            } else {
                for (int k = 0; k < N; ++k) results[k] = not_a_number<D>();
            }
            store(out + i, results);
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
                const Tiles on = tiles(p.width / n(), p.pairs);
                delta_activation_kernel<D, B, n(), decltype(kernel)>
                    <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
            });
    });
    PYABLATE_CHECK_LAUNCH("delta_activation");
}

}  // namespace pyablate::cuda
