#include "pyablate/classify.h"

#include "pyablate/dispatch.h"
#include "top_two.cuh"

namespace pyablate::cuda {

namespace {

// One warp per pair; a lane takes N classes at a time.
template <class T, int N>
__global__ void classify_kernel(const ClassifyParams p) {
    const std::int64_t step = all_threads() / warp_threads;
    for (std::int64_t pair = first_thread() / warp_threads; pair < p.pairs; pair += step) {
        const std::int64_t image = p.image[pair];
        if (!in_range(image, p.images)) {
            if (lane() == 0) p.out[pair] = -1;
            continue;
        }
        const T* __restrict__ logits = static_cast<const T*>(p.logits) + image * p.classes;
        const T* __restrict__ delta = static_cast<const T*>(p.delta) + pair * p.classes;
        T limit = static_cast<const T*>(p.tolerance)[image];
        if (p.relative != 0) {
            T high = -infinity<T>(), low = -infinity<T>();  // low: of the negated changes
            for (std::int64_t k = N * lane(); k < p.classes; k += N * warp_threads) {
                T d[N];
                load(delta + k, d);
                for (int i = 0; i < N; ++i) {
                    high = larger(high, d[i]);
                    low = larger(low, -d[i]);
                }
            }
            limit = limit + static_cast<T>(p.relative) * (warp_max(high) + warp_max(low));
        }
        const auto value = [&](std::int64_t k, T(&x)[N]) {
            T d[N];
            load(logits + k, x);
            load(delta + k, d);
            for (int i = 0; i < N; ++i) x[i] = changed(x[i], d[i]);
        };
        const std::int32_t decision = decide<T, N>(p.classes, limit, value);
        if (lane() == 0) p.out[pair] = decision;
    }
}

}  // namespace

void classify(const ClassifyParams& p, int device, void* stream) {
    if (p.pairs == 0) return;
    const DeviceGuard guard(device, "classify");
    const auto grid = static_cast<unsigned>(grid_size(p.pairs, block_threads / warp_threads));
    dispatch_real("classify", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const bool packs = aligned(p.logits, p.delta) && p.classes % wide<T> == 0;
        dispatch_width<wide<T>>(packs, [&](auto n) {
            classify_kernel<T, n()>
                <<<grid, block_threads, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH("classify");
}

}  // namespace pyablate::cuda
