#include "pyablate/delta_mean.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void delta_mean(const DeltaMeanParams& p, void* scratch, int threads) {
    const std::int64_t own = delta_mean_scratch(p) * (p.dtype == DType::float64 ? 8 : 4);
    const std::int64_t cost = p.channels * p.positions / 4 + 16;
    parallel_for(p.pairs, piece_size(p.pairs, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                     kernels().delta_mean(p, static_cast<char*>(scratch) + thread * own, begin,
                                          end);
                 });
}

}  // namespace pyablate::cpu
