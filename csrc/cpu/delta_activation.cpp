#include "pyablate/delta_activation.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void delta_activation(const DeltaActivationParams& p, void* scratch, int threads) {
    if (p.codes.values != nullptr) {
        const std::int64_t cost = p.width / 2 + 16;
        return parallel_for(p.pairs, piece_size(p.pairs, cost, threads), threads,
                            [&](std::int64_t begin, std::int64_t end, int thread) {
                                float* own = static_cast<float*>(scratch) + thread * p.width;
                                kernels().delta_activation_codes(p, own, begin, end);
                            });
    }
    const std::int64_t blocks = (p.width + activation_block - 1) / activation_block;
    const std::int64_t items = p.pairs * blocks;
    const std::int64_t cost = std::min(p.width, activation_block) / 4 + 16;
    parallel_for(items, piece_size(items, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     kernels().delta_activation(p, begin, end);
                 });
}

}  // namespace pyablate::cpu
