#include "pyablate/classify.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void classify(const ClassifyParams& p, int threads) {
    const std::int64_t cost = p.classes / 4 + 16;
    parallel_for(
        p.pairs, piece_size(p.pairs, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().classify(p, begin, end); });
}

}  // namespace pyablate::cpu
