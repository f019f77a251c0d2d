// Each channel through its own filter: a depthwise convolution.
//
//   out[n, y, x, c] = sum over i, j of x[n, y * stride + i * dilation - padding, ..., c] * filters[i, j, c]
//
// Libraries have this for float32 and bfloat16, but for float64 they convolve channel after channel,
// 70 times as slowly. CPU only.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct DepthwiseParams {
    const void* x;        // [N, H, W, C]
    const void* filters;  // [kh, kw, C]
    void* out;            // [N, Ho, Wo, C]
    std::int64_t images, height, width, channels, out_h, out_w;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    std::int64_t dilation_h, dilation_w;
    DType dtype;  // of all three: float32 or float64
};

namespace cpu {
void depthwise(const DepthwiseParams& p, int threads);
}

}  // namespace pyablate
