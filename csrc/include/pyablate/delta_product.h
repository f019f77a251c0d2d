// The change of a product of two factors that both change, in one pass:
//
//   out[p, r, m] = da * (b + db) + a * db
//
// a and b being numbers of the bases of image[p], da and db of the deltas of pair p. Where that is
// not finite, it is (a + da) * (b + db) - a * b, and 0 where both products are equal, since infinity
// that stays infinity is no change. Runs of M
// neighbours lie as in difference.h; the second factor may have one number for all of a run, or one
// run for all (strides of 0). out is contiguous and shares no memory with what is read.
#pragma once

#include "pyablate/difference.h"

namespace pyablate {

struct Factor {
    const void* base;   // [N, R, M]
    const void* delta;  // [P, R, M]
    RunStrides base_strides, strides;
};

struct DeltaProductParams {
    Factor first, second;
    bool spread;                // the second factor has one number for all of a run
    const std::int32_t* image;  // [P], in [0, N)
    void* out;                  // [P, R, M]
    std::int64_t images, pairs, runs, width;
    DType dtype;       // of deltas and out; computed in float32, or in float64 if it is that
    DType base_dtype;  // the computing dtype, or half precision beside float32
};

namespace cpu {
void delta_product(const DeltaProductParams& p, int threads);
}
namespace cuda {
void delta_product(const DeltaProductParams& p, int device, void* stream);
}

}  // namespace pyablate
