// Copies of activations, each with one unit replaced.
//
//   out[p, o, c, i] = x[image[p], o, c, i]        for c != unit[p]
//                   = value of the pair           for c == unit[p]; unit -1 replaces nothing
//
// Elements are moved as bits of 2, 4 or 8 bytes (or 1), whatever they mean.
#pragma once

#include <cstdint>

namespace pyablate {

enum class ValueShape : int { one, per_pair, map_per_pair };

struct MaskedCopiesParams {
    const void* x;              // [N, outer, units, inner]
    const std::int32_t* image;  // [P], in [0, N)
    const std::int32_t* unit;   // [P], in [-1, units)
    const void* value;          // [], [P] or [P, outer, inner]
    void* out;                  // [P, outer, units, inner]
    std::int64_t images, pairs, outer, units, inner;
    ValueShape value_shape;
    int item_size;
};

namespace cpu {
void masked_copies(const MaskedCopiesParams& p, int threads);
}
namespace cuda {
void masked_copies(const MaskedCopiesParams& p, int device, void* stream);
}

}  // namespace pyablate
