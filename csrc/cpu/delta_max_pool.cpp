#include "pyablate/delta_max_pool.h"

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

void delta_max_pool(const DeltaMaxPoolParams& p, void* scratch, int threads) {
    const std::int64_t own = delta_max_pool_scratch(p) * (p.dtype == DType::float64 ? 8 : 4);
    const std::int64_t parts = delta_max_pool_parts(p);
    const bool whole = p.codes.values != nullptr;
    const std::int64_t items = whole ? p.pairs : p.pairs * parts;
    const std::int64_t cost =
        delta_max_pool_part(p) * p.kernel_h * p.kernel_w / 4 * (whole ? parts : 1) + 16;
    parallel_for(items, piece_size(items, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int thread) {
                     kernels().delta_max_pool(p, static_cast<char*>(scratch) + thread * own, begin,
                                              end);
                 });
}

}  // namespace pyablate::cpu
