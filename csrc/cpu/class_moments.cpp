#include "pyablate/class_moments.h"

#include <algorithm>
#include <limits>

#include "parallel.h"
#include "pyablate/dispatch.h"

namespace pyablate::cpu {

namespace {

template <class T>
void add_up(const ClassMomentsParams& p, std::int64_t u) {
    const T* pooled = static_cast<const T*>(p.pooled) + u * p.images;
    const std::uint8_t* active = p.active + u * p.images;
    double* total = p.total + u * p.classes;
    double* square = p.square + u * p.classes;
    double* maximum = p.maximum + u * p.classes;
    std::int64_t* active_images = p.active_images + u * p.classes;
    std::fill_n(total, p.classes, 0.0);
    std::fill_n(square, p.classes, 0.0);
    std::fill_n(maximum, p.classes, -std::numeric_limits<double>::infinity());
    std::fill_n(active_images, p.classes, 0);
    for (std::int64_t n = 0; n < p.images; ++n) {
        const std::int32_t k = p.label[n];
        const double v = static_cast<double>(pooled[n]);
        total[k] += v;
        square[k] += v * v;
        maximum[k] = v > maximum[k] || v != v ? v : maximum[k];  // NaN stays
        active_images[k] += active[n];
    }
}

}  // namespace

void class_moments(const ClassMomentsParams& p, int threads) {
    dispatch_real("class_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        parallel_for(p.units, piece_size(p.units, p.images * 8 + p.classes * 4, threads), threads,
                     [&](std::int64_t begin, std::int64_t end, int) {
                         for (std::int64_t u = begin; u < end; ++u) add_up<T>(p, u);
                     });
    });
}

}  // namespace pyablate::cpu
