#include "pyablate/depthwise.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void depthwise(const DepthwiseParams& p, int threads) {
    const std::int64_t rows = p.images * p.out_h;
    const std::int64_t cost = p.out_w * p.channels * (p.kernel_h * p.kernel_w + 2) / 16 + 16;
    parallel_for(
        rows, piece_size(rows, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().depthwise(p, begin, end); });
}

}  // namespace pyablate::cpu
