// A delta through an elementwise function f and a max pooling:
//
//   out[p] = max_pool(f(base[image[p]] + d)) - max_pool(f(base[image[p]])),
//   d      = delta[p] * scale[p]
//
// f must be monotone (ops/ applies the others beforehand), so that it comes after the maximum.
// Per window, with  M = max base  and  r = max over taps of (base - M) + d,  the result is
// f(M + r) - f(M). At the tap that was the maximum the bracket is exactly 0, so the error is
// relative to the change.
//
// Whichever tap it is at, a NaN of base, of d or of their sum makes the window NaN, and so does a
// maximum of plus infinity. A window whose taps are all minus infinity, or that has none inside the
// map, gives 0 unless that makes it NaN.
#pragma once

#include <cstdint>

#include "pyablate/codes.h"
#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct DeltaMaxPoolParams {
    const void* base;           // [N, C, H, W], or [N, H, W, C] if channels_last
    const void* delta;          // [P, ...] likewise
    const float* scale;         // [P] or null: 1
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, C, Ho, Wo], or [P, Ho, Wo, C]; null: only codes are wanted
    Codes codes;                // of out, for float32 and bfloat16; CPU only
    std::int64_t images, pairs, channels, height, width, out_h, out_w;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w;
    std::int64_t padding_h, padding_w, dilation_h, dilation_w;
    bool channels_last;
    Activation activation;
    DType dtype;       // of delta and out; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or bfloat16; float16 beside itself
};

namespace cpu {
void delta_max_pool(const DeltaMaxPoolParams& p, int threads);
}
namespace cuda {
void delta_max_pool(const DeltaMaxPoolParams& p, int device, void* stream);
}

}  // namespace pyablate
