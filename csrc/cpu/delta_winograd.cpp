#include "pyablate/delta_winograd.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"
#include "pyablate/launch.h"
#include "scratch.h"

namespace pyablate::cpu {

namespace {

constexpr std::int64_t most_bytes = 8 << 20;  // of transformed tiles and products, per thread

// Tiles that go through the products together. Many share one reading of the filters, which is
// what counts where these are large; few stay in a near cache. A multiple of the rows of every
// instruction set.
std::int64_t tiles_together(std::int64_t inputs, std::int64_t outputs) {
    const std::int64_t tile = winograd_parts * (inputs + outputs + 1) * item_size(DType::float32);
    const std::int64_t wanted = std::clamp<std::int64_t>(inputs / 64, 2, 8);
    return 12 * std::clamp<std::int64_t>(most_bytes / tile / 12, 1, wanted);
}

// A plane of tiles; not a power of two apart from the next, so that 36 of them fit in a cache.
std::int64_t plane(std::int64_t numbers) {
    return divide_up(numbers, 16) * 16 + 16;
}

}  // namespace

void delta_winograd(const DeltaWinogradParams& p, int threads) {
    const std::int64_t tiles = p.pairs * divide_up(p.out_h, 4) * divide_up(p.out_w, 4);
    const std::int64_t together = tiles_together(p.inputs, p.outputs);
    const WinogradScratch sizes{
        .tiles = together,
        .inputs = plane(together * p.inputs),
        .products = plane(together * divide_up(p.outputs, winograd_panel) * winograd_panel),
        .zeros = plane(p.inputs),
    };
    const std::int64_t numbers = winograd_parts * (sizes.inputs + sizes.products) + sizes.zeros +
                                 2 * together;  // numbers of tiles: int64
    const Scratch scratch(numbers, DType::float32, threads);
    // Whole blocks, so that none but the last is done half empty; or less, so that all threads work.
    const std::int64_t cost = winograd_parts * p.inputs * p.outputs / 16 + 64;
    const std::int64_t blocks = divide_up(piece_size(tiles, cost, threads), together) * together;
    const std::int64_t piece = std::min(blocks, divide_up(tiles, std::max(threads, 1)));
    parallel_for(tiles, piece, threads, [&](std::int64_t begin, std::int64_t end, int thread) {
        kernels().delta_winograd(p, sizes, static_cast<float*>(scratch.of(thread)), begin, end);
    });
}

}  // namespace pyablate::cpu
