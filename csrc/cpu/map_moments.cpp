#include "pyablate/map_moments.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

// Threads take whole units, so no two of them add to the same number.
void map_moments(const MapMomentsParams& p, int threads) {
    const std::int64_t cost = p.images * (p.outer * p.inner / 8 + 8);
    parallel_for(
        p.units, piece_size(p.units, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().map_moments(p, begin, end); });
}

}  // namespace pyablate::cpu
