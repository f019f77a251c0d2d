#include "common.cuh"
#include "pyablate/delta_activation.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// One thread per N neighbouring elements of a row of [P, M]; N divides M, so that a single division
// finds the row of all N.
template <class D, class B, int N>
__global__ void delta_activation_kernel(const DeltaActivationParams p) {
    const B* __restrict__ base = static_cast<const B*>(p.base);  // [N, M]
    const D* delta = static_cast<const D*>(p.delta);             // [P, M], may be out
    const D* addend = static_cast<const D*>(p.addend);           // [P, M] or null
    D* out = static_cast<D*>(p.out);                             // [P, M]
    const std::int64_t total = p.pairs * p.width / N;
    for (std::int64_t item = first_thread(); item < total; item += all_threads()) {
        const std::int64_t at = item * N;
        const std::int64_t pair = at / p.width;
        const std::int64_t image = p.image[pair];
        const bool valid = in_range(image, p.images);
        const std::int64_t from = image * p.width + at % p.width;
        using T = Compute<D>;
        const T scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        const T addend_scale = p.addend_scale == nullptr ? T(1) : T(p.addend_scale[pair]);
        for (int i = 0; i < N; ++i) {
            T d = widen(delta[at + i]) * scale;
            if (addend != nullptr) d += widen(addend[at + i]) * addend_scale;
            out[at + i] = valid ? narrow<D>(change(p.activation, T(widen(base[from + i])), d))
                                : not_a_number<D>();
        }
    }
}

template <class D, class B, int N>
void launch(const DeltaActivationParams& p, cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(grid_size(p.pairs * p.width / N, block_threads));
    delta_activation_kernel<D, B, N><<<grid, block_threads, 0, stream>>>(p);
    PYABLATE_CHECK_LAUNCH("delta_activation");
}

}  // namespace

void delta_activation(const DeltaActivationParams& p, int device, void* stream) {
    if (p.pairs * p.width == 0) return;
    const DeviceGuard guard(device, "delta_activation");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_change("delta_activation", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        if (p.width % 4 == 0) {
            launch<D, B, 4>(p, on);
        } else {
            launch<D, B, 1>(p, on);
        }
    });
}

}  // namespace pyablate::cuda
