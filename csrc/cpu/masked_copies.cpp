#include "pyablate/masked_copies.h"

#include <cstring>

#include "parallel.h"

namespace pyablate::cpu {

namespace {

// T stands for the bits of an element.
template <class T>
void copy_pair(const MaskedCopiesParams& p, std::int64_t pair) {
    const std::int64_t row = p.outer * p.units * p.inner;
    T* out = static_cast<T*>(p.out) + pair * row;
    std::memcpy(out, static_cast<const T*>(p.x) + p.image[pair] * row,
                static_cast<std::size_t>(row) * sizeof(T));
    const std::int64_t unit = p.unit[pair];
    if (unit < 0) return;
    const T* value = static_cast<const T*>(p.value);
    if (p.value_shape == ValueShape::per_pair) value += pair;
    if (p.value_shape == ValueShape::map_per_pair) value += pair * p.outer * p.inner;
    const std::int64_t step = p.value_shape == ValueShape::map_per_pair ? 1 : 0;
    for (std::int64_t o = 0; o < p.outer; ++o) {
        T* to = out + (o * p.units + unit) * p.inner;
        for (std::int64_t i = 0; i < p.inner; ++i) {
            to[i] = *value;
            value += step;
        }
    }
}

template <class T>
void copy_pairs(const MaskedCopiesParams& p, int threads) {
    const std::int64_t cost = p.outer * p.units * p.inner / 8 + 16;
    parallel_for(p.pairs, piece_size(p.pairs, cost, threads), threads,
                 [&](std::int64_t begin, std::int64_t end, int) {
                     for (std::int64_t pair = begin; pair < end; ++pair) copy_pair<T>(p, pair);
                 });
}

}  // namespace

void masked_copies(const MaskedCopiesParams& p, int threads) {
    switch (p.item_size) {
        case 1:
            return copy_pairs<std::uint8_t>(p, threads);
        case 2:
            return copy_pairs<std::uint16_t>(p, threads);
        case 4:
            return copy_pairs<std::uint32_t>(p, threads);
        default:
            return copy_pairs<std::uint64_t>(p, threads);
    }
}

}  // namespace pyablate::cpu
