#include "pyablate/class_moments.h"

#include <algorithm>
#include <limits>

#include "isa.h"
#include "parallel.h"
#include "pyablate/dispatch.h"

namespace pyablate::cpu {

namespace {

// Before the first image.
void clear(const ClassMomentsParams& p) {
    const std::int64_t cells = p.units * p.classes;
    dispatch_real("class_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        std::fill_n(static_cast<T*>(p.least), p.units, std::numeric_limits<T>::infinity());
    });
    std::fill_n(p.positive, p.units, 0);
    std::fill_n(p.total, cells, 0.0);
    std::fill_n(p.square, cells, 0.0);
    std::fill_n(p.maximum, cells, -std::numeric_limits<double>::infinity());
    std::fill_n(p.active, cells, 0);
}

}  // namespace

// Threads take whole units, so no two of them add to the same cell.
void class_moments(const ClassMomentsParams& p, int threads) {
    clear(p);
    const std::int64_t cost = p.images * (p.outer * p.inner / 8 + 8);
    parallel_for(
        p.units, piece_size(p.units, cost, threads), threads,
        [&](std::int64_t begin, std::int64_t end, int) { kernels().class_moments(p, begin, end); });
}

}  // namespace pyablate::cpu
