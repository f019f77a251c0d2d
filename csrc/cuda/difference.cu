#include "pyablate/difference.h"

#include "common.cuh"

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

template <class D, class B, int N, bool BEHIND>
__global__ void difference_kernel(const DifferenceParams p) {
    using T = Compute<D>;
    if constexpr (BEHIND) {
        each<B, T, D, N>(p, [](T clean, T after) {
            return after == clean ? T(0) : static_cast<T>(after - clean);
        });
    } else {
        each<B, D, T, N>(p, [](T clean, T change) { return clean + change; });
    }
}

// Whether N numbers at a time lie at multiples of N in every run.
bool packs(const DifferenceParams& p, std::int64_t n) {
    return aligned(p.base, p.given, p.out) && p.width % n == 0 && p.base_strides.multiples_of(n) &&
           p.strides.multiples_of(n);
}

// Behind f its change is taken, before it the change added to what it reads.
template <bool BEHIND>
void launch(const char* op, const DifferenceParams& p, int device, void* stream) {
    const DeviceGuard guard(device, op);
    dispatch_gpu_change(op, p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        dispatch_width<wide<D>>(packs(p, wide<D>), [&](auto n) {
            const Tiles on = tiles(p.width / n(), p.runs, p.pairs);
            difference_kernel<D, B, n(), BEHIND>
                <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH(op);
}

}  // namespace

void perturbed(const DifferenceParams& p, int device, void* stream) {
    launch<false>("perturbed", p, device, stream);
}

void subtracted(const DifferenceParams& p, int device, void* stream) {
    launch<true>("subtracted", p, device, stream);
}

}  // namespace pyablate::cuda
