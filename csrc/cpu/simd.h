// Vectors of N lanes for the kernels, on the compilers' vector extension: one source for every
// instruction set. Included only by files compiled once per instruction set, and wholly inside a
// namespace of its name.
#pragma once

#include <cstdint>

#include "pyablate/bfloat16.h"

#ifndef PYABLATE_ISA
#error "compile with PYABLATE_ISA and PYABLATE_VECTOR_BYTES defined (see CMakeLists.txt)"
#endif

#define PYABLATE_INLINE inline __attribute__((always_inline))
#define PYABLATE_LAMBDA_INLINE __attribute__((always_inline))

namespace pyablate::PYABLATE_ISA {

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
    using type = std::int32_t;
};
template <>
struct IntegerOf<double> {
    using type = std::int64_t;
};

// Result of a comparison: all bits of a lane set where it holds.
template <class T, int N>
struct Mask {
    typedef typename IntegerOf<T>::type Native __attribute__((vector_size(sizeof(T) * N)));
    Native lanes;
};

template <class T, int N>
struct Vec {
    typedef T Native __attribute__((vector_size(sizeof(T) * N)));
    using Scalar = T;
    static constexpr int size = N;

    Native lanes;

    Vec() = default;
    PYABLATE_INLINE explicit Vec(double x) : lanes(Native{} + static_cast<T>(x)) {}
    PYABLATE_INLINE explicit Vec(Native x) : lanes(x) {}

    friend PYABLATE_INLINE Vec operator+(Vec a, Vec b) { return Vec(Native(a.lanes + b.lanes)); }
    friend PYABLATE_INLINE Vec operator-(Vec a, Vec b) { return Vec(Native(a.lanes - b.lanes)); }
    friend PYABLATE_INLINE Vec operator*(Vec a, Vec b) { return Vec(Native(a.lanes * b.lanes)); }
    friend PYABLATE_INLINE Vec operator/(Vec a, Vec b) { return Vec(Native(a.lanes / b.lanes)); }
    friend PYABLATE_INLINE Mask<T, N> operator>(Vec a, Vec b) { return {a.lanes > b.lanes}; }
    friend PYABLATE_INLINE Mask<T, N> operator<(Vec a, Vec b) { return {a.lanes < b.lanes}; }
    friend PYABLATE_INLINE Mask<T, N> operator==(Vec a, Vec b) { return {a.lanes == b.lanes}; }
    friend PYABLATE_INLINE Vec where(Mask<T, N> condition, Vec a, Vec b) {
        return Vec(Native(condition.lanes ? a.lanes : b.lanes));
    }
};

// One number in every lane. Taken from zeros: x - 0 is x, so that no instruction is spent on it,
// while 0 + x is another number for x = -0.
template <class V>
PYABLATE_INLINE V all_lanes(typename V::Scalar x) {
    return V(typename V::Native(x - typename V::Native{}));
}

// bfloat16 numbers as the upper halves of floats
template <int N>
struct Halves {
    typedef std::uint16_t Half __attribute__((vector_size(2 * N)));
    typedef std::uint32_t Whole __attribute__((vector_size(4 * N)));
};

// load and store widen bfloat16 to float and round it back; both take any alignment.

template <class V>
PYABLATE_INLINE V load(const typename V::Scalar* from) {
    V x;
    __builtin_memcpy(&x.lanes, from, sizeof x.lanes);
    return x;
}

template <class V>
PYABLATE_INLINE void store(typename V::Scalar* to, V x) {
    __builtin_memcpy(to, &x.lanes, sizeof x.lanes);
}

template <class V>
PYABLATE_INLINE V load(const BFloat16* from) {
    using Half = typename Halves<V::size>::Half;
    using Whole = typename Halves<V::size>::Whole;
    Half half;
    __builtin_memcpy(&half, from, sizeof half);
    const Whole whole = __builtin_convertvector(half, Whole) << 16;
    V x;
    __builtin_memcpy(&x.lanes, &whole, sizeof whole);
    return x;
}

template <class V>
PYABLATE_INLINE void store(BFloat16* to, V x) {
    using Half = typename Halves<V::size>::Half;
    using Whole = typename Halves<V::size>::Whole;
    Whole bits;
    __builtin_memcpy(&bits, &x.lanes, sizeof bits);
    const Whole nan = (bits >> 16) | 0x40u;
    const Whole rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Half half = __builtin_convertvector(x.lanes != x.lanes ? nan : rounded, Half);
    __builtin_memcpy(to, &half, sizeof half);
}

// The first n lanes only, n < V::size; the others are 0.
template <class V, class S>
PYABLATE_INLINE V load_some(const S* from, int n) {
    S lanes[V::size] = {};
    for (int i = 0; i < n; ++i) lanes[i] = from[i];
    return load<V>(lanes);
}

template <class V, class S>
PYABLATE_INLINE void store_some(S* to, V x, int n) {
    S lanes[V::size];
    store(lanes, x);
    for (int i = 0; i < n; ++i) to[i] = lanes[i];
}

// A full register of T, and the least vector in use: what is narrower is loaded in part.
template <class T>
constexpr int full_lanes = PYABLATE_VECTOR_BYTES / static_cast<int>(sizeof(T));
template <class T>
constexpr int least_lanes = 16 / static_cast<int>(sizeof(T));

// Calls f(V{}, offset, n) over [0, count): full registers first, then halves of them, at the end a
// part of n < V::size lanes. Everywhere else n == V::size.
template <class T, int N = full_lanes<T>, class F>
PYABLATE_INLINE void for_each_vector(std::int64_t count, F&& f, std::int64_t begin = 0) {
    std::int64_t i = begin;
    for (; i + N <= count; i += N) f(Vec<T, N>{}, i, N);
    if (i == count) return;
    if constexpr (N > least_lanes<T>) {
        for_each_vector<T, N / 2>(count, f, i);
    } else {
        f(Vec<T, N>{}, i, static_cast<int>(count - i));
    }
}

template <class V, class S>
PYABLATE_INLINE V load_n(const S* from, int n) {
    return n == V::size ? load<V>(from) : load_some<V>(from, n);
}

template <class V, class S>
PYABLATE_INLINE void store_n(S* to, V x, int n) {
    if (n == V::size) {
        store(to, x);
    } else {
        store_some(to, x, n);
    }
}

// Calls f(offset, n) over [0, count) in steps of V. The whole ones see a constant n, so that their
// loads and stores are single instructions; the last may be a part.
template <class V, class F>
PYABLATE_INLINE void for_vectors(std::int64_t count, F&& f) {
    std::int64_t i = 0;
    for (; i + V::size <= count; i += V::size) f(i, V::size);
    if (i < count) f(i, static_cast<int>(count - i));
}

}  // namespace pyablate::PYABLATE_ISA
