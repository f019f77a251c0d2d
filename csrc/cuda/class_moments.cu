#include <cmath>

#include "common.cuh"
#include "pyablate/class_moments.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// One thread per (unit, class) adds up in the order of the images, for the same bytes on every run.
// Neighbouring threads read the same entry: a class more costs a comparison, no memory.
template <class T>
__global__ void add_up(const ClassMomentsParams p) {
    for (std::int64_t i = first_thread(); i < p.units * p.classes; i += all_threads()) {
        const std::int64_t u = i / p.classes, k = i % p.classes;
        const T* pooled = static_cast<const T*>(p.pooled) + u * p.images;
        const std::uint8_t* active = p.active + u * p.images;
        double total = 0, square = 0, maximum = -INFINITY;
        std::int64_t count = 0;
        for (std::int64_t n = 0; n < p.images; ++n) {
            if (p.label[n] != k) continue;
            const double v = static_cast<double>(pooled[n]);
            total += v;
            square += v * v;
            maximum = v > maximum || v != v ? v : maximum;  // NaN stays
            count += active[n];
        }
        p.total[i] = total;
        p.square[i] = square;
        p.maximum[i] = maximum;
        p.active_images[i] = count;
    }
}

}  // namespace

void class_moments(const ClassMomentsParams& p, int device, void* stream) {
    if (p.units * p.classes == 0) return;
    const DeviceGuard guard(device, "class_moments");
    const auto on = static_cast<cudaStream_t>(stream);
    dispatch_real("class_moments", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto grid = static_cast<unsigned>(grid_size(p.units * p.classes, block_threads));
        add_up<T><<<grid, block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("class_moments");
    });
}

}  // namespace pyablate::cuda
