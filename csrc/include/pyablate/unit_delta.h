// The first convolution after a unit: of all its input channels only one changed.
//
//   d[p]   = sum over taps (i, j) of  map[p, y sh + i dh - ph, x sw + j dw - pw] * weight[c, i, j,
//   :] map[p] = delta[image[p], column[p]],   c = channel[column[p]] out[p] = d[p],   or
//   f(base[row] + d[p]) - f(base[row])  with row = base_image[p]
//
// Output channels are innermost everywhere but in delta, so that they fill the vectors. A tap whose
// inputs are all zero is skipped; adding its zeros would not change the sums.
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
    DType base_dtype;  // the dtype of weight, or bfloat16 beside float32
};

namespace cpu {

// How the scratch of one thread is divided; all counts are elements of the dtype of weight.
struct UnitDeltaScratch {
    std::int64_t window;   // padded input rows, or the maps of a run of pairs
    std::int64_t counts;   // nonzero elements up to each position of a window row
    std::int64_t rows;     // which input row each window row holds
    std::int64_t results;  // one row of results, before the function
    std::int64_t whole;    // with codes: all results of a pair
    std::int64_t total;
};

// Pairs of one column that are convolved together where each has a single output position.
constexpr std::int64_t unit_delta_run = 28;

UnitDeltaScratch unit_delta_scratch(const UnitDeltaParams& p);

// scratch: threads * unit_delta_scratch(p).total elements of the dtype of weight
void unit_delta(const UnitDeltaParams& p, void* scratch, int threads);

}  // namespace cpu

namespace cuda {
void unit_delta(const UnitDeltaParams& p, int device, void* stream);
}

}  // namespace pyablate
