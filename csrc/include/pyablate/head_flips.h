// Predictions where an ablation reaches the classes by one linear map:
//
//   out[n, u] = argmax over k of  logits[n, k] + delta[n, u] * weight[u, k]
//
// the lowest k on equality, -1 unless the top-2 margin is above tolerance[n]. Products and sums are
// rounded one by one (no fused multiply-add), so that all backends agree to the bit. Logits of minus
// infinity, and what else is not finite, are as in classify.h; the products are the changes.
//
// Most pairs need no look at the classes. With m the lead of the baseline class y over the best
// other one z and lo, hi the least and greatest weight of unit u, the lead after the ablation is at
// least  m + min(d (w_y - hi), d (w_y - lo)).  If that is above the tolerance (and 0, a tolerance
// may be negative), and by more than the rounding of either formula, y stays. The guard: each of
// the two formulas is a sum of at most four terms, each of at most
// a = max(|logit y|, |logit z|) + |d| max |w|,  each rounded at most four times; 32 epsilon a is
// more than twice that. Lower logits, of whatever size, round to no more than that of z does: with
// any of them in its place the sum is not greater.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct HeadFlipsParams {
    const void* logits;            // [N, K]
    const void* delta;             // [N, U]
    const void* weight;            // [U, K]
    const void* bounds;            // [3, U]: least, greatest and greatest absolute weight
    const std::int32_t* baseline;  // [N], in [0, K)
    const void* tolerance;         // [N]
    std::int32_t* out;             // [N, U]
    std::int64_t images, units, classes;
    DType dtype;  // of all but the int32 tensors: float32 or float64
};

namespace cpu {
void head_flips(const HeadFlipsParams& p, int threads);
}
namespace cuda {
void head_flips(const HeadFlipsParams& p, int device, void* stream);
}

}  // namespace pyablate
