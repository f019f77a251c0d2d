// Moments of pooled activations by unit and class, over the images with label[n] = k:
//
//   total, square[u, k]  = sum and sum of squares of pooled[u, n]
//   maximum[u, k]        = maximum of pooled[u, n]; minus infinity over no image, NaN if one is NaN
//   active_images[u, k]  = sum of active[u, n]
//
// Images are added up in their order, so any number of threads gives the same bytes.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct ClassMomentsParams {
    const void* pooled;           // [U, N], T = float or double
    const std::uint8_t* active;   // [U, N], 0 or 1
    const std::int32_t* label;    // [N], in [0, K)
    double* total;                // [U, K]
    double* square;               // [U, K]
    double* maximum;              // [U, K]
    std::int64_t* active_images;  // [U, K]
    std::int64_t units, images, classes;
    DType dtype;
};

namespace cpu {
void class_moments(const ClassMomentsParams& p, int threads);
}
namespace cuda {
void class_moments(const ClassMomentsParams& p, int device, void* stream);
}

}  // namespace pyablate
