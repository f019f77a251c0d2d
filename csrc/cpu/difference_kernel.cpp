#include "pyablate/difference.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// Calls f(base, given, out, count) on each item: a block of a run.
template <class B, class G, class O, class F>
PYABLATE_INLINE void each_block(const DifferenceParams& p, std::int64_t begin, std::int64_t end,
                                F&& f) {
    const std::int64_t size = cpu::activation_block, blocks = (p.width + size - 1) / size;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t start = item % blocks * size, row = item / blocks;
        const std::int64_t pair = row / p.runs, run = row % p.runs, left = p.width - start;
        const auto [base_outer, base_run] = p.base_strides;
        f(static_cast<const B*>(p.base) + p.image[pair] * base_outer + run * base_run + start,
          static_cast<const G*>(p.given) + pair * p.strides.outer + run * p.strides.run + start,
          static_cast<O*>(p.out) + row * p.width + start, left < size ? left : size);
    }
}

}  // namespace

void perturbed(const DifferenceParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_change("perturbed", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        using T = Compute<D>;
        using V = Vec<T, full_lanes<T>>;
        each_block<B, D, T>(
            p, begin, end, [](const B* clean, const D* change, T* out, std::int64_t count) {
                for_vectors<V>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
                    const V z = load_n<V>(clean + i, n);
                    store_n(out + i, z + load_n<V>(change + i, n), n);
                });
            });
    });
}

void subtracted(const DifferenceParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_change("subtracted", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        using T = Compute<D>;
        using V = Vec<T, full_lanes<T>>;
        each_block<B, T, D>(
            p, begin, end, [](const B* clean, const T* after, D* out, std::int64_t count) {
                for_vectors<V>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
                    const V y = load_n<V>(after + i, n);
                    const V z = load_n<V>(clean + i, n);
                    store_n(out + i, where(y == z, V(0.0), y - z), n);
                });
            });
    });
}

}  // namespace pyablate::PYABLATE_ISA
