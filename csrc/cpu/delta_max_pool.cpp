#include "pyablate/delta_max_pool.h"

#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace pyablate::cpu {

void delta_max_pool(const DeltaMaxPoolParams& p, int threads) {
    const PoolParts parts = p.channels_last ? PoolParts{p.out_w * p.channels, p.out_h}
                                            : PoolParts{p.out_h * p.out_w, p.channels};
    // Codes need all parts of a pair: the largest change is known only at the end.
    const std::int64_t whole = p.codes.values == nullptr ? 0 : parts.per_pair;
    const std::int64_t items = whole > 0 ? p.pairs : p.pairs * parts.per_pair;
    const std::int64_t cost = parts.size * p.kernel_h * p.kernel_w / 4 * (whole > 0 ? whole : 1);
    // The maxima of a part and their changes; with codes, all changes of a pair.
    const Scratch scratch((2 + whole) * parts.size, computing(p.dtype), threads);
    parallel_for(items, piece_size(items, cost + 16, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                     kernels().delta_max_pool(p, parts, scratch.of(thread), begin, end);
                 });
}

}  // namespace pyablate::cpu
