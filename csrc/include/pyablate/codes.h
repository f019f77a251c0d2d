// A change in 8 bits per number, with a scale per pair so that small changes keep their digits:
//
//   d[p, m] ~ scale[p] * (values[p, m] - 128),   scale[p] = max over m of |d[p, m]| / 127
//
// This is what an 8-bit convolution reads. A pair without any change has scale 0, one with a NaN or
// an infinity has a scale that is NaN, so that nothing is decided by it; the values of either are
// all code_zero.
#pragma once

#include <cstdint>

namespace pyablate {

struct Codes {
    std::uint8_t* values = nullptr;  // [P, ...] as the change itself, or null: none are wanted
    float* scale = nullptr;          // [P]
};

constexpr int code_zero = 128;
constexpr int code_most = 127;

}  // namespace pyablate
