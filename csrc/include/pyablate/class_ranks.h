// What the order of the images by a unit's activation tells about the classes.
//
// The images of a unit are put in order by falling x[u, n]; of equal ones, the first comes first,
// and -0 equals 0. For each of them, greater and at_least are the numbers of images with greater x
// and with x at least as great, itself included.
//
//   rank_sum[u, k]     = sum of greater + at_least over label[n] = k: each twice a rank, less one
//   gain[u, k]         = max over label[n] = k of N h[n] - count[k] at_least[n], where h[n] are the
//                        images of class k with x at least as great; 0 for a class without images.
//                        Divided by count[k] (N - count[k]) it is the largest difference between
//                        the shares of the class and of the others that pass a threshold.
//   first[u, k]        = images of class k among the first `top`
//   quantiles[u, b, k] = images of class k with (N - at_least) B / N, rounded down, equal to b
//   widths[u, b]       = images with (x - low) / (high - low) B, rounded down, at most B - 1, equal
//                        to b; low and high are the least and the greatest x; 0 where they are
//                        equal
//
// Integers, but for the place among the widths, which is computed in double: every backend gives the
// same bytes. NaN is greater than all numbers and equals NaN; the width of what has no place is 0.
#pragma once

#include <cstdint>

#include "pyablate/host_device.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

struct ClassRanksParams {
    const void* x;              // [U, N], T = float or double
    const std::int32_t* label;  // [N], in [0, K)
    const std::int64_t* count;  // [K], images of each class
    std::int64_t* rank_sum;     // [U, K]
    std::int64_t* gain;         // [U, K]
    std::int32_t* first;        // [U, K]
    std::int32_t* quantiles;    // [U, B, K]
    std::int32_t* widths;       // [U, B]
    std::int64_t units, images, classes, bins, top;
    std::int64_t* scratch;  // [workers, class_ranks_scratch(...)]
    std::int64_t workers;   // threads at most, or blocks of a GPU
    DType dtype;
};

// Bits that order as unsigned integers do, the greatest number first, and what they belong to; moved
// by one access.
template <class T>
struct Ranked;
template <>
struct alignas(8) Ranked<float> {
    using Bits = std::uint32_t;
    Bits bits;
    std::int32_t label;
};
template <>
struct Ranked<double> {
    using Bits = std::uint64_t;
    Bits bits;
    std::int64_t label;
};

// Elements of int64 that a worker needs: the images twice, for sorting to and fro, and a counter
// per class.
PYABLATE_HOST_DEVICE constexpr std::int64_t class_ranks_scratch(std::int64_t images,
                                                                std::int64_t classes, DType dtype) {
    return 2 * images * (dtype == DType::float64 ? 2 : 1) + classes;
}

template <class T>
PYABLATE_HOST_DEVICE inline typename Ranked<T>::Bits falling_bits(T x) {
    using Bits = typename Ranked<T>::Bits;
    constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
    x = x + T(0);  // -0 becomes 0
    Bits bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    const Bits falling = (bits & sign) != 0 ? bits : ~(bits | sign);
    return x != x ? 0 : falling;
}

template <class T>
PYABLATE_HOST_DEVICE inline T from_falling_bits(typename Ranked<T>::Bits bits) {
    using Bits = typename Ranked<T>::Bits;
    constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1);
    bits = (bits & sign) != 0 ? bits : ~bits & ~sign;
    T x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// The bin of equal width that holds x.
PYABLATE_HOST_DEVICE inline std::int64_t width_bin(double x, double low, double high,
                                                   std::int64_t bins) {
    const double place = (x - low) / (high - low) * static_cast<double>(bins);
    if (!(place >= 0)) return 0;  // 0 / 0 too
    return place < static_cast<double>(bins) ? static_cast<std::int64_t>(place) : bins - 1;
}

namespace cpu {
void class_ranks(const ClassRanksParams& p, int threads);
}
namespace cuda {
void class_ranks(const ClassRanksParams& p, int device, void* stream);
}

}  // namespace pyablate
