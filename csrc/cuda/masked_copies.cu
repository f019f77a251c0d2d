#include "common.cuh"
#include "pyablate/masked_copies.h"

namespace pyablate::cuda {

namespace {

// One thread per element of out [P, outer, units, inner], neighbours next to each other, so that
// reads and writes are coalesced. T stands for the bits of an element.
template <class T>
__global__ void masked_copies_kernel(const MaskedCopiesParams p) {
    const T* __restrict__ x = static_cast<const T*>(p.x);          // [N, outer, units, inner]
    const T* __restrict__ value = static_cast<const T*>(p.value);  // [], [P] or [P, outer, inner]
    T* __restrict__ out = static_cast<T*>(p.out);
    const std::int64_t row = p.outer * p.units * p.inner;
    for (std::int64_t at = first_thread(); at < p.pairs * row; at += all_threads()) {
        const std::int64_t pair = at / row, rest = at % row;
        const std::int64_t inner = rest % p.inner;
        const std::int64_t unit = rest / p.inner % p.units;
        const std::int64_t outer = rest / p.inner / p.units;
        const std::int64_t image = p.image[pair];
        if (!in_range(image, p.images) || p.unit[pair] < -1 || p.unit[pair] >= p.units) {
            out[at] = static_cast<T>(~T(0));  // all bits set: NaN in every floating dtype
        } else if (unit != p.unit[pair]) {
            out[at] = x[image * row + rest];
        } else if (p.value_shape == ValueShape::one) {
            out[at] = value[0];
        } else if (p.value_shape == ValueShape::per_pair) {
            out[at] = value[pair];
        } else {
            out[at] = value[(pair * p.outer + outer) * p.inner + inner];
        }
    }
}

template <class T>
void launch(const MaskedCopiesParams& p, cudaStream_t stream) {
    const std::int64_t elements = p.pairs * p.outer * p.units * p.inner;
    if (elements == 0) return;
    const auto grid = static_cast<unsigned>(grid_size(elements, block_threads));
    masked_copies_kernel<T><<<grid, block_threads, 0, stream>>>(p);
    PYABLATE_CHECK_LAUNCH("masked_copies");
}

}  // namespace

void masked_copies(const MaskedCopiesParams& p, int device, void* stream) {
    const DeviceGuard guard(device, "masked_copies");
    const auto on = static_cast<cudaStream_t>(stream);
    switch (p.item_size) {
        case 1:
            return launch<std::uint8_t>(p, on);
        case 2:
            return launch<std::uint16_t>(p, on);
        case 4:
            return launch<std::uint32_t>(p, on);
        default:
            return launch<unsigned long long>(p, on);
    }
}

}  // namespace pyablate::cuda
