// What each unit's map is on each image, in one reading of the maps.
//
//   pooled[c, n] = mean of x[n, :, c, :]
//   active[c, n] = 1 if some entry of x[n, :, c, :] is above 0, else 0
//   least[c]     = min of what it was and x[:, :, c, :]
//   positive[c] += entries of x[:, :, c, :] above 0
//
// The rows of pooled and active are parts of longer ones: batch after batch goes into the same
// tables. Any number of threads gives the same bytes. NaN entries are not above 0, and make the
// mean and the least NaN; so does one that was NaN. At least one image, unit and position.
#pragma once

#include <cstdint>

#include "pyablate/tensor_view.h"

namespace pyablate {

struct MapMomentsParams {
    const void* x;           // [N, outer, units, inner], T = float or double
    void* pooled;            // T [units, N]
    std::uint8_t* active;    // [units, N]
    void* least;             // T [units]
    std::int64_t* positive;  // [units]
    std::int64_t images, outer, units, inner;
    std::int64_t pooled_row, active_row;  // elements from one unit to the next
    DType dtype;
};

namespace cpu {
void map_moments(const MapMomentsParams& p, int threads);
}
namespace cuda {
void map_moments(const MapMomentsParams& p, int device, void* stream);
}

}  // namespace pyablate
