// Each channel through its own filter: a depthwise convolution in float64.
//
//   out[n, y, x, c] = sum over i, j of x[n, y * stride + i * dilation - padding, ..., c] * filters[i, j, c]
//
// Libraries are fast at it in float32 and bfloat16, but in float64 they convolve channel after
// channel (benchmarks/bench_ops.py). CPU only.
#pragma once

#include <cstdint>

namespace pyablate {

struct DepthwiseParams {
    const double* x;        // [N, H, W, C]
    const double* filters;  // [kh, kw, C]
    double* out;            // [N, Ho, Wo, C]
    std::int64_t images, height, width, channels, out_h, out_w;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    std::int64_t dilation_h, dilation_w;
};

namespace cpu {
void depthwise(const DepthwiseParams& p, int threads);
}

}  // namespace pyablate
