#include "pyablate/unit_delta.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

constexpr int positions = 4;  // neighbouring output positions that share a load of the weights

// A thread takes N output channels of a row of a pair's output, `positions` of the row at a time; its
// neighbours take the next channels and see the same of the map. A tap that sees only zeros is
// skipped.
template <class D, class B, int N, class A>
__global__ void unit_delta_kernel(const UnitDeltaParams p) {
    using T = Compute<D>;
    const std::int64_t map_size = p.out_h * p.out_w * p.outputs;
    const T a = static_cast<T>(p.activation.a), b = static_cast<T>(p.activation.b);
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const std::int64_t image = p.image[pair], column = p.column[pair];
        bool valid = in_range(image, p.images) && in_range(column, p.units);
        const std::int64_t channel = valid ? p.channel[column] : -1;
        const std::int64_t row = p.base != nullptr ? p.base_image[pair] : 0;
        valid = in_range(channel, p.inputs) && (p.base == nullptr || in_range(row, p.base_images));
        const std::int64_t start = image * p.delta_strides[0] + column * p.delta_strides[1];
        const std::int64_t taps = p.kernel_h * p.kernel_w * p.outputs;
        const D* map = static_cast<const D*>(p.delta) + (valid ? start : 0);  // [H, W], strided
        const T* filter =
            static_cast<const T*>(p.weight) + (valid ? channel * taps : 0);  // [kh, kw, O]
        const B* base = static_cast<const B*>(p.base);                       // [Ho, Wo, O]
        if (base != nullptr && valid) base += row * map_size;
        D* out = static_cast<D*>(p.out) + pair * map_size;  // [Ho, Wo, O]
        for (std::int64_t y = first_row(); y < p.out_h; y += all_rows()) {
            for (std::int64_t o = N * first_thread(); o < p.outputs; o += N * all_threads()) {
#pragma unroll 1
                for (std::int64_t x = 0; x < p.out_w; x += positions) {
                    T sum[positions][N] = {};
#pragma unroll 1
                    for (std::int64_t i = 0; valid && i < p.kernel_h; ++i) {
                        const std::int64_t v = y * p.stride_h - p.padding_h + i * p.dilation_h;
                        if (!in_range(v, p.height)) continue;
#pragma unroll 1
                        for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                            const std::int64_t left =
                                x * p.stride_w - p.padding_w + j * p.dilation_w;
                            T value[positions];
                            bool any = false;
                            for (int q = 0; q < positions; ++q) {
                                const std::int64_t u = left + q * p.stride_w;
                                value[q] = T(0);
                                if (x + q < p.out_w && in_range(u, p.width)) {
                                    value[q] = T(widen(
                                        map[v * p.delta_strides[2] + u * p.delta_strides[3]]));
                                }
                                any = any || value[q] != T(0);
                            }
                            if (!any) continue;
                            T w[N];
                            load(filter + (i * p.kernel_w + j) * p.outputs + o, w);
                            for (int q = 0; q < positions; ++q) {
                                for (int k = 0; k < N; ++k) {
                                    sum[q][k] = fma(value[q], w[k], sum[q][k]);
                                }
                            }
                        }
                    }
                    const auto finish = [&](auto kind) {
                        constexpr ActivationKind K = decltype(kind)::value;
                        for (int q = 0; q < positions; ++q) {
                            if (x + q >= p.out_w) continue;
                            const std::int64_t at = (y * p.out_w + x + q) * p.outputs + o;
                            D results[N];
                            B clean[N] = {};
                            if constexpr (K != ActivationKind::identity) {
                                if (valid) load(base + at, clean);
                            }
                            for (int k = 0; k < N; ++k) {
                                const T change =
                                    activate_change<K>(T(widen(clean[k])), sum[q][k], a, b);
                                results[k] = valid ? narrow<D>(change) : not_a_number<D>();
                            }
                            store(out + at, results);
                        }
                    };
                    with_activation<A>(
                        base == nullptr ? ActivationKind::identity : p.activation.kind, finish);
                }
            }
        }
    }
}

}  // namespace

void unit_delta(const UnitDeltaParams& p, int device, void* stream) {
    if (p.pairs * p.out_h * p.out_w * p.outputs == 0) return;
    const DeviceGuard guard(device, "unit_delta");
    Activation function = p.activation;
    if (p.base == nullptr) function.kind = ActivationKind::identity;
    dispatch_gpu_change("unit_delta", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        const bool packs = aligned(p.weight, p.base, p.out) && p.outputs % wide<D> == 0;
        dispatch_width<wide<D>, wide<D>, ActivationKind::relu>(
            packs, function, [&](auto n, auto kernel) {
                const Tiles on = tiles(p.outputs / n(), p.out_h, p.pairs);
                unit_delta_kernel<D, B, n(), decltype(kernel)>
                    <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
            });
    });
    PYABLATE_CHECK_LAUNCH("unit_delta");
}

}  // namespace pyablate::cuda
