#include "common.cuh"
#include "pyablate/dispatch.h"
#include "pyablate/unit_delta.h"

namespace pyablate::cuda {

namespace {

constexpr int positions = 4;  // neighbouring output positions that share a load of the weights

// One warp per pair, `positions` neighbours of an output row and 32 output channels, one per lane:
// the weights of a tap and the results are read and written coalesced, the map's values are the
// same for all lanes. A tap that sees only zeros is skipped by the whole warp.
template <class D, class B>
__global__ void unit_delta_kernel(const UnitDeltaParams p) {
    using T = Compute<D>;
    const D* __restrict__ delta = static_cast<const D*>(p.delta);    // [N, U, H, W], strided
    const T* __restrict__ weight = static_cast<const T*>(p.weight);  // [I, kh, kw, O]
    const B* __restrict__ base = static_cast<const B*>(p.base);      // [N', Ho, Wo, O] or null
    D* __restrict__ out = static_cast<D*>(p.out);                    // [P, Ho, Wo, O]
    const std::int64_t lane = threadIdx.x % warp_threads;
    const std::int64_t blocks_o = divide_up(p.outputs, warp_threads);
    const std::int64_t blocks_x = divide_up(p.out_w, positions);
    const std::int64_t warps = p.pairs * p.out_h * blocks_x * blocks_o;
    const std::int64_t step = all_threads() / warp_threads;
    for (std::int64_t warp = first_thread() / warp_threads; warp < warps; warp += step) {
        std::int64_t rest = warp;
        const std::int64_t o = rest % blocks_o * warp_threads + lane;
        rest /= blocks_o;
        const std::int64_t x = rest % blocks_x * positions;
        rest /= blocks_x;
        const std::int64_t y = rest % p.out_h;
        const std::int64_t pair = rest / p.out_h;
        const std::int64_t image = p.image[pair], column = p.column[pair];
        bool valid = in_range(image, p.images) && in_range(column, p.units);
        const std::int64_t channel = valid ? p.channel[column] : -1;
        const std::int64_t row = base != nullptr ? p.base_image[pair] : 0;
        valid = in_range(channel, p.inputs) && (base == nullptr || in_range(row, p.base_images));

        T sum[positions] = {};
        if (valid && o < p.outputs) {
            const D* map = delta + image * p.delta_strides[0] + column * p.delta_strides[1];
            const T* filter = weight + channel * p.kernel_h * p.kernel_w * p.outputs + o;
            for (std::int64_t i = 0; i < p.kernel_h; ++i) {
                const std::int64_t v = y * p.stride_h - p.padding_h + i * p.dilation_h;
                if (!in_range(v, p.height)) continue;
                for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                    T value[positions];
                    bool any = false;
                    for (int b = 0; b < positions; ++b) {
                        const std::int64_t u =
                            (x + b) * p.stride_w - p.padding_w + j * p.dilation_w;
                        value[b] =
                            x + b < p.out_w && in_range(u, p.width)
                                ? T(widen(map[v * p.delta_strides[2] + u * p.delta_strides[3]]))
                                : T(0);
                        any = any || value[b] != T(0);
                    }
                    if (!any) continue;
                    const T w = filter[(i * p.kernel_w + j) * p.outputs];
                    for (int b = 0; b < positions; ++b) sum[b] = fma(value[b], w, sum[b]);
                }
            }
        }
        for (int b = 0; b < positions; ++b) {
            if (o >= p.outputs || x + b >= p.out_w) continue;
            const std::int64_t at = (y * p.out_w + x + b) * p.outputs + o;
            const std::int64_t map_size = p.out_h * p.out_w * p.outputs;
            if (base != nullptr && valid) {
                sum[b] = change(p.activation, T(widen(base[row * map_size + at])), sum[b]);
            }
            out[pair * map_size + at] = valid ? narrow<D>(sum[b]) : not_a_number<D>();
        }
    }
}

}  // namespace

void unit_delta(const UnitDeltaParams& p, int device, void* stream) {
    const std::int64_t warps =
        p.pairs * p.out_h * divide_up(p.out_w, positions) * divide_up(p.outputs, warp_threads);
    if (warps == 0) return;
    const DeviceGuard guard(device, "unit_delta");
    const auto grid = static_cast<unsigned>(grid_size(warps, block_threads / warp_threads));
    dispatch_change("unit_delta", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        unit_delta_kernel<D, B><<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
    });
    PYABLATE_CHECK_LAUNCH("unit_delta");
}

}  // namespace pyablate::cuda
