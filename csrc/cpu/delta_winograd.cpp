#include "pyablate/delta_winograd.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"
#include "scratch.h"

namespace pyablate::cpu {

namespace {

// Tiles that go through the products together. Many share one reading of the filters, which is
// what counts where these are large; few stay in a near cache. A multiple of the rows of every
// instruction set.
std::int64_t tiles_together(std::int64_t inputs) {
    return std::clamp<std::int64_t>(inputs / 64 * 12, 24, 96);
}

// A plane of tiles; not a power of two apart from the next, so that 36 of them fit in a cache.
std::int64_t plane(std::int64_t numbers) {
    return divide_up(numbers, 16) * 16 + 16;
}

}  // namespace

void delta_winograd(const DeltaWinogradParams& p, int threads) {
    const std::int64_t tiles = divide_up(p.out_h, 4) * divide_up(p.out_w, 4);
    const std::int64_t together = tiles_together(p.inputs);
    const WinogradScratch sizes{
        .tiles = together,
        .inputs = plane(together * p.inputs),
        .products = plane(together * divide_up(p.outputs, winograd_panel) * winograd_panel),
        .zeros = plane(p.inputs),
    };
    const std::int64_t numbers = winograd_parts * (sizes.inputs + sizes.products) + sizes.zeros +
                                 2 * together;  // numbers of tiles: int64
    const Scratch scratch(numbers, DType::float32, threads);
    const std::int64_t cost = tiles * winograd_parts * p.inputs * p.outputs / 16 + 64;
    // No piece leaves most of a block empty, but every thread has one.
    const std::int64_t piece =
        std::min(std::max(piece_size(p.pairs, cost, threads), divide_up(together, tiles)),
                 divide_up(p.pairs, threads));
    parallel_for(p.pairs, piece, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
        kernels().delta_winograd(p, sizes, static_cast<float*>(scratch.of(thread)), begin, end);
    });
}

}  // namespace pyablate::cpu
