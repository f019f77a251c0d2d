#include "pyablate/unit_delta.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace pyablate::cpu {

namespace {

constexpr std::int64_t align(std::int64_t elements) {
    return (elements + 15) / 16 * 16;
}

}  // namespace

UnitDeltaScratch unit_delta_scratch(const UnitDeltaParams& p) {
    UnitDeltaScratch s{};
    const std::int64_t depth = (p.kernel_h - 1) * p.dilation_h + 1;  // input rows in sight
    const std::int64_t width = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    const std::int64_t taps = p.kernel_h * p.kernel_w;
    const bool single = p.out_h == 1 && p.out_w == 1;
    s.window = align(single ? unit_delta_run * taps : depth * width);
    s.counts = single ? 0 : align(depth * (width + 1));  // int32: an element each is enough
    s.rows = single ? 0 : align(2 * depth);              // int64: two float32 each
    s.results = align((single ? unit_delta_run : p.out_w) * p.outputs);
    s.whole = p.codes.values == nullptr ? 0 : align(p.out_h * p.out_w * p.outputs);
    s.total = s.window + s.counts + s.rows + s.results + s.whole;
    return s;
}

void unit_delta(const UnitDeltaParams& p, void* scratch, int threads) {
    const UnitDeltaScratch sizes = unit_delta_scratch(p);
    const std::int64_t item_size = p.dtype == DType::float64 ? 8 : 4;
    const bool single = p.out_h == 1 && p.out_w == 1;
    const std::int64_t cost =
        p.out_h * p.out_w * p.outputs * (p.kernel_h * p.kernel_w + 4) / 16 + 64;
    std::int64_t piece = piece_size(p.pairs, cost, threads);
    if (single) piece = (piece + unit_delta_run - 1) / unit_delta_run * unit_delta_run;
    parallel_for(p.pairs, piece, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
        char* own = static_cast<char*>(scratch) + thread * sizes.total * item_size;
        kernels().unit_delta(p, sizes, own, begin, end);
    });
}

}  // namespace pyablate::cpu
