#include "pyablate/class_moments.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

#include "parallel.h"
#include "pyablate/dispatch.h"

namespace pyablate::cpu {

namespace {

constexpr int lanes = 16;    // partial results that the compiler can keep in vectors
constexpr int columns = 64;  // units that are read side by side where they lie last
constexpr int flush = 1024;  // elements after which a float sum goes into a double

// What the entries of some maps come down to.
template <class T>
struct Sums {
    double sum = 0;
    T least = std::numeric_limits<T>::infinity();
    std::int64_t positive = 0;
};

// Adds `count` consecutive entries.
template <class T>
void add_row(const T* x, std::int64_t count, Sums<T>& to) {
    // Counts in an integer of the entries' own width, so that one mask serves both.
    using Count = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;
    T low[lanes];
    std::fill(low, low + lanes, to.least);
    std::int64_t i = 0;
    while (i + lanes <= count) {
        T sum[lanes] = {};
        Count positive[lanes] = {};
        const std::int64_t end = std::min(count, i + flush);
        for (; i + lanes <= end; i += lanes) {
            for (int j = 0; j < lanes; ++j) {
                const T v = x[i + j];
                sum[j] += v;
                low[j] = v < low[j] ? v : low[j];
                positive[j] += v > T(0) ? Count(1) : Count(0);
            }
        }
        for (int j = 0; j < lanes; ++j) {
            to.sum += static_cast<double>(sum[j]);
            to.positive += positive[j];
        }
    }
    for (int j = 0; j < lanes; ++j) to.least = std::min(to.least, low[j]);
    for (; i < count; ++i) {
        to.sum += static_cast<double>(x[i]);
        to.least = x[i] < to.least ? x[i] : to.least;
        to.positive += x[i] > T(0);
    }
}

// One unit on one image into the tables; p.label[n] says where.
template <class T>
void record(const ClassMomentsParams& p, std::int64_t n, std::int64_t c, const Sums<T>& map) {
    const T mean = static_cast<T>(map.sum / static_cast<double>(p.outer * p.inner));
    const double wide = static_cast<double>(mean);
    const std::int64_t cell = c * p.classes + p.label[n];
    T* least = static_cast<T*>(p.least);
    static_cast<T*>(p.pooled)[n * p.units + c] = mean;
    least[c] = map.least < least[c] ? map.least : least[c];
    p.positive[c] += map.positive;
    p.total[cell] += wide;
    p.square[cell] += wide * wide;
    p.maximum[cell] = std::max(p.maximum[cell], wide);
    p.active[cell] += map.positive > 0;
}

// Units [first, last) on image n, whose maps are runs of consecutive entries.
template <class T>
void read_rows(const ClassMomentsParams& p, std::int64_t n, std::int64_t first, std::int64_t last) {
    for (std::int64_t c = first; c < last; ++c) {
        Sums<T> map;
        for (std::int64_t o = 0; o < p.outer; ++o) {
            const T* x = static_cast<const T*>(p.x) + ((n * p.outer + o) * p.units + c) * p.inner;
            add_row(x, p.inner, map);
        }
        record(p, n, c, map);
    }
}

// The same where the units lie side by side (inner = 1): up to `columns` of them at a time.
template <class T>
void read_columns(const ClassMomentsParams& p, std::int64_t n, std::int64_t first,
                  std::int64_t last) {
    for (std::int64_t c = first; c < last; c += columns) {
        const int width = static_cast<int>(std::min<std::int64_t>(columns, last - c));
        double sum[columns] = {};
        T low[columns];
        std::int32_t positive[columns] = {};
        std::int64_t counts[columns] = {};
        std::fill(low, low + columns, std::numeric_limits<T>::infinity());
        const T* x = static_cast<const T*>(p.x) + n * p.outer * p.units + c;
        for (std::int64_t o = 0; o < p.outer; ++o, x += p.units) {
            for (int j = 0; j < width; ++j) {
                sum[j] += static_cast<double>(x[j]);
                low[j] = x[j] < low[j] ? x[j] : low[j];
                positive[j] += x[j] > T(0) ? 1 : 0;
            }
            if ((o & 0xFFFFFFF) == 0xFFFFFFF) {  // long before 32 bits overflow
                for (int j = 0; j < width; ++j) counts[j] += std::exchange(positive[j], 0);
            }
        }
        for (int j = 0; j < width; ++j) {
            record(p, n, c + j, Sums<T>{sum[j], low[j], counts[j] + positive[j]});
        }
    }
}

template <class T>
void run(const ClassMomentsParams& p, int threads) {
    const std::int64_t cost = p.images * p.outer * p.inner / 4;
    // Threads take whole units, so no two of them add to the same cell.
    const std::int64_t piece = piece_size(p.units, cost, threads);
    const auto work = [&](std::int64_t begin, std::int64_t end, int) {
        T* least = static_cast<T*>(p.least);
        std::fill(least + begin, least + end, std::numeric_limits<T>::infinity());
        std::fill(p.positive + begin, p.positive + end, 0);
        const std::int64_t cells = (end - begin) * p.classes, at = begin * p.classes;
        std::fill(p.total + at, p.total + at + cells, 0.0);
        std::fill(p.square + at, p.square + at + cells, 0.0);
        std::fill(p.active + at, p.active + at + cells, 0);
        std::fill(p.maximum + at, p.maximum + at + cells, -std::numeric_limits<double>::infinity());
        for (std::int64_t n = 0; n < p.images; ++n) {
            if (p.inner == 1) {
                read_columns<T>(p, n, begin, end);
            } else {
                read_rows<T>(p, n, begin, end);
            }
        }
    };
    parallel_for(p.units, piece, threads, work);
}

}  // namespace

void class_moments(const ClassMomentsParams& p, int threads) {
    dispatch_real("class_moments", p.dtype,
                  [&](auto type) { run<typename decltype(type)::type>(p, threads); });
}

}  // namespace pyablate::cpu
