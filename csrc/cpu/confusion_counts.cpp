#include "pyablate/confusion_counts.h"

#include <cstring>

#include "parallel.h"

namespace pyablate::cpu {

// Threads take whole units, so no two of them count in the same matrix.
void confusion_counts(const ConfusionCountsParams& p, int threads) {
    const std::int64_t cells = p.classes * p.classes;
    const std::int64_t cost = p.images + cells / 8;
    parallel_for(p.units, piece_size(p.units, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     for (std::int64_t u = begin; u < end; ++u) {
                         std::int32_t* counts = p.out + u * cells;
                         std::memset(counts, 0, static_cast<std::size_t>(cells) * sizeof *counts);
                         const std::int32_t* prediction = p.prediction + u * p.images;
                         for (std::int64_t n = 0; n < p.images; ++n) {
                             ++counts[p.label[n] * p.classes + prediction[n]];
                         }
                     }
                 });
}

}  // namespace pyablate::cpu
