// exp, expm1, tanh and erf on vectors: polynomials for float, the C library lane by lane for double
// (only the few pairs that are rescued in float64 come here).
#pragma once

#include <type_traits>

#include "simd.h"
#ifdef __FMA__
#include <immintrin.h>
#endif

namespace pyablate::PYABLATE_ISA {

template <class T, int N, class F>
PYABLATE_INLINE Vec<T, N> lane_by_lane(Vec<T, N> x, F f) {
    Vec<T, N> y;
    for (int i = 0; i < N; ++i) y.lanes[i] = f(x.lanes[i]);
    return y;
}

// a * b + c, rounded once where the processor can: contraction is off here (CMakeLists.txt). The
// instruction is named because GCC does not always make vectors of scalar calls of fma.
template <int N>
PYABLATE_INLINE Vec<float, N> multiply_add(Vec<float, N> a, Vec<float, N> b, Vec<float, N> c) {
#ifdef __AVX512F__
    if constexpr (N == 16) return Vec<float, N>(_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes));
#endif
#ifdef __FMA__
    if constexpr (N == 8) return Vec<float, N>(_mm256_fmadd_ps(a.lanes, b.lanes, c.lanes));
#endif
    return a * b + c;
}

// Coefficients from the highest on.
template <class V, class... C>
PYABLATE_INLINE V polynomial(V x, double highest, C... lower) {
    V sum(highest);
    ((sum = multiply_add(sum, x, V(lower))), ...);
    return sum;
}

template <int N>
using Bits = typename Mask<float, N>::Native;

template <int N>
PYABLATE_INLINE Bits<N> bits_of(Vec<float, N> x) {
    return reinterpret_cast<Bits<N>>(x.lanes);
}

template <int N>
PYABLATE_INLINE Vec<float, N> from_bits(Bits<N> bits) {
    using V = Vec<float, N>;
    return V(reinterpret_cast<typename V::Native>(bits));
}

// x = n ln 2 + r with n whole, in [-127, 128], and |r| <= ln(2) / 2; power is 2^n, but 0 for the
// lowest n and infinite for the highest.
template <int N>
struct Reduced {
    Vec<float, N> r, power;
};

template <int N>
PYABLATE_INLINE Reduced<N> reduce(Vec<float, N> x) {
    using V = Vec<float, N>;
    // Adding 1.5 * 2^23 leaves no fraction bits: the sum is rounded to a whole number, which also
    // stands in its low bits. With 127 more it is the exponent of 2^n.
    const V magic(12582912.0 + 127);
    const V shifted = multiply_add(x, V(1.44269504088896341), magic);
    const V n = shifted - magic;
    // ln 2 in two parts; the first has 9 zero bits at its end, so that n times it is exact.
    const V nearly = multiply_add(n, V(-0.693145751953125), x);
    const V r = multiply_add(n, V(-1.42860682030941723e-6), nearly);
    return {r, from_bits<N>(bits_of(shifted) << 23)};
}

// e^r - 1 = r + r^2 p(r) for |r| <= ln(2) / 2. p is a least squares fit at 800 Chebyshev nodes, in
// float64, reweighted until the relative error of e^r - 1 was even: 0.3 units of 2^-24.
template <int N>
PYABLATE_INLINE Vec<float, N> expm1_reduced(Vec<float, N> r) {
    const auto p =
        polynomial(r, 0.00138825201, 0.00836652052, 0.0416672006, 0.166665435, 0.49999997);
    return multiply_add(p * r, r, r);
}

template <class V>
PYABLATE_INLINE V bounded(V x, double low, double high) {
    x = where(x < V(low), V(low), x);
    return where(x > V(high), V(high), x);  // a NaN stays
}

// For floats, 0 from about 2^-126.5 down and infinite from 2^127.5 up.
template <class T, int N>
PYABLATE_INLINE Vec<T, N> exp(Vec<T, N> x) {
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_exp(y); });
    } else {
        const auto [r, power] = reduce(bounded(x, -88.0, 89.0));
        return (expm1_reduced(r) + Vec<T, N>(1.0)) * power;
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> expm1(Vec<T, N> x) {
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_expm1(y); });
    } else {
        // e^x - 1 = 2^n (e^r - 1) + (2^n - 1). At the bounds tanh has long been 1, and elu -alpha.
        const auto [r, power] = reduce(bounded(x, -80.0, 80.0));
        return multiply_add(power, expm1_reduced(r), power - Vec<T, N>(1.0));
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> tanh(Vec<T, N> x) {
    using V = Vec<T, N>;
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_tanh(y); });
    } else {
        const V twice = expm1(x + x);
        return twice / (twice + V(2.0));
    }
}

template <class T, int N>
PYABLATE_INLINE Vec<T, N> erf(Vec<T, N> x) {
    using V = Vec<T, N>;
    if constexpr (std::is_same_v<T, double>) {
        return lane_by_lane(x, [](double y) { return __builtin_erf(y); });
    } else {
        // erf a = 1 - (1 - a q(a))^8 for a = |x| up to 4, where it is 1. erfc^(1/8) is smooth enough
        // for a q of degree 7. With u = -a q(a), (1 + u)^2 - 1 = u^2 + 2 u keeps the digits near 0,
        // and errors of u fade as erf nears 1. q is a least squares fit at 1200 Chebyshev nodes, in
        // float64, reweighted until the relative error of erf was even, the last digits searched:
        // 0.12 units of 2^-24, 0.9 near 0 (where 2 / sqrt(pi) is rounded). All in all the absolute
        // error of erf is 1.9 units at most, 2.2 without multiply_add's instruction.
        const Bits<N> bits = bits_of(x), magnitude = Bits<N>{} + 0x7fffffff;
        const V size = from_bits<N>(bits & magnitude);
        const V a = where(size > V(4.0), V(4.0), size);  // a NaN stays
        V u = a * polynomial(a, -4.80036624e-6, 8.8872177e-5, -5.12835977e-4, 1.86492602e-4,
                             6.5892702e-3, -2.08904222e-3, -6.9630377e-2, -0.141047388);
        for (int i = 0; i < 3; ++i) u = multiply_add(u, u, u + u);
        return from_bits<N>((bits_of(u) & magnitude) | (bits & ~magnitude));
    }
}

}  // namespace pyablate::PYABLATE_ISA
