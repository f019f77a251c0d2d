// A dense delta through a 3 x 3 convolution of stride 1, by Winograd's minimal filtering
// F(4 x 4, 3 x 3) (Lavin and Gray 2016), and what follows:
//
//   d[p]   = convolution of delta[p] with the filters (+ addend[p])
//   out[p] = d[p],   or   f(base[image[p]] + d[p]) - f(base[image[p]])
//
// A tile of 6 x 6 inputs and the filters are transformed, multiplied element by element and summed
// over input channels, and the sums transformed back to 4 x 4 outputs: 36 products instead of 144.
// Rounding errors are some ten times those of a sum in order. A tile whose inputs are all zero
// is looked at once and done. CPU and float32 only.
#pragma once

#include <cstdint>

#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

// Output channels whose filters lie together.
constexpr std::int64_t winograd_panel = 16;
// Numbers of a transformed tile or filter.
constexpr std::int64_t winograd_parts = 36;

struct DeltaWinogradParams {
    const float* delta;         // [P, H, W, C]
    const float* filters;       // [36, panels, C, 16], zeros beyond the O channels
    const void* base;           // [N, Ho, Wo, O] or null: no function follows
    const float* addend;        // [P, Ho, Wo, O] or null
    const std::int32_t* image;  // [P], in [0, N), or null without base
    float* out;                 // [P, Ho, Wo, O]
    std::int64_t pairs, height, width, inputs, outputs;
    std::int64_t out_h, out_w, padding_h, padding_w;
    Activation activation;
    DType base_dtype;  // float32 or bfloat16
};

namespace cpu {
void delta_winograd(const DeltaWinogradParams& p, int threads);
}

}  // namespace pyablate
