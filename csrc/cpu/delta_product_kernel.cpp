#include "pyablate/delta_product.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// The second factor's numbers: neighbours, or one of them for all.
template <bool SPREAD, class V, class S>
PYABLATE_INLINE V second(const S* from, std::int64_t i, int n) {
    if constexpr (SPREAD) {
        return all_lanes<V>(load_some<V>(from, 1).lanes[0]);
    } else {
        return load_n<V>(from + i, n);
    }
}

template <bool SPREAD, class D, class B>
void product_run(const B* a, const D* da, const B* b, const D* db, D* out, std::int64_t count) {
    using V = Vec<Compute<D>, full_lanes<Compute<D>>>;
    for_vectors<V>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        const V x = load_n<V>(a + i, n), dx = load_n<V>(da + i, n), none(0.0);
        const V y = second<SPREAD, V>(b, i, n), dy = second<SPREAD, V>(db, i, n);
        const V change = dx * (y + dy) + x * dy;
        const V before = x * y, after = (x + dx) * (y + dy);
        const V otherwise = where(after == before, none, after - before);
        store_n(out + i, where(change - change == none, change, otherwise), n);
    });
}

template <bool SPREAD, class D, class B>
void product_items(const DeltaProductParams& p, std::int64_t begin, std::int64_t end) {
    const std::int64_t size = cpu::activation_block, blocks = (p.width + size - 1) / size;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t start = item % blocks * size, row = item / blocks;
        const std::int64_t pair = row / p.runs, run = row % p.runs, image = p.image[pair];
        const std::int64_t left = p.width - start, beside = SPREAD ? 0 : start;
        const auto base = [&](const Factor& f) {
            return static_cast<const B*>(f.base) + image * f.base_strides.outer +
                   run * f.base_strides.run;
        };
        const auto delta = [&](const Factor& f) {
            return static_cast<const D*>(f.delta) + pair * f.strides.outer + run * f.strides.run;
        };
        product_run<SPREAD>(base(p.first) + start, delta(p.first) + start, base(p.second) + beside,
                            delta(p.second) + beside,
                            static_cast<D*>(p.out) + row * p.width + start,
                            left < size ? left : size);
    }
}

}  // namespace

void delta_product(const DeltaProductParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_change("delta_product", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        const auto items = p.spread ? product_items<true, D, B> : product_items<false, D, B>;
        items(p, begin, end);
    });
}

}  // namespace pyablate::PYABLATE_ISA
