#include "common.cuh"
#include "pyablate/delta_mean.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// Channels last: one thread per channel of a pair; its neighbours read neighbouring channels.
// Otherwise one warp per channel of a pair: its lanes read neighbouring positions.
template <class D, class B>
__global__ void delta_mean_kernel(const DeltaMeanParams p) {
    using T = Compute<D>;
    const B* __restrict__ base = static_cast<const B*>(p.base);      // [N, C, M] or [N, M, C]
    const D* __restrict__ delta = static_cast<const D*>(p.delta);    // [P, ...] likewise
    const D* __restrict__ addend = static_cast<const D*>(p.addend);  // [P, ...] or null
    T* __restrict__ out = static_cast<T*>(p.out);                    // [P, C]
    const std::int64_t threads = p.channels_last ? 1 : warp_threads;
    const std::int64_t lane = first_thread() % threads;
    const std::int64_t step = all_threads() / threads;
    const std::int64_t along = p.channels_last ? p.channels : 1;  // from one position to the next
    for (std::int64_t at = first_thread() / threads; at < p.pairs * p.channels; at += step) {
        const std::int64_t pair = at / p.channels, c = at % p.channels;
        const std::int64_t image = p.image[pair];
        const bool valid = in_range(image, p.images);
        const std::int64_t channel = p.channels_last ? c : c * p.positions;
        const std::int64_t row = p.channels * p.positions;
        const T scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        const T addend_scale = p.addend_scale == nullptr ? T(1) : T(p.addend_scale[pair]);
        T sum = 0;
        for (std::int64_t m = lane; valid && m < p.positions; m += threads) {
            const std::int64_t element = channel + m * along;
            T d = widen(delta[pair * row + element]) * scale;
            if (addend != nullptr) d += widen(addend[pair * row + element]) * addend_scale;
            sum += change(p.activation, T(widen(base[image * row + element])), d);
        }
        if (!p.channels_last) {
            for (int other = warp_threads / 2; other > 0; other /= 2) {
                sum += __shfl_down_sync(0xffffffffu, sum, static_cast<unsigned>(other));
            }
        }
        if (lane == 0) out[at] = valid ? sum / T(p.positions) : not_a_number<T>();
    }
}

}  // namespace

void delta_mean(const DeltaMeanParams& p, int device, void* stream) {
    const std::int64_t elements = p.pairs * p.channels;
    if (elements == 0) return;
    const DeviceGuard guard(device, "delta_mean");
    const std::int64_t per_block = p.channels_last ? block_threads : block_threads / warp_threads;
    const auto grid = static_cast<unsigned>(grid_size(elements, per_block));
    dispatch_change("delta_mean", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        delta_mean_kernel<D, B><<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    PYABLATE_CHECK_LAUNCH("delta_mean");
}

}  // namespace pyablate::cuda
