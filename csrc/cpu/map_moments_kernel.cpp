#include "pyablate/map_moments.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// As many lanes on every instruction set, so that sums are added in one order everywhere.
template <class T>
constexpr int lanes = 64 / static_cast<int>(sizeof(T));

constexpr std::int64_t flush = 1024;  // entries of a lane before its sum goes into a double

// What the entries of some maps come down to.
template <class T>
struct Sums {
    double sum = 0;
    T least = static_cast<T>(__builtin_inf());
    std::int64_t positive = 0;
};

template <class T>
PYABLATE_INLINE void add_entry(T v, Sums<T>& to) {
    to.sum += static_cast<double>(v);
    to.least = v < to.least ? v : to.least;
    to.positive += v > T(0);
}

// Sums, minima and counts of N columns: as a rule, a vector's worth.
template <class T, int N = lanes<T>>
struct Columns {
    using V = Vec<T, N>;
    using Counts = typename Mask<T, N>::Native;

    V sum{0.0};
    V least{__builtin_inf()};
    Counts positive{};

    PYABLATE_INLINE void add(V v) {
        sum = sum + v;
        least = where(v < least, v, least);
        positive -= (v > V(0.0)).lanes;  // a true lane is -1
    }
};

template <class Half, class Whole>
PYABLATE_INLINE Half half_of(const Whole& whole, int which) {
    Half half;
    __builtin_memcpy(&half, reinterpret_cast<const char*>(&whole) + which * sizeof half,
                     sizeof half);
    return half;
}

// Adds the columns of one run to each other, halves upon halves; in registers, since maps may have
// few entries.
template <class T, int N>
PYABLATE_INLINE void fold(const Columns<T, N>& columns, Sums<T>& to) {
    if constexpr (N == 1) {
        to.sum += static_cast<double>(columns.sum.lanes[0]);
        to.least = columns.least.lanes[0] < to.least ? columns.least.lanes[0] : to.least;
        to.positive += columns.positive[0];
    } else {
        using Half = Columns<T, N / 2>;
        using V = typename Half::V;
        const auto part = [&](int which) {
            return Half{half_of<V>(columns.sum, which), half_of<V>(columns.least, which),
                        half_of<typename Half::Counts>(columns.positive, which)};
        };
        Half low = part(0);
        const Half high = part(1);
        low.sum = low.sum + high.sum;
        low.least = where(high.least < low.least, high.least, low.least);
        low.positive += high.positive;
        fold<T, N / 2>(low, to);
    }
}

// Adds `count` consecutive entries of one map.
template <class T>
PYABLATE_INLINE void add_run(const T* x, std::int64_t count, Sums<T>& to) {
    constexpr int n = lanes<T>;
    std::int64_t i = 0;
    while (i + n <= count) {
        const std::int64_t stop = i + n * flush < count ? i + n * flush : count;
        Columns<T> columns;
        for (; i + n <= stop; i += n) columns.add(load<typename Columns<T>::V>(x + i));
        fold<T, lanes<T>>(columns, to);
    }
    for (; i < count; ++i) add_entry(x[i], to);
}

// Called where a sum is NaN: that may be of infinities too.
template <class T>
bool has_nan(const MapMomentsParams& p, std::int64_t n, std::int64_t c) {
    bool found = false;
    for (std::int64_t o = 0; o < p.outer; ++o) {
        const T* x = static_cast<const T*>(p.x) + ((n * p.outer + o) * p.units + c) * p.inner;
        for (std::int64_t i = 0; i < p.inner; ++i) found = found || x[i] != x[i];
    }
    return found;
}

// One unit on one image into the tables.
template <class T>
PYABLATE_INLINE void record(const MapMomentsParams& p, std::int64_t n, std::int64_t c,
                            const Sums<T>& map) {
    T* least = static_cast<T*>(p.least);
    const double mean = map.sum / static_cast<double>(p.outer * p.inner);
    static_cast<T*>(p.pooled)[c * p.pooled_row + n] = static_cast<T>(mean);
    p.active[c * p.active_row + n] = map.positive > 0;
    least[c] = map.least < least[c] ? map.least : least[c];
    p.positive[c] += map.positive;
    if (mean != mean && has_nan<T>(p, n, c)) least[c] = static_cast<T>(mean);
}

// One unit whose map is runs of consecutive entries.
template <class T>
PYABLATE_INLINE void read_map(const MapMomentsParams& p, std::int64_t n, std::int64_t c) {
    Sums<T> map;
    for (std::int64_t o = 0; o < p.outer; ++o) {
        add_run(static_cast<const T*>(p.x) + ((n * p.outer + o) * p.units + c) * p.inner, p.inner,
                map);
    }
    record(p, n, c, map);
}

// A vector's worth of units that lie side by side (inner = 1).
template <class T>
PYABLATE_INLINE void read_columns(const MapMomentsParams& p, std::int64_t n, std::int64_t c) {
    constexpr int width = lanes<T>;
    Sums<T> maps[width];
    for (std::int64_t first = 0; first < p.outer; first += flush) {
        const std::int64_t stop = first + flush < p.outer ? first + flush : p.outer;
        Columns<T> columns;
        for (std::int64_t o = first; o < stop; ++o) {
            const T* x = static_cast<const T*>(p.x) + (n * p.outer + o) * p.units + c;
            columns.add(load<typename Columns<T>::V>(x));
        }
        T sum[width], least[width];
        store(sum, columns.sum);
        store(least, columns.least);
        for (int j = 0; j < width; ++j) {
            maps[j].sum += static_cast<double>(sum[j]);
            maps[j].least = least[j] < maps[j].least ? least[j] : maps[j].least;
            maps[j].positive += columns.positive[j];
        }
    }
    for (int j = 0; j < width; ++j) record(p, n, c + j, maps[j]);
}

template <class T>
void run(const MapMomentsParams& p, std::int64_t begin, std::int64_t end) {
    // The last images first: of maps that were just written they are what the caches still hold.
    for (std::int64_t n = p.images - 1; n >= 0; --n) {
        std::int64_t c = begin;
        if (p.inner == 1) {
            for (; c + lanes<T> <= end; c += lanes<T>) read_columns<T>(p, n, c);
        }
        for (; c < end; ++c) read_map<T>(p, n, c);
    }
}

}  // namespace

// Items are units.
void map_moments(const MapMomentsParams& p, std::int64_t begin, std::int64_t end) {
    if (p.dtype == DType::float64) {
        run<double>(p, begin, end);
    } else {
        run<float>(p, begin, end);
    }
}

}  // namespace pyablate::PYABLATE_ISA
