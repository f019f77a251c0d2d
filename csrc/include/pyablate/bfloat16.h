// bfloat16: the upper half of a float. Conversions round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

#include "pyablate/host_device.h"

namespace pyablate {

struct BFloat16 {
    std::uint16_t bits;
};

// Compute<S>: what numbers that are stored as S are computed in.
template <class S>
struct ComputeOf {
    using type = S;
};
template <>
struct ComputeOf<BFloat16> {
    using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

PYABLATE_HOST_DEVICE inline float to_float(BFloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

PYABLATE_HOST_DEVICE inline BFloat16 to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};  // stay a quiet NaN
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<std::uint16_t>(bits >> 16)};
}

}  // namespace pyablate
