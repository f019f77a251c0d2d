// float16: 5 bits of exponent, 10 of fraction. Conversions round to nearest, ties to even; what is
// too large becomes infinity, and what is small a subnormal number. For GPUs, which convert by one
// instruction; elsewhere the same is spelt out, without subnormal floats, which may be flushed.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "pyablate/bfloat16.h"
#include "pyablate/host_device.h"

namespace pyablate {

struct Float16 {
    std::uint16_t bits;
};

template <>
struct ComputeOf<Float16> {
    using type = float;
};

namespace float16 {

PYABLATE_HOST_DEVICE inline float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
PYABLATE_HOST_DEVICE inline std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

constexpr std::uint32_t one_half = 0x3f000000u;  // 0.5f: its last digit is that of the subnormals
constexpr std::uint32_t least = 0x38800000u;     // 2^-14, the least that is not subnormal
constexpr std::uint32_t rebias = (127u - 15u) << 23;

}  // namespace float16

PYABLATE_HOST_DEVICE inline float to_float(Float16 x) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(x.bits));
#else
    using namespace float16;
    const std::uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    std::uint32_t bits = (magnitude << 13) + rebias;
    if (magnitude >= 0x7c00u) bits += rebias;  // infinity and NaN
    if (magnitude < 0x400u) bits = to_bits(from_bits(one_half | magnitude) - 0.5f);
    return from_bits(sign | bits);
#endif
}

PYABLATE_HOST_DEVICE inline Float16 to_float16(float x) {
#ifdef __CUDA_ARCH__
    return {__half_as_ushort(__float2half_rn(x))};
#else
    using namespace float16;
    const std::uint32_t sign = to_bits(x) >> 16 & 0x8000u, magnitude = to_bits(x) & 0x7fffffffu;
    std::uint32_t bits = 0x7e00u;  // a quiet NaN
    if (magnitude < least) {
        bits = to_bits(from_bits(magnitude) + 0.5f) - one_half;
    } else if (x == x) {
        const std::uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
        bits = (rounded - rebias) >> 13;
        if (bits > 0x7c00u) bits = 0x7c00u;
    }
    return {static_cast<std::uint16_t>(sign | bits)};
#endif
}

}  // namespace pyablate
