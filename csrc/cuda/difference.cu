#include "pyablate/difference.h"

#include "common.cuh"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

// Calls f(clean, given) -> result for each number, N neighbours of a run at a time: threads in x
// take the run, those in y the runs of a pair, those in z the pairs.
template <class B, class G, class O, int N, class F>
__device__ inline void each(const DifferenceParams& p, F&& f) {
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const std::int64_t image = p.image[pair];
        const bool valid = in_range(image, p.images);
        for (std::int64_t run = first_row(); run < p.runs; run += all_rows()) {
            const B* base = static_cast<const B*>(p.base) +
                            (valid ? image * p.base_strides.outer : 0) + run * p.base_strides.run;
            const G* given =
                static_cast<const G*>(p.given) + pair * p.strides.outer + run * p.strides.run;
            O* out = static_cast<O*>(p.out) + (pair * p.runs + run) * p.width;
#pragma unroll 1
            for (std::int64_t i = N * first_thread(); i < p.width; i += N * all_threads()) {
                O results[N];
                if (valid) {
                    B clean[N];
                    G values[N];
                    load(base + i, clean);
                    load(given + i, values);
                    for (int k = 0; k < N; ++k) {
                        results[k] = narrow<O>(f(Compute<O>(widen(clean[k])), widen(values[k])));
                    }
                } else {
                    for (int k = 0; k < N; ++k) results[k] = not_a_number<O>();
                }
                store(out + i, results);
            }
        }
    }
}

template <class D, class B, int N>
__global__ void perturbed_kernel(const DifferenceParams p) {
    using T = Compute<D>;
    each<B, D, T, N>(p, [](T clean, T change) { return clean + change; });
}

template <class D, class B, int N>
__global__ void subtracted_kernel(const DifferenceParams p) {
    using T = Compute<D>;
    each<B, T, D, N>(
        p, [](T clean, T after) { return after == clean ? T(0) : static_cast<T>(after - clean); });
}

// Whether N numbers at a time lie at multiples of N in every run.
bool packs(const DifferenceParams& p, std::int64_t n) {
    const auto fit = [n](const RunStrides& s) { return s.outer % n == 0 && s.run % n == 0; };
    return aligned(p.base, p.given, p.out) && p.width % n == 0 && fit(p.base_strides) &&
           fit(p.strides);
}

}  // namespace

void perturbed(const DifferenceParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "perturbed");
    dispatch_gpu_change("perturbed", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        dispatch_width<wide<D>>(packs(p, wide<D>), [&](auto n) {
            const Tiles on = tiles(p.width / n(), p.runs, p.pairs);
            perturbed_kernel<D, B, n()>
                <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH("perturbed");
}

void subtracted(const DifferenceParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "subtracted");
    dispatch_gpu_change("subtracted", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        dispatch_width<wide<D>>(packs(p, wide<D>), [&](auto n) {
            const Tiles on = tiles(p.width / n(), p.runs, p.pairs);
            subtracted_kernel<D, B, n()>
                <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH("subtracted");
}

}  // namespace pyablate::cuda
