// Predictions from clean logits and their change:
//
//   out[p] = argmax over k of  logits[image[p], k] + delta[p, k]
//
// the lowest k on equality, -1 unless the top-2 margin is above
// tolerance[image[p]] + relative * (max_k delta - min_k delta).
//
// A logit of minus infinity is a class that cannot win: it has no part in the margin, and the only
// finite one wins at any finite tolerance. -1 too if any logit or change is NaN, a change is
// infinite, or the largest sum is: plus infinity, or minus infinity where no class can win.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct ClassifyParams {
    const void* logits;         // [N, K]
    const void* delta;          // [P, K]
    const std::int32_t* image;  // [P], in [0, N)
    const void* tolerance;      // [N]
    std::int32_t* out;          // [P]
    std::int64_t images, pairs, classes;
    double relative;
    DType dtype;  // of logits, delta and tolerance: float32 or float64
};

namespace cpu {
void classify(const ClassifyParams& p, int threads);
}
namespace cuda {
void classify(const ClassifyParams& p, int device, void* stream);
}

}  // namespace pyablate
