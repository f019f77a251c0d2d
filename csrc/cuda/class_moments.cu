#include "pyablate/class_moments.h"

#include <cmath>

#include "common.cuh"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// One thread per (unit, class) adds up in the order of the images, for the same bytes on every run; it
// reads N at a time. Neighbouring threads, in x the classes, read the same entries: a class more
// costs comparisons, no memory.
template <class T, int N>
__global__ void add_up(const ClassMomentsParams p) {
    for (std::int64_t u = first_row(); u < p.units; u += all_rows()) {
        const T* pooled = static_cast<const T*>(p.pooled) + u * p.images;
        const std::uint8_t* active = p.active + u * p.images;
#pragma unroll 1
        for (std::int64_t k = first_thread(); k < p.classes; k += all_threads()) {
            double total = 0, square = 0, maximum = -INFINITY;
            std::int64_t count = 0;
            for (std::int64_t n = 0; n < p.images; n += N) {
                std::int32_t label[N];
                T value[N];
                load(p.label + n, label);
                load(pooled + n, value);
                for (int i = 0; i < N; ++i) {
                    if (label[i] != k) continue;
                    const double v = static_cast<double>(value[i]);
                    total += v;
                    square += v * v;
                    maximum = v > maximum || v != v ? v : maximum;  // NaN stays
                    count += active[n + i];
                }
            }
            const std::int64_t at = u * p.classes + k;
            p.total[at] = total;
            p.square[at] = square;
            p.maximum[at] = maximum;
            p.active_images[at] = count;
        }
    }
}

}  // namespace

void class_moments(const ClassMomentsParams& p, int device, void* stream) {
    if (p.units * p.classes == 0) return;
    const DeviceGuard guard(device, "class_moments");
    dispatch_real("class_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        dispatch_width<4>(aligned(p.pooled, p.label) && p.images % 4 == 0, [&](auto n) {
            const Tiles on = tiles(p.classes, p.units);
            add_up<T, n()><<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH("class_moments");
}

}  // namespace pyablate::cuda
