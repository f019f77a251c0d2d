// A delta through an elementwise function f and the mean over all positions of a map:
//
//   out[p, c] = mean over m of  f(base[image[p], c, m] + d) - f(base[image[p], c, m]),
//   d = delta[p, c, m] * scale[p] (+ addend[p, c, m] * addend_scale[p])
//
// NaN and infinities are as in delta_activation.h.
#pragma once

#include <cstdint>

#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct DeltaMeanParams {
    const void* base;           // [N, C, M], or [N, M, C] if channels_last
    const void* delta;          // [P, ...] likewise
    const float* scale;         // [P] or null: 1
    const void* addend;         // [P, ...] or null
    const float* addend_scale;  // [P] or null: 1
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, C], in the computing dtype
    std::int64_t images, pairs, channels, positions;
    bool channels_last;
    Activation activation;
    DType dtype;       // of delta and addend; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or bfloat16; float16 beside itself
};

namespace cpu {
void delta_mean(const DeltaMeanParams& p, int threads);
}
namespace cuda {
void delta_mean(const DeltaMeanParams& p, int device, void* stream);
}

}  // namespace pyablate
