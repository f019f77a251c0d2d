// exp, expm1, tanh and erf on vectors: polynomials for float, the C library lane by lane for double
// (only the few pairs that are rescued in float64 come here).
#pragma once

#include <initializer_list>
#include <type_traits>

#include "simd.h"

namespace pyablate::PYABLATE_ISA {

template <class T, int N, class F>
PYABLATE_INLINE Vec<T, N> lane_by_lane(Vec<T, N> x, F f) {
    Vec<T, N> y;
    for (int i = 0; i < N; ++i) y.lanes[i] = f(x.lanes[i]);
    return y;
}

// x = n ln 2 + r with n whole and |r| <= ln(2) / 2.
template <int N>
struct Reduced {
    Vec<float, N> r;
    typename Mask<float, N>::Native n;
};

template <int N>
PYABLATE_INLINE Reduced<N> reduce(Vec<float, N> x) {
    using V = Vec<float, N>;
    // Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to a whole number, which also
    // stands in its low bits.
    const V magic(12582912.0);
    const V shifted = x * V(1.44269504088896341) + magic;
    const V n = shifted - magic;
    // ln 2 in two parts; the first has 9 zero bits at its end, so that n times it is exact.
    const V r = (x - n * V(0.693145751953125)) - n * V(1.42860682030941723e-6);
    typename Mask<float, N>::Native bits, magic_bits;
    __builtin_memcpy(&bits, &shifted.lanes, sizeof bits);
    __builtin_memcpy(&magic_bits, &magic.lanes, sizeof bits);
    return {r, bits - magic_bits};
}

// 2^n for n in [-126, 127]
template <int N>
PYABLATE_INLINE Vec<float, N> power_of_two(typename Mask<float, N>::Native n) {
    const typename Mask<float, N>::Native bits = (n + 127) << 23;
    Vec<float, N> x;
    __builtin_memcpy(&x.lanes, &bits, sizeof bits);
    return x;
}

// e^r - 1 for |r| <= ln(2) / 2: the Taylor series to r^7, whose remainder is below 6e-9 of r.
template <int N>
PYABLATE_INLINE Vec<float, N> expm1_reduced(Vec<float, N> r) {
    using V = Vec<float, N>;
    V sum(1.0 / 5040);
    for (double term : {1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 1.0 / 2}) sum = sum * r + V(term);
    return sum * r * r + r;
}

template <class V>
PYABLATE_INLINE V bounded(V x, double low, double high) {
    x = where(x < V(low), V(low), x);
    return where(x > V(high), V(high), x);  // a NaN stays
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> exp(Vec<T, N> x) {
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_exp(y); });
    } else {
        // Beyond these bounds the result is 0 or infinite; the power of two is applied in halves
        // because the result may be subnormal.
        const Reduced<N> reduced = reduce(bounded(x, -104.0, 89.0));
        const auto half = reduced.n >> 1;
        const Vec<T, N> mantissa = expm1_reduced(reduced.r) + Vec<T, N>(1.0);
        return mantissa * power_of_two<N>(half) * power_of_two<N>(reduced.n - half);
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> expm1(Vec<T, N> x) {
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_expm1(y); });
    } else {
        // e^x - 1 = 2^n (e^r - 1) + (2^n - 1); used for x up to 20 only
        const Reduced<N> reduced = reduce(bounded(x, -80.0, 80.0));
        const Vec<T, N> scale = power_of_two<N>(reduced.n);
        return scale * expm1_reduced(reduced.r) + (scale - Vec<T, N>(1.0));
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> tanh(Vec<T, N> x) {
    using V = Vec<T, N>;
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_tanh(y); });
    } else {
        const V twice = expm1(bounded(x, -10.0, 10.0) * V(2.0));  // tanh(10) rounds to 1
        return twice / (twice + V(2.0));
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> erf(Vec<T, N> x) {
    using V = Vec<T, N>;
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_erf(y); });
    } else {
        // |x| < 1: the Taylor series, (2 / sqrt pi) sum (-1)^n x^(2n+1) / (n! (2n+1)), to n = 10
        const V square = x * x;
        V near(1.48071928e-8);
        for (double term :
             {-1.63658447e-7, 1.64621144e-6, -1.49256504e-5, 1.20552333e-4, -8.54832702e-4,
              5.22397763e-3, -2.68661706e-2, 0.112837917, -0.376126389, 1.12837917}) {
            near = near * square + V(term);
        }
        near = near * x;
        // |x| >= 1: 1 - exp(-h(|x|)) with h = -log erfc, interpolated at 60 Chebyshev nodes of
        // [1, 4] by degree 9 in u = (|x| - 2.5) / 1.5; the error is 2 units of 2^-24. erf(4) is 1.
        const V size = where(x < V(0.0), V(0.0) - x, x);
        const V u = (bounded(size, 1.0, 4.0) - V(2.5)) * V(1.0 / 1.5);
        V h(2.5306717e-6);
        for (double term : {-4.13666348e-5, 2.21709401e-4, -8.81570857e-4, 3.19474330e-3,
                            -1.09611231e-2, 3.66463102e-2, 2.12376070, 8.02902126, 7.80681515}) {
            h = h * u + V(term);
        }
        const V far = V(1.0) - exp(V(0.0) - h);
        const V signed_far = where(x < V(0.0), V(0.0) - far, far);
        return where(size < V(1.0), near, signed_far);
    }
}

}  // namespace pyablate::PYABLATE_ISA
