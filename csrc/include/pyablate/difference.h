// The two ends of f(base + delta) - f(base) for a function f that is not ours, each in one pass:
//
//   perturbed    out[p, r, m] = base[image[p], r, m] + delta[p, r, m]
//   subtracted   out[p, r, m] = after[p, r, m] - base[image[p], r, m], 0 where both are equal
//
// Runs of M neighbours, of which each pair and image has R: views of tensors that are not wholly
// contiguous are read as they are. out is contiguous and shares no memory with what is read.
// Infinity that stays infinity is no change, rather than NaN; a NaN of either gives NaN.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

// Elements from one pair or image to the next, and from one run to the next.
struct RunStrides {
    std::int64_t outer, run;

    bool multiples_of(std::int64_t n) const { return outer % n == 0 && run % n == 0; }
};

struct DifferenceParams {
    const void* base;           // [N, R, M]
    const void* given;          // [P, R, M]: delta, or after in its computing dtype
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, R, M]: base + delta in the computing dtype, or a delta
    RunStrides base_strides, strides;
    std::int64_t images, pairs, runs, width;
    DType dtype;       // of the delta; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or half precision beside float32
};

namespace cpu {
void perturbed(const DifferenceParams& p, int threads);
void subtracted(const DifferenceParams& p, int threads);
}  // namespace cpu
namespace cuda {
void perturbed(const DifferenceParams& p, int device, void* stream);
void subtracted(const DifferenceParams& p, int device, void* stream);
}  // namespace cuda

}  // namespace pyablate
