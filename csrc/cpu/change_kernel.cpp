#include "change.h"

#include "pyablate/dispatch.h"
#include "vector_math.h"

namespace pyablate::PYABLATE_ISA {

namespace {

template <ActivationKind K, class B, class D, class O>
void change_run(const void* base_, const void* delta_, const void* addend_, void* out_,
                std::int64_t count, const Change& change) {
    using V = Vec<Compute<D>, full_lanes<Compute<D>>>;
    const B* base = static_cast<const B*>(base_);
    const D* delta = static_cast<const D*>(delta_);
    const D* addend = static_cast<const D*>(addend_);
    O* out = static_cast<O*>(out_);
    const V a(change.activation.a), b(change.activation.b);
    const V scale(change.scale), addend_scale(change.addend_scale);
    for_vectors<V>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        V d = load_n<V>(delta + i, n) * scale;
        if (addend != nullptr) d = d + load_n<V>(addend + i, n) * addend_scale;
        if constexpr (K != ActivationKind::identity) {
            d = activate_change<K>(load_n<V>(base + i, n), d, a, b);
        }
        store_n(out + i, d, n);
    });
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
        } else if constexpr (std::is_same_v<D, BFloat16>) {
            if (out == DType::float32) found = find<B, BFloat16, float>(kind);
        }
    });
    if (found == nullptr) fail_no_version("delta_activation", delta, out);
    return found;
}

}  // namespace pyablate::PYABLATE_ISA
