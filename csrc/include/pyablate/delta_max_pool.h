// A delta through an elementwise function f and a max pooling:
//
//   out[p] = max_pool(f(base[image[p]] + delta[p])) - max_pool(f(base[image[p]]))
//
// f must be monotone (ops.py applies the others beforehand), so that it comes after the maximum.
// Per window, with  M = max base  and  r = max over taps of (base - M) + delta,  the result is
// f(M + r) - f(M). At the tap that was the maximum the bracket is exactly 0, so the error is
// relative to the change. A window without any tap inside the map gives 0.
#pragma once

#include <cstdint>

#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct DeltaMaxPoolParams {
    const void* base;           // [N, C, H, W], or [N, H, W, C] if channels_last
    const void* delta;          // [P, ...] likewise
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, C, Ho, Wo], or [P, Ho, Wo, C]
    std::int64_t images, pairs, channels, height, width, out_h, out_w;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w;
    std::int64_t padding_h, padding_w, dilation_h, dilation_w;
    bool channels_last;
    Activation activation;
    DType dtype;       // of delta and out; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or bfloat16 beside float32
};

namespace cpu {
// Work is handed out by output rows of a pair (channels last) or by planes. One thread needs the
// maxima of such an item and their changes, in the computing dtype.
inline std::int64_t delta_max_pool_item(const DeltaMaxPoolParams& p) {
    return p.channels_last ? p.out_w * p.channels : p.out_h * p.out_w;
}
inline std::int64_t delta_max_pool_scratch(const DeltaMaxPoolParams& p) {
    return 2 * delta_max_pool_item(p);
}

// scratch: threads * delta_max_pool_scratch(p) elements of the computing dtype
void delta_max_pool(const DeltaMaxPoolParams& p, void* scratch, int threads);
}  // namespace cpu
namespace cuda {
void delta_max_pool(const DeltaMaxPoolParams& p, int device, void* stream);
}

}  // namespace pyablate
