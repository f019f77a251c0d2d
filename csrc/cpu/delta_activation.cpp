#include "pyablate/delta_activation.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"
#include "scratch.h"

namespace pyablate::cpu {

void delta_activation(const DeltaActivationParams& p, int threads) {
    if (p.codes.values != nullptr) {
        const Scratch scratch(p.width, DType::float32, threads);
        const std::int64_t cost = p.width / 2 + 16;
        return parallel_for(p.pairs, piece_size(p.pairs, cost, threads), threads,
                            [&](std::int64_t begin, std::int64_t end, int thread) {
                                float* row = static_cast<float*>(scratch.of(thread));
                                kernels().delta_activation_codes(p, row, begin, end);
                            });
    }
    const std::int64_t items = p.pairs * divide_up(p.width, activation_block);
    const std::int64_t cost = std::min(p.width, activation_block) / 4 + 16;
    parallel_for(items, piece_size(items, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     kernels().delta_activation(p, begin, end);
                 });
}

}  // namespace pyablate::cpu
