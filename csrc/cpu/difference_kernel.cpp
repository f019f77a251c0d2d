#include "pyablate/difference.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// Stores f(clean, given) for each number of each item: a block of a run.
template <class V, class B, class G, class O, class F>
PYABLATE_INLINE void each(const DifferenceParams& p, std::int64_t begin, std::int64_t end, F&& f) {
    const std::int64_t size = cpu::activation_block, blocks = (p.width + size - 1) / size;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t start = item % blocks * size, row = item / blocks;
        const std::int64_t pair = row / p.runs, run = row % p.runs, left = p.width - start;
        const auto [base_outer, base_run] = p.base_strides;
        const B* clean =
            static_cast<const B*>(p.base) + p.image[pair] * base_outer + run * base_run + start;
        const G* given =
            static_cast<const G*>(p.given) + pair * p.strides.outer + run * p.strides.run + start;
        O* out = static_cast<O*>(p.out) + row * p.width + start;
        for_vectors<V>(left < size ? left : size,
                       [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
                           const V z = load_n<V>(clean + i, n);
                           store_n(out + i, f(z, load_n<V>(given + i, n)), n);
                       });
    }
}

}  // namespace

void perturbed(const DifferenceParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_change("perturbed", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using T = Compute<D>;
        using V = Vec<T, full_lanes<T>>;
        each<V, typename decltype(base)::type, D, T>(
            p, begin, end, [](V z, V change) PYABLATE_LAMBDA_INLINE { return z + change; });
    });
}

void subtracted(const DifferenceParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_change("subtracted", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using T = Compute<D>;
        using V = Vec<T, full_lanes<T>>;
        each<V, typename decltype(base)::type, T, D>(
            p, begin, end,
            [](V z, V y) PYABLATE_LAMBDA_INLINE { return where(y == z, V(0.0), y - z); });
    });
}

}  // namespace pyablate::PYABLATE_ISA
