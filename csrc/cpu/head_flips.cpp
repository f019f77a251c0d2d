#include "pyablate/head_flips.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void head_flips(const HeadFlipsParams& p, int threads) {
    const std::int64_t cost = p.classes + p.units * 4;
    parallel_for(
        p.images, piece_size(p.images, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().head_flips(p, begin, end); });
}

}  // namespace pyablate::cpu
