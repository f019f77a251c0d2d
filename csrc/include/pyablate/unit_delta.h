// The first convolution after a unit: of all its input channels only one changed.
//
//   d[p]   = sum over taps (i, j) of
//            map[p, y sh + i dh - ph, x sw + j dw - pw] * weight[c, i, j, :]
//   map[p] = delta[image[p], column[p]],   c = channel[column[p]]
//   out[p] = d[p],   or   f(base[row] + d[p]) - f(base[row])   with row = base_image[p]
//
// Output channels are innermost everywhere but in delta, so that they fill the vectors. A tap whose
// inputs are all zero is skipped; adding its zeros would not change the sums, of finite weights.
#pragma once

#include <cstdint>

#include "pyablate/codes.h"
#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct UnitDeltaParams {
    const void* delta;               // [N, U, H, W], strided
    const void* weight;              // [I, kh, kw, O]
    const std::int32_t* channel;     // [U], in [0, I)
    const std::int32_t* image;       // [P], in [0, N)
    const std::int32_t* column;      // [P], in [0, U)
    const void* base;                // [N', Ho, Wo, O] or null: no function follows
    const std::int32_t* base_image;  // [P], in [0, N')
    void* out;                       // [P, Ho, Wo, O], or null: only the codes are wanted
    Codes codes;                     // of out, for float32 and bfloat16; CPU only
    std::int64_t delta_strides[4];
    std::int64_t images, units, height, width;
    std::int64_t inputs, kernel_h, kernel_w, outputs;
    std::int64_t pairs, base_images, out_h, out_w;
    std::int64_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
    Activation activation;
    DType dtype;       // of delta and out; weight is float32, or float64 if this is that
    DType base_dtype;  // the dtype of weight, or bfloat16; float16 beside itself
};

namespace cpu {
void unit_delta(const UnitDeltaParams& p, int threads);
}
namespace cuda {
void unit_delta(const UnitDeltaParams& p, int device, void* stream);
}

}  // namespace pyablate
