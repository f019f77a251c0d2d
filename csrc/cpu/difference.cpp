#include "pyablate/difference.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"

namespace pyablate::cpu {

namespace {

// Items are blocks of the runs.
void run(const DifferenceParams& p, decltype(Kernels::perturbed) kernel, int threads) {
    const std::int64_t items = p.pairs * p.runs * divide_up(p.width, activation_block);
    const std::int64_t cost = std::min(p.width, activation_block) / 8 + 16;
    parallel_for(items, piece_size(items, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int) { kernel(p, begin, end); });
}

}  // namespace

void perturbed(const DifferenceParams& p, int threads) {
    run(p, kernels().perturbed, threads);
}

void subtracted(const DifferenceParams& p, int threads) {
    run(p, kernels().subtracted, threads);
}

}  // namespace pyablate::cpu
