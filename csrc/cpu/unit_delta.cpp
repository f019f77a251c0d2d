#include "pyablate/unit_delta.h"

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"
#include "scratch.h"

namespace pyablate::cpu {

namespace {

constexpr std::int64_t align(std::int64_t elements) {
    return divide_up(elements, 16) * 16;
}

UnitDeltaScratch scratch_of(const UnitDeltaParams& p, bool single) {
    const std::int64_t depth = (p.kernel_h - 1) * p.dilation_h + 1;  // input rows in sight
    const std::int64_t width = (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    const std::int64_t taps = p.kernel_h * p.kernel_w;
    return {
        .window = align(single ? unit_delta_run * taps : depth * width),
        .counts = single ? 0 : align(depth * (width + 1)),  // int32: an element each is enough
        .rows = single ? 0 : align(2 * depth),              // int64: two float32 each
        .results = align((single ? unit_delta_run : p.out_w) * p.outputs),
        .whole = p.codes.values == nullptr ? 0 : p.out_h * p.out_w * p.outputs,
    };
}

}  // namespace

void unit_delta(const UnitDeltaParams& p, int threads) {
    const bool single = p.out_h == 1 && p.out_w == 1;
    const UnitDeltaScratch sizes = scratch_of(p, single);
    const Scratch scratch(sizes.window + sizes.counts + sizes.rows + sizes.results + sizes.whole,
                          computing(p.dtype), threads);
    const std::int64_t cost =
        p.out_h * p.out_w * p.outputs * (p.kernel_h * p.kernel_w + 4) / 16 + 64;
    std::int64_t piece = piece_size(p.pairs, cost, threads);
    if (single) piece = divide_up(piece, unit_delta_run) * unit_delta_run;
    parallel_for(p.pairs, piece, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
        kernels().unit_delta(p, sizes, scratch.of(thread), begin, end);
    });
}

}  // namespace pyablate::cpu
