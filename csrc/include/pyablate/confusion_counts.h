// Counts of predictions:  out[u, label[n], prediction[u, n]] += 1  over n; integers, so any order
// of counting gives the same result.
#pragma once

#include <cstdint>

namespace pyablate {

struct ConfusionCountsParams {
    const std::int32_t* prediction;  // [U, N], in [0, K)
    const std::int32_t* label;       // [N], in [0, K)
    std::int32_t* out;               // [U, K, K]
    std::int64_t units, images, classes;
};

namespace cpu {
void confusion_counts(const ConfusionCountsParams& p, int threads);
}
namespace cuda {
void confusion_counts(const ConfusionCountsParams& p, int device, void* stream);
}

}  // namespace pyablate
