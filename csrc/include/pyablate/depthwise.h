// Each channel through its own filter: a depthwise convolution.
//
//   out[n, y, x, c] = sum over i, j of x[n, y * stride + i * dilation - padding, ..., c] * filters[i, j, c]
//
// On a processor in float64, in which libraries convolve channel after channel (benchmarks/bench_ops.py);
// on a GPU in all dtypes: cuDNN compiles kernels for sizes that it has not met.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct DepthwiseParams {
    DType dtype;          // of x and out
    const void* x;        // [N, H, W, C]
    const void* filters;  // [kh, kw, C], computing(dtype)
    void* out;            // [N, Ho, Wo, C]
    std::int64_t images, height, width, channels, out_h, out_w;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
    std::int64_t dilation_h, dilation_w;
};

namespace cpu {
void depthwise(const DepthwiseParams& p, int threads);
}
namespace cuda {
void depthwise(const DepthwiseParams& p, int device, void* stream);
}

}  // namespace pyablate
