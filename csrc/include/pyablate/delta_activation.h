// A delta through an elementwise function:
//
//   out[p, m] = f(base[image[p], m] + d) - f(base[image[p], m]),
//   d = delta[p, m] * scale[p] (+ addend[p, m] * addend_scale[p])
//
// Rows are flat runs of M elements, all in the same order. out may be delta. A NaN of base or of d
// gives NaN, and so does a difference of infinities; the identity reads no base.
#pragma once

#include <cstdint>

#include "pyablate/codes.h"
#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct DeltaActivationParams {
    const void* base;           // [N, M]
    const void* delta;          // [P, M]
    const float* scale;         // [P] or null: 1
    const void* addend;         // [P, M] or null
    const float* addend_scale;  // [P] or null: 1
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, M], or null: only the codes are wanted
    Codes codes;                // of out, for float32 and bfloat16; CPU only
    std::int64_t images, pairs, width;
    Activation activation;
    DType dtype;       // of delta, addend and out; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or bfloat16; float16 beside itself
};

namespace cpu {
void delta_activation(const DeltaActivationParams& p, int threads);
}
namespace cuda {
void delta_activation(const DeltaActivationParams& p, int device, void* stream);
}

}  // namespace pyablate
