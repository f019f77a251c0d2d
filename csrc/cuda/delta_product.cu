#include "pyablate/delta_product.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// N numbers of a run, or one of it N times.
template <int N, class S>
__device__ inline void load_or_spread(const S* run, std::int64_t i, bool spread, S (&values)[N]) {
    if (spread) {
        for (int k = 0; k < N; ++k) values[k] = *run;
    } else {
        load(run + i, values);
    }
}

template <class T>
__device__ inline T product_change(T a, T da, T b, T db) {
    const T change = da * (b + db) + a * db;
    if (change - change == 0) return change;
    const T before = a * b, after = (a + da) * (b + db);
    return after == before ? T(0) : after - before;
}

// Threads in x take a run, N neighbours at a time, those in y the runs of a pair, those in z the
// pairs.
template <class D, class B, int N>
__global__ void delta_product_kernel(const DeltaProductParams p) {
    using T = Compute<D>;
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const std::int64_t image = p.image[pair];
        const bool valid = in_range(image, p.images);
        const auto base = [&](const Factor& f, std::int64_t run) {
            return static_cast<const B*>(f.base) + (valid ? image * f.base_strides.outer : 0) +
                   run * f.base_strides.run;
        };
        const auto delta = [&](const Factor& f, std::int64_t run) {
            return static_cast<const D*>(f.delta) + pair * f.strides.outer + run * f.strides.run;
        };
        for (std::int64_t run = first_row(); run < p.runs; run += all_rows()) {
            const B *const a = base(p.first, run), *const b = base(p.second, run);
            const D *const da = delta(p.first, run), *const db = delta(p.second, run);
            D* const out = static_cast<D*>(p.out) + (pair * p.runs + run) * p.width;
#pragma unroll 1
            for (std::int64_t i = N * first_thread(); i < p.width; i += N * all_threads()) {
                D results[N];
                if (valid) {
                    B x[N], y[N];
                    D dx[N], dy[N];
                    load(a + i, x);
                    load(da + i, dx);
                    load_or_spread(b, i, p.spread, y);
                    load_or_spread(db, i, p.spread, dy);
                    for (int k = 0; k < N; ++k) {
                        results[k] = narrow<D>(product_change(T(widen(x[k])), widen(dx[k]),
                                                              T(widen(y[k])), widen(dy[k])));
                    }
                } else {
                    for (int k = 0; k < N; ++k) results[k] = not_a_number<D>();
                }
                store(out + i, results);
            }
        }
    }
}

// Whether N numbers at a time lie at multiples of N in every run.
bool packs(const DeltaProductParams& p, std::int64_t n) {
    const auto whole = [n](const Factor& f) {
        return aligned(f.base, f.delta) && f.base_strides.multiples_of(n) &&
               f.strides.multiples_of(n);
    };
    return p.width % n == 0 && aligned(p.out) && whole(p.first) && (p.spread || whole(p.second));
}

}  // namespace

void delta_product(const DeltaProductParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "delta_product");
    dispatch_gpu_change("delta_product", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        dispatch_width<wide<D>>(packs(p, wide<D>), [&](auto n) {
            const Tiles on = tiles(p.width / n(), p.runs, p.pairs);
            delta_product_kernel<D, B, n()>
                <<<on.grid, on.block, 0, static_cast<cudaStream_t>(stream)>>>(p);
        });
    });
    PYABLATE_CHECK_LAUNCH("delta_product");
}

}  // namespace pyablate::cuda
