// Winograd's convolution: see delta_winograd.h for the formula.
//
// Tiles are gathered until a block is full, those of zeros left out. A block is transformed to 36
// matrices [tiles, C], each multiplied by its filters [C, O], and transformed back. The transforms
// are for the points 0, 1, -1, 2, -2 and infinity; channels fill the vectors.
#include "pyablate/delta_winograd.h"

#include "change.h"
#include "isa.h"
#include "pyablate/launch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

constexpr int in = 6, out = 4;  // sides of a tile
constexpr std::int64_t panel = winograd_panel;

// A column or row of a tile of inputs.
template <class V>
PYABLATE_INLINE void transform_inputs(const V (&d)[in], V (&to)[in]) {
    const V two(2.0), four(4.0);
    const V even = d[4] - four * d[2], odd = d[3] - four * d[1];
    const V far = d[4] - d[2], twice = two * (d[3] - d[1]);
    to[0] = four * (d[0] - d[2]) + far;
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = far + twice;
    to[4] = far - twice;
    to[5] = four * (d[1] - d[3]) + (d[5] - d[3]);
}

// A column or row of sums, back to outputs.
template <class V>
PYABLATE_INLINE void transform_sums(const V (&m)[in], V (&to)[out]) {
    const V two(2.0), four(4.0), eight(8.0);
    const V near = m[1] + m[2], slope = m[1] - m[2];
    const V far = m[3] + m[4], steep = m[3] - m[4];
    to[0] = m[0] + near + far;
    to[1] = slope + two * steep;
    to[2] = near + four * far;
    to[3] = slope + eight * steep + m[5];
}

// One transform of each of the rows of a tile, then of each of the columns of what comes out.
template <int Out, class V, class F>
PYABLATE_INLINE void both_ways(const V (&tile)[in][in], V (&to)[Out][Out], F&& transform) {
    V half[in][Out];
    for (int r = 0; r < in; ++r) transform(tile[r], half[r]);
    for (int s = 0; s < Out; ++s) {
        V column[in], result[Out];
        for (int r = 0; r < in; ++r) column[r] = half[r][s];
        transform(column, result);
        for (int r = 0; r < Out; ++r) to[r][s] = result[r];
    }
}

// Rows x panel sums of products of [Rows, count] and [count, panel], kept in registers.
template <int Rows>
PYABLATE_INLINE void multiply_rows(const float* left, const float* right, std::int64_t count,
                                   float* to, std::int64_t to_step) {
    using V = Vec<float, full_lanes<float>>;
    constexpr int registers = panel / V::size;
    V sum[Rows][registers];
    for (auto& row : sum) {
        for (V& x : row) x = V(0.0);
    }
    for (std::int64_t c = 0; c < count; ++c) {
        V weight[registers];
        for (int r = 0; r < registers; ++r) weight[r] = load<V>(right + c * panel + r * V::size);
        for (int i = 0; i < Rows; ++i) {
            const V value = all_lanes<V>(left[i * count + c]);
            for (int r = 0; r < registers; ++r) sum[i][r] = sum[i][r] + value * weight[r];
        }
    }
    for (int i = 0; i < Rows; ++i) {
        for (int r = 0; r < registers; ++r) store(to + i * to_step + r * V::size, sum[i][r]);
    }
}

// Any number of rows: twelve registers of sums at a time, and what is left in halves of that.
template <int Rows>
void multiply(const float* left, const float* right, std::int64_t rows, std::int64_t count,
              float* to, std::int64_t to_step) {
    std::int64_t i = 0;
    for (; i + Rows <= rows; i += Rows) {
        multiply_rows<Rows>(left + i * count, right, count, to + i * to_step, to_step);
    }
    if constexpr (Rows > 1) {
        if (i < rows) {
            multiply<Rows / 2>(left + i * count, right, rows - i, count, to + i * to_step, to_step);
        }
    }
}

struct Block {
    const DeltaWinogradParams& p;
    const cpu::WinogradScratch& sizes;
    float* const inputs;        // [36] planes of [tiles, C]
    float* const products;      // [36] planes of [tiles, O rounded up]
    float* const zeros;         // [C]
    std::int64_t* const tiles;  // [tiles]: their numbers
    const std::int64_t across, per_pair, row;
    const ChangeRun run;
    std::int64_t held = 0;

    Block(const DeltaWinogradParams& params, const cpu::WinogradScratch& parts, float* memory)
        : p(params),
          sizes(parts),
          inputs(memory),
          products(inputs + winograd_parts * parts.inputs),
          zeros(products + winograd_parts * parts.products),
          tiles(reinterpret_cast<std::int64_t*>(zeros + parts.zeros)),
          across(divide_up(p.out_w, out)),
          per_pair(divide_up(p.out_h, out) * across),
          row(divide_up(p.outputs, panel) * panel),
          run(p.base == nullptr && p.addend == nullptr
                  ? nullptr
                  : find_change_run(p.activation.kind, p.base_dtype, DType::float32,
                                    DType::float32)) {
        for (std::int64_t c = 0; c < p.inputs; ++c) zeros[c] = 0;
    }

    // Where the inputs of a tile lie; outside the map they are zeros.
    void locate(std::int64_t tile, const float* (&at)[in][in]) const {
        const std::int64_t pair = tile / per_pair;
        const std::int64_t y = tile % per_pair / across * out - p.padding_h;
        const std::int64_t x = tile % across * out - p.padding_w;
        for (int r = 0; r < in; ++r) {
            for (int s = 0; s < in; ++s) {
                const bool inside = y + r >= 0 && y + r < p.height && x + s >= 0 && x + s < p.width;
                at[r][s] = inside
                               ? p.delta + ((pair * p.height + y + r) * p.width + x + s) * p.inputs
                               : zeros;
            }
        }
    }

    bool all_zero(const float* const (&at)[in][in]) const {
        for (const auto& line : at) {
            for (const float* from : line) {
                if (from == zeros) continue;
                for (std::int64_t c = 0; c < p.inputs; ++c) {
                    if (from[c] != 0) return false;
                }
            }
        }
        return true;
    }

    void take(const float* const (&at)[in][in], std::int64_t tile) {
        float* to = inputs + held * p.inputs;
        for_each_vector<float>(
            p.inputs, [&](auto vector, std::int64_t c, int n) PYABLATE_LAMBDA_INLINE {
                using V = decltype(vector);
                V given[in][in], found[in][in];
                for (int r = 0; r < in; ++r) {
                    for (int s = 0; s < in; ++s) given[r][s] = load_n<V>(at[r][s] + c, n);
                }
                both_ways(given, found, [](const auto& d, auto& result) PYABLATE_LAMBDA_INLINE {
                    transform_inputs(d, result);
                });
                for (int k = 0; k < in * in; ++k) {
                    store_n(to + k * sizes.inputs + c, found[k / in][k % in], n);
                }
            });
        tiles[held++] = tile;
    }

    // Convolves the tiles held.
    void finish() {
        constexpr int rows = 12 * full_lanes<float> / static_cast<int>(panel);
        for (std::int64_t k = 0; k < winograd_parts; ++k) {
            for (std::int64_t o = 0; o < row; o += panel) {
                multiply<rows>(inputs + k * sizes.inputs, p.filters + (k * row + o) * p.inputs,
                               held, p.inputs, products + k * sizes.products + o, row);
            }
        }
        for (std::int64_t i = 0; i < held; ++i) give(i);
        held = 0;
    }

    void give(std::int64_t slot) const {
        const float* from = products + slot * row;
        const Outputs to = outputs_of(tiles[slot]);
        for_each_vector<float>(
            p.outputs, [&](auto vector, std::int64_t o, int n) PYABLATE_LAMBDA_INLINE {
                using V = decltype(vector);
                V sums[in][in], found[out][out];
                for (int k = 0; k < in * in; ++k) {
                    sums[k / in][k % in] = load_n<V>(from + k * sizes.products + o, n);
                }
                both_ways(sums, found, [](const auto& m, auto& result) PYABLATE_LAMBDA_INLINE {
                    transform_sums(m, result);
                });
                for (int r = 0; r < out; ++r) {
                    for (int s = 0; s < out; ++s) {
                        if (r >= to.rows || s >= to.columns) continue;
                        store_n(p.out + to.at(r) + s * p.outputs + o, found[r][s], n);
                    }
                }
            });
        close(to);
    }

    void give_zeros(std::int64_t tile) const {
        const Outputs to = outputs_of(tile);
        for (int r = 0; r < to.rows; ++r) {
            float* row_of_tile = p.out + to.at(r);
            for (std::int64_t i = 0; i < to.columns * p.outputs; ++i) row_of_tile[i] = 0;
        }
        if (p.addend != nullptr) close(to);  // nothing else changes either
    }

    // The part of a tile that lies within the output.
    struct Outputs {
        std::int64_t pair, first, step;  // elements: of its first number, from row to row
        std::int64_t rows, columns;

        std::int64_t at(std::int64_t r) const { return first + r * step; }
    };

    Outputs outputs_of(std::int64_t tile) const {
        const std::int64_t pair = tile / per_pair;
        const std::int64_t y = tile % per_pair / across * out, x = tile % across * out;
        const std::int64_t down = p.out_h - y, right = p.out_w - x;
        return {pair, ((pair * p.out_h + y) * p.out_w + x) * p.outputs, p.out_w * p.outputs,
                down < out ? down : out, right < out ? right : out};
    }

    // What happens to the sums of a tile, while they are in a cache.
    void close(const Outputs& to) const {
        if (run == nullptr) return;
        const char* base = static_cast<const char*>(p.base);
        const std::int64_t size = p.out_h * p.out_w * p.outputs;
        const std::int64_t image = base == nullptr ? 0 : p.image[to.pair];
        for (std::int64_t r = 0; r < to.rows; ++r) {
            const std::int64_t at = to.at(r), from = at + (image - to.pair) * size;
            run(base == nullptr ? base : base + from * item_size(p.base_dtype), p.out + at,
                p.addend == nullptr ? nullptr : p.addend + at, p.out + at, to.columns * p.outputs,
                {p.activation});
        }
    }
};

}  // namespace

// Items are tiles, pair by pair.
void delta_winograd(const DeltaWinogradParams& p, const cpu::WinogradScratch& sizes, float* scratch,
                    std::int64_t begin, std::int64_t end) {
    Block block(p, sizes, scratch);
    for (std::int64_t tile = begin; tile < end; ++tile) {
        const float* at[in][in];
        block.locate(tile, at);
        if (block.all_zero(at)) {
            block.give_zeros(tile);
            continue;
        }
        block.take(at, tile);
        if (block.held == sizes.tiles) block.finish();
    }
    if (block.held > 0) block.finish();
}

}  // namespace pyablate::PYABLATE_ISA
