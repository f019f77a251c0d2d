#include "common.cuh"
#include "pyablate/delta_max_pool.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// One thread per output element in memory order, so that writes are coalesced in both layouts:
// neighbours are channels (channels last) or positions of a row.
template <class D, class B>
__global__ void delta_max_pool_kernel(const DeltaMaxPoolParams p) {
    using T = Compute<D>;
    const B* __restrict__ base = static_cast<const B*>(p.base);    // [N, C, H, W] or [N, H, W, C]
    const D* __restrict__ delta = static_cast<const D*>(p.delta);  // [P, ...] likewise
    D* __restrict__ out = static_cast<D*>(p.out);  // [P, C, Ho, Wo] or [P, Ho, Wo, C]
    const std::int64_t row = p.channels * p.height * p.width;
    const std::int64_t out_row = p.channels * p.out_h * p.out_w;
    for (std::int64_t at = first_thread(); at < p.pairs * out_row; at += all_threads()) {
        const std::int64_t pair = at / out_row, rest = at % out_row;
        std::int64_t c, x, y;
        if (p.channels_last) {
            c = rest % p.channels;
            x = rest / p.channels % p.out_w;
            y = rest / p.channels / p.out_w;
        } else {
            x = rest % p.out_w;
            y = rest / p.out_w % p.out_h;
            c = rest / p.out_w / p.out_h;
        }
        const std::int64_t image = p.image[pair];
        if (!in_range(image, p.images)) {
            out[at] = not_a_number<D>();
            continue;
        }
        // calls f with the offset of each tap inside the map
        const auto taps = [&](auto f) {
            for (std::int64_t i = 0; i < p.kernel_h; ++i) {
                const std::int64_t v = y * p.stride_h - p.padding_h + i * p.dilation_h;
                if (!in_range(v, p.height)) continue;
                for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                    const std::int64_t u = x * p.stride_w - p.padding_w + j * p.dilation_w;
                    if (!in_range(u, p.width)) continue;
                    f(p.channels_last ? (v * p.width + u) * p.channels + c
                                      : (c * p.height + v) * p.width + u);
                }
            }
        };
        const B* from = base + image * row;
        const D* by = delta + pair * row;
        const T scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        T most = -infinity<T>();
        taps([&](std::int64_t tap) {
            const T z = widen(from[tap]);
            most = z > most ? z : most;
        });
        const bool empty = most == -infinity<T>();  // no tap inside the map, or none that could win
        if (empty) most = 0;
        T difference = -infinity<T>();
        bool spoiled = false;
        taps([&](std::int64_t tap) {
            const T moved = (T(widen(from[tap])) - most) + widen(by[tap]) * scale;
            spoiled = spoiled || moved != moved;
            difference = moved > difference ? moved : difference;
        });
        if (empty) difference = 0;
        out[at] = spoiled ? not_a_number<D>() : narrow<D>(change(p.activation, most, difference));
    }
}

}  // namespace

void delta_max_pool(const DeltaMaxPoolParams& p, int device, void* stream) {
    const std::int64_t elements = p.pairs * p.channels * p.out_h * p.out_w;
    if (elements == 0) return;
    const DeviceGuard guard(device, "delta_max_pool");
    const auto grid = static_cast<unsigned>(grid_size(elements, block_threads));
    dispatch_change("delta_max_pool", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        delta_max_pool_kernel<D, B>
            <<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    PYABLATE_CHECK_LAUNCH("delta_max_pool");
}

}  // namespace pyablate::cuda
