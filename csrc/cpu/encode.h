// Changes as codes, for the kernels that are asked for them; codes.h has the formula.
#pragma once

#include <cstdint>

#include "pyablate/codes.h"
#include "pyablate/tensor_view.h"

namespace pyablate::PYABLATE_ISA {

// Bits of the largest magnitude; magnitudes compare like the numbers that their bits spell, and
// infinities and NaN are the largest.
std::int32_t largest_bits(const float* change, std::int64_t count);

// Sets the scale of codes whose largest change has these bits; returns its inverse.
double code_inverse(std::int32_t most, float* scale);

void write_codes(const float* change, std::int64_t count, double inverse, std::uint8_t* codes);

// The codes of a pair's `count` changes, and the changes themselves into row `pair` of `out`, of
// `dtype`, unless that is null.
void encode(const float* change, std::int64_t count, std::int64_t pair, const Codes& codes,
            void* out, DType dtype);

}  // namespace pyablate::PYABLATE_ISA
