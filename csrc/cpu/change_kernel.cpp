#include "change.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "vector_math.h"

namespace pyablate::PYABLATE_ISA {

namespace {

template <ActivationKind K, class B, class D, class O>
void change_run(const void* base_, const void* delta_, const void* addend_, void* out_,
                std::int64_t count, const Activation& f) {
    using V = Vec<Compute<D>, full_lanes<Compute<D>>>;
    const B* base = static_cast<const B*>(base_);
    const D* delta = static_cast<const D*>(delta_);
    const D* addend = static_cast<const D*>(addend_);
    O* out = static_cast<O*>(out_);
    const V a(f.a), b(f.b);
    const auto step = [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        V d = load_n<V>(delta + i, n);
        if (addend != nullptr) d = d + load_n<V>(addend + i, n);
        if constexpr (K != ActivationKind::identity) {
            d = activate_change<K>(load_n<V>(base + i, n), d, a, b);
        }
        store_n(out + i, d, n);
    };
    std::int64_t i = 0;
    for (; i + V::size <= count; i += V::size) step(i, V::size);
    if (i < count) step(i, static_cast<int>(count - i));
}

template <class B, class D, class O>
ChangeRun find(ActivationKind kind) {
    ChangeRun found = nullptr;
    dispatch_activation(kind, [&](auto k) { found = change_run<decltype(k)::value, B, D, O>; });
    return found;
}

}  // namespace

ChangeRun find_change_run(ActivationKind kind, DType base, DType delta, DType out) {
    ChangeRun found = nullptr;
    dispatch_change("delta_activation", delta, base, [&](auto d, auto b) {
        using D = typename decltype(d)::type;
        using B = typename decltype(b)::type;
        if (out == delta) {
            found = find<B, D, D>(kind);
        } else if constexpr (std::is_same_v<D, float>) {
            if (out == DType::bfloat16) found = find<B, float, BFloat16>(kind);
        }
    });
    if (found == nullptr) fail_no_version("delta_activation", delta, out);
    return found;
}

// Items are the blocks of the rows of [P, M], row by row.
void delta_activation(const DeltaActivationParams& p, std::int64_t begin, std::int64_t end) {
    const ChangeRun run = find_change_run(p.activation.kind, p.base_dtype, p.dtype, p.dtype);
    const auto bytes = [](DType dtype) {
        return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
    };
    const std::int64_t size = bytes(p.dtype), base_size = bytes(p.base_dtype);
    const std::int64_t block = cpu::activation_block;
    const std::int64_t blocks = (p.width + block - 1) / block;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t pair = item / blocks;
        const std::int64_t start = item % blocks * block;
        const std::int64_t left = p.width - start;
        const std::int64_t at = (pair * p.width + start) * size;
        const char* addend = static_cast<const char*>(p.addend);
        run(static_cast<const char*>(p.base) + (p.image[pair] * p.width + start) * base_size,
            static_cast<const char*>(p.delta) + at, addend == nullptr ? addend : addend + at,
            static_cast<char*>(p.out) + at, left < block ? left : block, p.activation);
    }
}

}  // namespace pyablate::PYABLATE_ISA
