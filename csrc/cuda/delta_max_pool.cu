#include "pyablate/delta_max_pool.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// A thread goes along a row of a pair's output. Channels last: it takes N channels, all positions of
// the row; its neighbours take the next channels. Otherwise one position of the row, all channels;
// its neighbours take the next positions.
template <class D, class B, int N, class A>
__global__ void delta_max_pool_kernel(const DeltaMaxPoolParams p) {
    using T = Compute<D>;
    // from one channel, column and row of a map to the next
    const std::int64_t step_c = p.channels_last ? 1 : p.height * p.width;
    const std::int64_t step_x = p.channels_last ? p.channels : 1;
    const std::int64_t step_y = step_x * p.width;
    const std::int64_t out_c = p.channels_last ? 1 : p.out_h * p.out_w;
    const std::int64_t out_y = step_x * p.out_w;
    const std::int64_t columns = p.channels_last ? p.channels : p.out_w;
    const std::int64_t length = p.channels_last ? p.out_w : p.channels;
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const std::int64_t image = p.image[pair], map = p.channels * p.height * p.width;
        const bool valid = in_range(image, p.images);
        const B* base = static_cast<const B*>(p.base) + (valid ? image * map : 0);  // [N, ...]
        const D* delta = static_cast<const D*>(p.delta) + pair * map;               // [P, ...]
        D* out = static_cast<D*>(p.out) + pair * p.channels * p.out_h * p.out_w;
        const T scale = p.scale == nullptr ? T(1) : T(p.scale[pair]);
        for (std::int64_t y = first_row(); y < p.out_h; y += all_rows()) {
            for (std::int64_t column = N * first_thread(); column < columns;
                 column += N * all_threads()) {
#pragma unroll 1
                for (std::int64_t i = 0; i < length; ++i) {
                    const std::int64_t c = p.channels_last ? column : i;
                    const std::int64_t x = p.channels_last ? i : column;
                    const std::int64_t left = x * p.stride_w - p.padding_w;
                    // calls f with the offset of each tap inside the map
                    const auto taps = [&](auto f) {
#pragma unroll 1
                        for (std::int64_t h = 0; h < p.kernel_h; ++h) {
                            const std::int64_t v = y * p.stride_h - p.padding_h + h * p.dilation_h;
                            if (!in_range(v, p.height)) continue;
#pragma unroll 1
                            for (std::int64_t w = 0; w < p.kernel_w; ++w) {
                                const std::int64_t u = left + w * p.dilation_w;
                                if (!in_range(u, p.width)) continue;
                                f(v * step_y + u * step_x + c * step_c);
                            }
                        }
                    };
                    T most[N], difference[N];
                    for (int k = 0; k < N; ++k) most[k] = difference[k] = -infinity<T>();
                    if (valid) {
                        taps([&](std::int64_t tap) {
                            B z[N];
                            load(base + tap, z);
                            for (int k = 0; k < N; ++k) {
                                most[k] = T(widen(z[k])) > most[k] ? T(widen(z[k])) : most[k];
                            }
                        });
                    }
                    unsigned empty = 0;  // channels without a tap inside the map that could win
                    for (int k = 0; k < N; ++k) {
                        if (most[k] == -infinity<T>()) {
                            empty |= 1u << k;
                            most[k] = 0;
                        }
                    }
                    if (valid) {
                        taps([&](std::int64_t tap) {
                            B z[N];
                            D d[N];
                            load(base + tap, z);
                            load(delta + tap, d);
                            for (int k = 0; k < N; ++k) {
                                const T moved = (T(widen(z[k])) - most[k]) + widen(d[k]) * scale;
                                const bool wins = moved > difference[k] || moved != moved;
                                difference[k] = wins ? moved : difference[k];  // NaN stays
                            }
                        });
                    }
                    D results[N];
                    with_activation<A>(p.activation.kind, [&](auto kind) {
                        for (int k = 0; k < N; ++k) {
                            const bool spoiled = !valid || difference[k] != difference[k];
                            const T d = (empty >> k & 1u) != 0 ? T(0) : difference[k];
                            const T change = activate_change<decltype(kind)::value>(
                                most[k], d, static_cast<T>(p.activation.a),
                                static_cast<T>(p.activation.b));
                            results[k] = spoiled ? not_a_number<D>() : narrow<D>(change);
                        }
                    });
                    store(out + y * out_y + x * step_x + c * out_c, results);
                }
            }
        }
    }
}

}  // namespace

void delta_max_pool(const DeltaMaxPoolParams& p, int device, void* stream) {
    if (p.pairs * p.channels * p.out_h * p.out_w == 0) return;
    const DeviceGuard guard(device, "delta_max_pool");
    dispatch_gpu_change("delta_max_pool", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        const bool packs =
            p.channels_last && aligned(p.base, p.delta, p.out) && p.channels % wide<D> == 0;
        dispatch_width<wide<D>, wide<D>, ActivationKind::relu>(
            packs, p.activation, [&](auto n, auto kernel) {
                const std::int64_t columns = p.channels_last ? p.channels / n() : p.out_w;
                const Tiles on = tiles(columns, p.out_h, p.pairs);
                delta_max_pool_kernel<D, B, n(), decltype(kernel)>
                    <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
            });
    });
    PYABLATE_CHECK_LAUNCH("delta_max_pool");
}

}  // namespace pyablate::cuda
