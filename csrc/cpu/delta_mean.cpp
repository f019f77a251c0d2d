#include "pyablate/delta_mean.h"

#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace pyablate::cpu {

void delta_mean(const DeltaMeanParams& p, int threads) {
    const Scratch scratch(p.channels_last ? p.channels : p.positions, computing(p.dtype), threads);
    const std::int64_t cost = p.channels * p.positions / 4 + 16;
    parallel_for(p.pairs, piece_size(p.pairs, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                     kernels().delta_mean(p, scratch.of(thread), begin, end);
                 });
}

}  // namespace pyablate::cpu
