// Runs of elements through f(base + d) - f(base), for the kernels that end in a function. They call
// it by pointer, a row or a block at a time, so that none is compiled once per function.
#pragma once

#include "pyablate/math.h"
#include "pyablate/tensor_view.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

// What happens to a run: f(base + d) - f(base) with d = delta * scale + addend * addend_scale.
struct Change {
    Activation activation;
    double scale = 1;
    double addend_scale = 1;
};

template <class P>
PYABLATE_INLINE Change change_of(const P& p, std::int64_t pair) {
    return {p.activation, p.scale == nullptr ? 1.0 : p.scale[pair],
            p.addend_scale == nullptr ? 1.0 : p.addend_scale[pair]};
}

// (base, delta, addend or null, out, count, change); out may be delta.
using ChangeRun = void (*)(const void*, const void*, const void*, void*, std::int64_t,
                           const Change&);

// The version for these dtypes; addend has that of delta.
ChangeRun find_change_run(ActivationKind kind, DType base, DType delta, DType out);

template <class S>
inline constexpr DType dtype_of = DType::float32;
template <>
inline constexpr DType dtype_of<double> = DType::float64;
template <>
inline constexpr DType dtype_of<BFloat16> = DType::bfloat16;

}  // namespace pyablate::PYABLATE_ISA
