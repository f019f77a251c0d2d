// The convolution of single maps: see unit_delta.h for the formula.
//
// Each input row that an output row needs lies, padded, in a ring of window rows, copied once per
// pair. For a few neighbouring output positions the taps that see anything but zeros are listed;
// then, for each block of output channels, the sums of all these positions stay in registers while
// the listed taps go by: per tap one load of the weights for all positions.
#include "change.h"
#include "encode.h"
#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

constexpr int most_positions = 7;  // 28, 14 and 7 divide by it; sums of 7 x 2 registers fit in 16
constexpr int most_taps = 64;      // listed at a time; larger kernels are summed in several goes

template <class T>
struct Tap {
    const T* value;   // input at the first position
    const T* weight;  // [O]
};

template <class T>
struct Taps {
    Tap<T> list[most_taps];
    int count = 0;
};

// Sums over the listed taps for B positions and R registers of channels from `o` on.
template <class V, int B, int R, class T>
PYABLATE_INLINE void sum_taps(const Taps<T>& taps, std::int64_t value_step, T* out,
                              std::int64_t out_step, std::int64_t o, int n, bool add) {
    V sum[B][R];
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) {
            sum[b][r] = add ? load_n<V>(out + b * out_step + o + r * V::size, n) : V(0.0);
        }
    }
    for (int t = 0; t < taps.count; ++t) {
        V weight[R];
        for (int r = 0; r < R; ++r) weight[r] = load_n<V>(taps.list[t].weight + o + r * V::size, n);
        for (int b = 0; b < B; ++b) {
            const V value = all_lanes<V>(taps.list[t].value[b * value_step]);
            for (int r = 0; r < R; ++r) sum[b][r] = sum[b][r] + value * weight[r];
        }
    }
    for (int b = 0; b < B; ++b) {
        for (int r = 0; r < R; ++r) store_n(out + b * out_step + o + r * V::size, sum[b][r], n);
    }
}

// All output channels of B positions.
template <int B, class T>
void sum_channels(const Taps<T>& taps, std::int64_t value_step, T* out, std::int64_t out_step,
                  std::int64_t outputs, bool add) {
    using V = Vec<T, full_lanes<T>>;
    std::int64_t o = 0;
    for (; o + 2 * V::size <= outputs; o += 2 * V::size) {
        sum_taps<V, B, 2>(taps, value_step, out, out_step, o, V::size, add);
    }
    for_each_vector<T>(
        outputs,
        [&](auto vector, std::int64_t at, int n) PYABLATE_LAMBDA_INLINE {
            sum_taps<decltype(vector), B, 1>(taps, value_step, out, out_step, at, n, add);
        },
        o);
}

template <class T>
void sum_positions(int positions, const Taps<T>& taps, std::int64_t value_step, T* out,
                   std::int64_t out_step, std::int64_t outputs, bool add) {
    switch (positions) {
        case 7:
            return sum_channels<7>(taps, value_step, out, out_step, outputs, add);
        case 4:
            return sum_channels<4>(taps, value_step, out, out_step, outputs, add);
        case 2:
            return sum_channels<2>(taps, value_step, out, out_step, outputs, add);
        default:
            return sum_channels<1>(taps, value_step, out, out_step, outputs, add);
    }
}

// The block sizes that sum_positions knows, largest first.
PYABLATE_INLINE int next_positions(std::int64_t left) {
    return left >= most_positions ? most_positions : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Input rows of one map, padded left and right, each in the window row that its number gives.
template <class T, class D>
struct Window {
    const UnitDeltaParams& p;
    std::int64_t depth, width;
    T* values;             // [depth, width]
    std::int32_t* counts;  // [depth, width + 1]: nonzero values before each position
    std::int64_t* rows;    // [depth]: the input row held, -1 for none
    const D* map;

    void start(const D* at) {
        map = at;
        for (std::int64_t slot = 0; slot < depth; ++slot) rows[slot] = -1;
    }

    // Brings input row y, inside the map, into its slot.
    std::int64_t bring(std::int64_t y) {
        const std::int64_t slot = y % depth;
        if (rows[slot] == y) return slot;
        rows[slot] = y;
        T* to = values + slot * width;
        std::int32_t* count = counts + slot * (width + 1);
        const D* from = map + y * p.delta_strides[2];
        const std::int64_t step = p.delta_strides[3];
        std::int32_t nonzero = 0;
        for (std::int64_t x = 0; x < width; ++x) {
            const std::int64_t column = x - p.padding_w;
            T value = 0;
            if (column >= 0 && column < p.width) value = widen(from[column * step]);
            to[x] = value;
            count[x] = nonzero;
            nonzero += value != 0;
        }
        count[width] = nonzero;
        return slot;
    }

    static PYABLATE_INLINE T widen(BFloat16 x) {
        const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
    static PYABLATE_INLINE T widen(T x) { return x; }
};

// One output row [Wo, O] of plain sums.
template <class T, class D>
void convolve_row(Window<T, D>& window, const T* weight, std::int64_t y, T* out) {
    const UnitDeltaParams& p = window.p;
    for (std::int64_t x = 0; x < p.out_w;) {
        const int positions = next_positions(p.out_w - x);
        // past the last input column that any of these positions sees through the first tap column
        const std::int64_t reach = (positions - 1) * p.stride_w + 1;
        Taps<T> taps;
        bool add = false;
        const auto flush = [&] {
            sum_positions(positions, taps, p.stride_w, out + x * p.outputs, p.outputs, p.outputs,
                          add);
            taps.count = 0;
            add = true;
        };
        for (std::int64_t i = 0; i < p.kernel_h; ++i) {
            const std::int64_t row = y * p.stride_h + i * p.dilation_h - p.padding_h;
            if (row < 0 || row >= p.height) continue;
            const std::int64_t slot = window.bring(row);
            const T* values = window.values + slot * window.width;
            const std::int32_t* counts = window.counts + slot * (window.width + 1);
            for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                const std::int64_t first = x * p.stride_w + j * p.dilation_w;
                taps.list[taps.count] = {values + first, weight + (i * p.kernel_w + j) * p.outputs};
                taps.count += counts[first + reach] != counts[first];
                if (taps.count == most_taps) flush();
            }
        }
        if (taps.count > 0 || !add) flush();
        x += positions;
    }
}

template <class T>
struct Scratch {
    T* window;
    std::int32_t* counts;
    std::int64_t* rows;
    T* results;
    T* whole;

    Scratch(const cpu::UnitDeltaScratch& sizes, void* memory)
        : window(static_cast<T*>(memory)),
          counts(reinterpret_cast<std::int32_t*>(window + sizes.window)),
          rows(reinterpret_cast<std::int64_t*>(window + sizes.window + sizes.counts)),
          results(window + sizes.window + sizes.counts + sizes.rows),
          whole(results + sizes.results) {}
};

// What happens to a row of sums: nothing (they are summed in place), or a run through the function
// and into the output's dtype. Where codes are wanted the results of a pair are gathered first.
template <class D>
struct Finish {
    using T = Compute<D>;
    const UnitDeltaParams& p;
    T* const whole;
    const bool coded;
    const ChangeRun run;

    Finish(const UnitDeltaParams& params, T* pair_results)
        : p(params),
          whole(pair_results),
          coded(p.codes.values != nullptr),
          run(p.base == nullptr && (coded || std::is_same_v<D, T>)
                  ? nullptr
                  : find_change_run(p.activation.kind, p.base_dtype, dtype_of<T>,
                                    coded ? dtype_of<T> : dtype_of<D>)) {}

    // Where the results for element `at` of pair `pair` go in the end, and where their sums go.
    void* target(std::int64_t pair, std::int64_t at) const {
        const std::int64_t row = p.out_h * p.out_w * p.outputs;
        if (coded) return whole + at;
        return static_cast<D*>(p.out) + pair * row + at;
    }
    T* sums(void* target, T* results) const {
        return run == nullptr ? static_cast<T*>(target) : results;
    }

    // Element `at` of the pair and those behind it.
    void operator()(std::int64_t pair, std::int64_t at, const T* results,
                    std::int64_t count) const {
        if (run == nullptr) return;
        const std::int64_t from = p.base_image[pair] * p.out_h * p.out_w * p.outputs + at;
        const char* base = static_cast<const char*>(p.base);
        run(base == nullptr ? base : base + from * item_size(p.base_dtype), results, nullptr,
            target(pair, at), count, {p.activation});
    }

    // After the last element of a pair.
    void close(std::int64_t pair) const {
        if constexpr (std::is_same_v<T, float>) {
            if (coded) encode(whole, p.out_h * p.out_w * p.outputs, pair, p.codes, p.out, p.dtype);
        }
    }
};

template <class D>
void run_maps(const UnitDeltaParams& p, const cpu::UnitDeltaScratch& sizes, void* memory,
              std::int64_t begin, std::int64_t end) {
    using T = Compute<D>;
    const Scratch<T> scratch(sizes, memory);
    const Finish<D> finish(p, scratch.whole);
    Window<T, D> window{p,
                        (p.kernel_h - 1) * p.dilation_h + 1,
                        (p.out_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1,
                        scratch.window,
                        scratch.counts,
                        scratch.rows,
                        nullptr};
    const std::int64_t row_size = p.out_w * p.outputs;
    const std::int64_t filter = p.kernel_h * p.kernel_w * p.outputs;
    for (std::int64_t pair = begin; pair < end; ++pair) {
        const std::int64_t column = p.column[pair];
        window.start(static_cast<const D*>(p.delta) + p.image[pair] * p.delta_strides[0] +
                     column * p.delta_strides[1]);
        const T* weight = static_cast<const T*>(p.weight) + p.channel[column] * filter;
        for (std::int64_t y = 0; y < p.out_h; ++y) {
            T* results = finish.sums(finish.target(pair, y * row_size), scratch.results);
            convolve_row(window, weight, y, results);
            finish(pair, y * row_size, results, row_size);
        }
        finish.close(pair);
    }
}

// Gathers the inputs of all taps of one pair, in the order of the weights.
template <class T, class D>
void gather(const UnitDeltaParams& p, std::int64_t pair, T* to) {
    const D* map = static_cast<const D*>(p.delta) + p.image[pair] * p.delta_strides[0] +
                   p.column[pair] * p.delta_strides[1];
    for (std::int64_t i = 0; i < p.kernel_h; ++i) {
        const std::int64_t y = i * p.dilation_h - p.padding_h;
        for (std::int64_t j = 0; j < p.kernel_w; ++j) {
            const std::int64_t x = j * p.dilation_w - p.padding_w;
            const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
            *to++ = inside
                        ? Window<T, D>::widen(map[y * p.delta_strides[2] + x * p.delta_strides[3]])
                        : T(0);
        }
    }
}

// Pairs with a single output position (a linear map, or a kernel as large as the map): pairs of the
// same column take the part of positions, so that they share the loads of the weights.
template <class D>
void run_single(const UnitDeltaParams& p, const cpu::UnitDeltaScratch& sizes, void* memory,
                std::int64_t begin, std::int64_t end) {
    using T = Compute<D>;
    const Scratch<T> scratch(sizes, memory);
    const Finish<D> finish(p, scratch.whole);
    const std::int64_t taps_per_pair = p.kernel_h * p.kernel_w;
    for (std::int64_t pair = begin; pair < end;) {
        const std::int64_t column = p.column[pair];
        std::int64_t run = 0;
        while (run < cpu::unit_delta_run && pair + run < end && p.column[pair + run] == column) {
            gather<T, D>(p, pair + run, scratch.window + run * taps_per_pair);
            ++run;
        }
        const T* weight =
            static_cast<const T*>(p.weight) + p.channel[column] * taps_per_pair * p.outputs;
        // Sums of several pairs may go where they belong only if nothing happens to them.
        const bool in_place = finish.run == nullptr && !finish.coded;
        T* results = in_place ? static_cast<T*>(finish.target(pair, 0)) : scratch.results;
        for (std::int64_t start = 0; start < taps_per_pair; start += most_taps) {
            const std::int64_t left = taps_per_pair - start;
            for (std::int64_t x = 0; x < run;) {
                const int positions = next_positions(run - x);
                Taps<T> taps;
                for (; taps.count < most_taps && taps.count < left; ++taps.count) {
                    const std::int64_t t = start + taps.count;
                    taps.list[taps.count] = {scratch.window + x * taps_per_pair + t,
                                             weight + t * p.outputs};
                }
                sum_positions(positions, taps, taps_per_pair, results + x * p.outputs, p.outputs,
                              p.outputs, start > 0);
                x += positions;
            }
        }
        for (std::int64_t x = 0; x < run; ++x) {
            T* own = results + x * p.outputs;
            finish(pair + x, 0, own, p.outputs);
            if (finish.coded && finish.run == nullptr) {
                for (std::int64_t o = 0; o < p.outputs; ++o) scratch.whole[o] = own[o];
            }
            finish.close(pair + x);
        }
        pair += run;
    }
}

}  // namespace

void unit_delta(const UnitDeltaParams& p, const cpu::UnitDeltaScratch& sizes, void* scratch,
                std::int64_t begin, std::int64_t end) {
    const auto run = [&](auto delta) {
        using D = typename decltype(delta)::type;
        if (p.out_h == 1 && p.out_w == 1) {
            run_single<D>(p, sizes, scratch, begin, end);
        } else {
            run_maps<D>(p, sizes, scratch, begin, end);
        }
    };
    switch (p.dtype) {
        case DType::float64:
            return run(Type<double>{});
        case DType::bfloat16:
            return run(Type<BFloat16>{});
        default:
            return run(Type<float>{});
    }
}

}  // namespace pyablate::PYABLATE_ISA
