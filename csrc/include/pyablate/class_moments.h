// Moments of activations by unit and class, in one reading of the maps.
//
//   pooled[n, c]      = mean of x[n, :, c, :]
//   least[c]          = min of x[:, :, c, :]
//   positive[c]       = entries of x[:, :, c, :] above 0
//   total, square, maximum[c, k] = sum, sum of squares, maximum of pooled[n, c] over label[n] = k;
//                       the maximum over no image is minus infinity
//   active[c, k]      = images with label[n] = k and some entry of x[n, :, c, :] above 0
//
// Images are added up in their order, so any number of threads gives the same bytes. NaN entries
// are neither above 0 nor the least. At least one image, unit and position.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct ClassMomentsParams {
    const void* x;              // [N, outer, units, inner], T = float or double
    const std::int32_t* label;  // [N], in [0, K)
    void* pooled;               // T [N, units]
    void* least;                // T [units]
    std::int64_t* positive;     // [units]
    double* total;              // [units, K]
    double* square;             // [units, K]
    double* maximum;            // [units, K]
    std::int64_t* active;       // [units, K]
    std::int64_t images, outer, units, inner, classes;
    DType dtype;
};

namespace cpu {
void class_moments(const ClassMomentsParams& p, int threads);
}
namespace cuda {
void class_moments(const ClassMomentsParams& p, int device, void* stream);
}

}  // namespace pyablate
