#include "pyablate/depthwise.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

constexpr int positions = 4;  // neighbouring output positions that share the loads of the filters

// A line of a map as the positions see it, from its column `left` on, which may lie outside.
struct Line {
    std::int64_t left, width, channels;

    template <class D, int N>
    __device__ void read(const D* line, std::int64_t column, D (&values)[N]) const {
        const std::int64_t u = left + column;
        for (int k = 0; k < N; ++k) values[k] = narrow<D>(Compute<D>(0));
        if (in_range(u, width)) load(line + u * channels, values);
    }
};

template <int N, class D, class T>
__device__ inline void add_products(const D (&values)[N], const T (&weights)[N], T (&sum)[N]) {
    for (int k = 0; k < N; ++k) sum[k] = fma(T(widen(values[k])), weights[k], sum[k]);
}

// A thread takes N channels of an output row, `positions` of the row at a time; its neighbours take the
// next channels. With K, filters have K columns, S apart in the input from position to position, and
// each input is read once for all of them; K = 0 is any other filter.
template <class D, int N, int K, int S>
__global__ void depthwise_kernel(const DepthwiseParams p) {
    using T = Compute<D>;
    for (std::int64_t image = first_plane(); image < p.images; image += all_planes()) {
        const std::int64_t map = image * p.height * p.width * p.channels;
        for (std::int64_t y = first_row(); y < p.out_h; y += all_rows()) {
            const std::int64_t start = (image * p.out_h + y) * p.out_w * p.channels;
            for (std::int64_t c = N * first_thread(); c < p.channels; c += N * all_threads()) {
                const D* from = static_cast<const D*>(p.x) + map + c;     // [H, W, C]
                const T* filters = static_cast<const T*>(p.filters) + c;  // [kh, kw, C]
                D* to = static_cast<D*>(p.out) + start + c;               // [Wo, C]
#pragma unroll 1
                for (std::int64_t x = 0; x < p.out_w; x += positions) {
                    const Line line{x * p.stride_w - p.padding_w, p.width, p.channels};
                    T sum[positions][N] = {};
#pragma unroll 1
                    for (std::int64_t i = 0; i < p.kernel_h; ++i) {
                        const std::int64_t v = y * p.stride_h - p.padding_h + i * p.dilation_h;
                        if (!in_range(v, p.height)) continue;
                        const D* row = from + v * p.width * p.channels;
                        const T* taps = filters + i * p.kernel_w * p.channels;
                        T weights[N];
                        if constexpr (K > 0) {
                            D seen[(positions - 1) * S + K][N];
                            for (int u = 0; u < (positions - 1) * S + K; ++u) {
                                line.read(row, u, seen[u]);
                            }
                            for (int j = 0; j < K; ++j) {
                                load(taps + j * p.channels, weights);
                                for (int q = 0; q < positions; ++q) {
                                    add_products(seen[q * S + j], weights, sum[q]);
                                }
                            }
                        } else {
#pragma unroll 1
                            for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                                load(taps + j * p.channels, weights);
                                for (int q = 0; q < positions; ++q) {
                                    D value[N];
                                    line.read(row, q * p.stride_w + j * p.dilation_w, value);
                                    add_products(value, weights, sum[q]);
                                }
                            }
                        }
                    }
                    for (int q = 0; q < positions; ++q) {
                        if (x + q >= p.out_w) continue;
                        D results[N];
                        for (int k = 0; k < N; ++k) results[k] = narrow<D>(sum[q][k]);
                        store(to + (x + q) * p.channels, results);
                    }
                }
            }
        }
    }
}

template <class D, int N, int K, int S>
void launch(const DepthwiseParams& p, void* stream) {
    const Tiles on = tiles(p.channels / N, p.out_h, p.images);
    depthwise_kernel<D, N, K, S><<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
}

// The filters that networks have at strides of 1 and 2 have kernels of their own.
template <class D, int N>
void launch_for_filter(const DepthwiseParams& p, void* stream) {
    const std::int64_t k = p.dilation_w == 1 ? p.kernel_w : 0, s = p.stride_w;
    if (k == 3 && s == 1) return launch<D, N, 3, 1>(p, stream);
    if (k == 3 && s == 2) return launch<D, N, 3, 2>(p, stream);
    if (k == 5 && s == 1) return launch<D, N, 5, 1>(p, stream);
    if (k == 5 && s == 2) return launch<D, N, 5, 2>(p, stream);
    if (k == 7 && s == 1) return launch<D, N, 7, 1>(p, stream);
    launch<D, N, 0, 0>(p, stream);
}

template <class D>
void launch_for_layout(const DepthwiseParams& p, void* stream) {
    if (aligned(p.x, p.filters, p.out) && p.channels % wide<D> == 0) {
        launch_for_filter<D, wide<D>>(p, stream);
    } else {
        launch<D, 1, 0, 0>(p, stream);
    }
}

}  // namespace

void depthwise(const DepthwiseParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "depthwise");
    dispatch_gpu_change("depthwise", p.dtype, p.dtype, [&](auto type, auto) {
        launch_for_layout<typename decltype(type)::type>(p, stream);
    });
    PYABLATE_CHECK_LAUNCH("depthwise");
}

}  // namespace pyablate::cuda
