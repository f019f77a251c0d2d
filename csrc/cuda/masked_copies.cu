#include "pyablate/masked_copies.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

// A thread takes N neighbours of a row [units * inner] at a time. T stands for the bits of an
// element.
template <class T, int N>
__global__ void masked_copies_kernel(const MaskedCopiesParams p) {
    const std::int64_t width = p.units * p.inner;
    for (std::int64_t pair = first_plane(); pair < p.pairs; pair += all_planes()) {
        const std::int64_t image = p.image[pair], unit = p.unit[pair];
        const bool valid = in_range(image, p.images) && unit >= -1 && unit < p.units;
        // Elements that are replaced, of each row; none of unit -1.
        const std::int64_t first = unit * p.inner, last = unit < 0 ? first : first + p.inner;
        for (std::int64_t o = first_row(); o < p.outer; o += all_rows()) {
            const T* x = static_cast<const T*>(p.x) + ((valid ? image : 0) * p.outer + o) * width;
            T* out = static_cast<T*>(p.out) + (pair * p.outer + o) * width;
            const T* value = static_cast<const T*>(p.value);  // [], [P] or [P, outer, inner]
            std::int64_t next = 0;
            if (p.value_shape == ValueShape::per_pair) value += pair;
            if (p.value_shape == ValueShape::map_per_pair) {
                value += (pair * p.outer + o) * p.inner;
                next = 1;
            }
#pragma unroll 1
            for (std::int64_t i = N * first_thread(); i < width; i += N * all_threads()) {
                T bits[N];
                if (!valid) {  // all bits set: NaN in every floating dtype
                    for (int k = 0; k < N; ++k) bits[k] = static_cast<T>(~T(0));
                } else {
                    load(x + i, bits);
                    if (i < last && i + N > first) {
                        for (int k = 0; k < N; ++k) {
                            const bool replaced = i + k >= first && i + k < last;
                            if (replaced) bits[k] = value[(i + k - first) * next];
                        }
                    }
                }
                store(out + i, bits);
            }
        }
    }
}

template <class T>
void launch(const MaskedCopiesParams& p, cudaStream_t stream) {
    const std::int64_t width = p.units * p.inner;
    if (p.pairs * p.outer * width == 0) return;
    dispatch_width<wide<T>>(aligned(p.x, p.out) && width % wide<T> == 0, [&](auto n) {
        const Tiles on = tiles(width / n(), p.outer, p.pairs);
        masked_copies_kernel<T, n()><<<on.grid, on.block, 0, stream>>>(p);
    });
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
