#include "pyablate/class_ranks.h"

#include <algorithm>
#include <utility>

#include "parallel.h"
#include "pyablate/dispatch.h"

namespace pyablate::cpu {

namespace {

// What one thread works in.
template <class T>
struct Room {
    Ranked<T>* images;   // [N]
    Ranked<T>* spare;    // [N]
    std::int64_t* hits;  // [K]
};

template <class T>
Room<T> room_of(const ClassRanksParams& p, std::int64_t worker) {
    std::int64_t* own = p.scratch + worker * class_ranks_scratch(p.images, p.classes, p.dtype);
    auto* images = reinterpret_cast<Ranked<T>*>(own + p.classes);
    return {images, images + p.images, own};
}

// Sorts by bits, byte after byte from the lowest; equal ones keep their order. A byte that is the
// same everywhere, such as that of the exponents, costs nothing.
template <class T>
Ranked<T>* sorted(const ClassRanksParams& p, std::int64_t u, const Room<T>& room) {
    constexpr int bytes = sizeof(typename Ranked<T>::Bits);
    const T* x = static_cast<const T*>(p.x) + u * p.images;
    std::int64_t starts[bytes][256] = {};
    for (std::int64_t n = 0; n < p.images; ++n) {
        const auto bits = falling_bits(x[n]);
        room.images[n] = {bits, p.label[n]};
        for (int byte = 0; byte < bytes; ++byte) ++starts[byte][bits >> (8 * byte) & 255];
    }
    Ranked<T>*from = room.images, *to = room.spare;
    for (int byte = 0; byte < bytes; ++byte) {
        std::int64_t* start = starts[byte];
        if (start[from[0].bits >> (8 * byte) & 255] == p.images) continue;
        std::int64_t before = 0;
        for (int digit = 0; digit < 256; ++digit) {
            before += std::exchange(start[digit], before);
        }
        for (std::int64_t n = 0; n < p.images; ++n) {
            to[start[from[n].bits >> (8 * byte) & 255]++] = from[n];
        }
        std::swap(from, to);
    }
    return from;
}

// Counts the images in their order, those of equal x together.
template <class T>
void count(const ClassRanksParams& p, std::int64_t u, const Ranked<T>* images, std::int64_t* hits) {
    std::int64_t* rank_sum = p.rank_sum + u * p.classes;
    std::int64_t* gain = p.gain + u * p.classes;
    std::int32_t* widths = p.widths + u * p.bins;
    std::fill_n(hits, p.classes, 0);
    const double high = static_cast<double>(from_falling_bits<T>(images[0].bits));
    const double low = static_cast<double>(from_falling_bits<T>(images[p.images - 1].bits));
    std::int64_t bin = p.bins - 1, next = 0;
    for (std::int64_t first = 0; first < p.images; first = next) {
        const auto bits = images[first].bits;
        next = first + 1;
        while (next < p.images && images[next].bits == bits) ++next;
        while ((p.images - next) * p.bins < bin * p.images) --bin;
        std::int32_t* quantile = p.quantiles + (u * p.bins + bin) * p.classes;
        for (std::int64_t n = first; n < next; ++n) {
            const auto k = images[n].label;
            ++hits[k];
            ++quantile[k];
            rank_sum[k] += first + next;
        }
        for (std::int64_t n = first; n < next; ++n) {
            const auto k = images[n].label;
            gain[k] = std::max(gain[k], p.images * hits[k] - p.count[k] * next);
        }
        const double value = static_cast<double>(from_falling_bits<T>(bits));
        widths[width_bin(value, low, high, p.bins)] += static_cast<std::int32_t>(next - first);
    }
}

template <class T>
void rank(const ClassRanksParams& p, std::int64_t u, const Room<T>& room) {
    std::fill_n(p.rank_sum + u * p.classes, p.classes, 0);
    std::fill_n(p.gain + u * p.classes, p.classes, 0);
    std::fill_n(p.first + u * p.classes, p.classes, 0);
    std::fill_n(p.quantiles + u * p.bins * p.classes, p.bins * p.classes, 0);
    std::fill_n(p.widths + u * p.bins, p.bins, 0);
    if (p.images == 0) return;
    const Ranked<T>* images = sorted(p, u, room);
    for (std::int64_t n = 0; n < std::min(p.top, p.images); ++n) {
        ++p.first[u * p.classes + images[n].label];
    }
    count(p, u, images, room.hits);
}

}  // namespace

void class_ranks(const ClassRanksParams& p, int threads) {
    const std::int64_t cost = p.images * 16 + p.bins * p.classes;
    dispatch_real("class_ranks", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        parallel_for(p.units, piece_size(p.units, cost, threads), threads,
                     [&](std::int64_t begin, std::int64_t end, int thread) {
                         const Room<T> room = room_of<T>(p, thread);
                         for (std::int64_t u = begin; u < end; ++u) rank(p, u, room);
                     });
    });
}

}  // namespace pyablate::cpu
