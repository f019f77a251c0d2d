#include "pyablate/delta_product.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"

namespace pyablate::cpu {

// Items are blocks of the runs.
void delta_product(const DeltaProductParams& p, int threads) {
    const std::int64_t items = p.pairs * p.runs * divide_up(p.width, activation_block);
    const std::int64_t cost = std::min(p.width, activation_block) / 4 + 16;
    parallel_for(
        items, piece_size(items, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().delta_product(p, begin, end); });
}

}  // namespace pyablate::cpu
