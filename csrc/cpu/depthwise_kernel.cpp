// A depthwise convolution: see depthwise.h. Channels fill the vectors; a few columns of an output
// row are summed together, so that they share the loads of the filters.
#include "pyablate/depthwise.h"

#include "isa.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

constexpr int most_columns = 4;
constexpr int most_taps = 64;  // summed in one go; larger filters take several

struct Taps {
    struct Tap {
        const double* input;  // of the first column
        const double* weight;
    };
    Tap list[most_taps];
    int count = 0;
};

// Sums of `Columns` columns, whose inputs lie `step` apart, for the n channels from c on; `more` adds
// to those that are there.
template <class V, int Columns>
PYABLATE_INLINE void sum_channels(const Taps& taps, std::int64_t step, std::int64_t channels,
                                  std::int64_t c, int n, bool more, double* to) {
    V sum[Columns];
    for (int k = 0; k < Columns; ++k) {
        sum[k] = more ? load_n<V>(to + k * channels + c, n) : V(0.0);
    }
    for (int t = 0; t < taps.count; ++t) {
        const V weight = load_n<V>(taps.list[t].weight + c, n);
        const double* input = taps.list[t].input + c;
        for (int k = 0; k < Columns; ++k) {
            sum[k] = sum[k] + load_n<V>(input + k * step, n) * weight;
        }
    }
    for (int k = 0; k < Columns; ++k) store_n(to + k * channels + c, sum[k], n);
}

template <int Columns>
void sum_taps(const Taps& taps, std::int64_t step, std::int64_t channels, bool more, double* to) {
    const auto some = [&](auto vector, std::int64_t c, int n) PYABLATE_LAMBDA_INLINE {
        sum_channels<decltype(vector), Columns>(taps, step, channels, c, n, more, to);
    };
    for_each_vector<double>(channels, some);
}

// The output row `y` of an image.
struct Row {
    const DepthwiseParams& p;
    const std::int64_t image, y;

    std::int64_t input_column(std::int64_t x, std::int64_t j) const {
        return x * p.stride_w + j * p.dilation_w - p.padding_w;
    }
    bool inside(std::int64_t x, std::int64_t j) const {
        const std::int64_t at = input_column(x, j);
        return at >= 0 && at < p.width;
    }

    // How many columns from x on are summed together: all of them see all of the filter's columns.
    int columns_at(std::int64_t x) const {
        const std::int64_t last = x + most_columns - 1;
        const bool whole = last < p.out_w && inside(x, 0) && inside(last, p.kernel_w - 1);
        return whole ? most_columns : 1;
    }

    void sum(std::int64_t x, int columns) const {
        Taps taps;
        bool more = false;
        double* to =
            static_cast<double*>(p.out) + ((image * p.out_h + y) * p.out_w + x) * p.channels;
        const auto flush = [&] {
            const std::int64_t step = p.stride_w * p.channels;
            columns == 1 ? sum_taps<1>(taps, step, p.channels, more, to)
                         : sum_taps<most_columns>(taps, step, p.channels, more, to);
            taps.count = 0;
            more = true;
        };
        for (std::int64_t i = 0; i < p.kernel_h; ++i) {
            const std::int64_t from = y * p.stride_h + i * p.dilation_h - p.padding_h;
            if (from < 0 || from >= p.height) continue;
            const double* row =
                static_cast<const double*>(p.x) + (image * p.height + from) * p.width * p.channels;
            for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                if (!inside(x, j)) continue;
                if (taps.count == most_taps) flush();
                taps.list[taps.count++] = {
                    row + input_column(x, j) * p.channels,
                    static_cast<const double*>(p.filters) + (i * p.kernel_w + j) * p.channels};
            }
        }
        if (taps.count > 0 || !more) flush();
    }
};

}  // namespace

// Items are output rows, image by image.
void depthwise(const DepthwiseParams& p, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = begin; r < end; ++r) {
        const Row row{p, r / p.out_h, r % p.out_h};
        for (std::int64_t x = 0; x < p.out_w;) {
            const int columns = row.columns_at(x);
            row.sum(x, columns);
            x += columns;
        }
    }
}

}  // namespace pyablate::PYABLATE_ISA
