#include "common.cuh"
#include "pyablate/class_ranks.h"
#include "pyablate/dispatch.h"

namespace pyablate::cuda {

namespace {

constexpr int digits = 256;
static_assert(digits == block_threads, "thread d of a block looks after digit d");

// Images of a unit whose bits are less than these, or at most these where `equal`.
template <class T>
__device__ inline std::int64_t rank_of(const Ranked<T>* images, std::int64_t size,
                                       typename Ranked<T>::Bits bits, bool equal) {
    std::int64_t low = 0, high = size;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (images[middle].bits < bits || (equal && images[middle].bits == bits)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Sorts by one byte of the bits; equal ones keep their order. The whole block takes a tile of
// images at a time; thread d also keeps the place where the next image with digit d goes.
template <class T>
__device__ inline void sort_by(int byte, const Ranked<T>* from, Ranked<T>* to, std::int64_t size) {
    __shared__ std::int64_t start[digits];
    __shared__ std::int32_t tile[block_threads];
    const int thread = static_cast<int>(threadIdx.x);
    const auto digit = [&](std::int64_t n) {
        return n < size ? static_cast<int>(from[n].bits >> (8 * byte) & 255) : -1;
    };
    std::int64_t own = 0;  // images with a lower digit than this thread's
    for (std::int64_t first = 0; first < size; first += block_threads) {
        tile[thread] = digit(first + thread);
        __syncthreads();
        for (int i = 0; i < block_threads; ++i) own += tile[i] >= 0 && tile[i] < thread;
        __syncthreads();
    }
    for (std::int64_t first = 0; first < size; first += block_threads) {
        tile[thread] = digit(first + thread);
        start[thread] = own;
        __syncthreads();
        std::int64_t place = tile[thread] < 0 ? 0 : start[tile[thread]];
        for (int i = 0; i < thread; ++i) place += tile[i] == tile[thread];
        for (int i = 0; i < block_threads; ++i) own += tile[i] == thread;
        if (first + thread < size) to[place] = from[first + thread];
        __syncthreads();
    }
}

// a / b rounded down for 0 <= a < 2^52, b > 0, by_b near 1 / b: without a division of integers.
__device__ inline std::int64_t quotient(std::int64_t a, std::int64_t b, double by_b) {
    std::int64_t q = static_cast<std::int64_t>(static_cast<double>(a) * by_b);
    if (q * b > a) --q;
    if ((q + 1) * b <= a) ++q;
    return q;
}

// What one class of a unit has, from the images in order. One thread goes through all of them.
template <class T>
__device__ inline void count_class(const ClassRanksParams& p, std::int64_t u, std::int64_t k,
                                   const Ranked<T>* images) {
    std::int32_t* quantiles = p.quantiles + u * p.bins * p.classes + k;
    for (std::int64_t bin = 0; bin < p.bins; ++bin) quantiles[bin * p.classes] = 0;
    std::int64_t rank_sum = 0, gain = 0, hits = 0, greater = 0;
    std::int32_t first = 0;
    const double share = 1.0 / static_cast<double>(p.images);
    for (std::int64_t n = 0; n < p.images; ++n) {
        if (n > 0 && images[n].bits != images[n - 1].bits) greater = n;
        if (images[n].label != k) continue;
        const std::int64_t at_least = rank_of<T>(images, p.images, images[n].bits, true);
        first += n < p.top;
        ++hits;
        rank_sum += greater + at_least;
        const std::int64_t here = p.images * hits - p.count[k] * at_least;
        gain = here > gain ? here : gain;
        ++quantiles[quotient((p.images - at_least) * p.bins, p.images, share) * p.classes];
    }
    p.rank_sum[u * p.classes + k] = rank_sum;
    p.gain[u * p.classes + k] = gain;
    p.first[u * p.classes + k] = first;
}

// Zeroed by the caller; every image is counted by some thread of the block.
template <class T>
__device__ inline void count_widths(const ClassRanksParams& p, std::int64_t u,
                                    const Ranked<T>* images) {
    if (p.images == 0) return;
    const auto value = [&](std::int64_t n) {
        return static_cast<double>(from_falling_bits<T>(images[n].bits));
    };
    const double high = value(0), low = value(p.images - 1);
    for (std::int64_t n = threadIdx.x; n < p.images; n += blockDim.x) {
        atomicAdd(p.widths + u * p.bins + width_bin(value(n), low, high, p.bins), 1);
    }
}

// One block per worker takes unit after unit: sorts the images in the worker's part of the scratch,
// then each thread looks after some classes.
template <class T>
__global__ void rank_units(const ClassRanksParams p) {
    std::int64_t* own = p.scratch + blockIdx.x * class_ranks_scratch(p.images, p.classes, p.dtype);
    auto* images = reinterpret_cast<Ranked<T>*>(own + p.classes);
    Ranked<T>* spare = images + p.images;
    for (std::int64_t u = blockIdx.x; u < p.units; u += p.workers) {
        const T* x = static_cast<const T*>(p.x) + u * p.images;
        for (std::int64_t n = threadIdx.x; n < p.images; n += blockDim.x) {
            images[n].bits = falling_bits(x[n]);
            images[n].label = p.label[n];
        }
        __syncthreads();
        constexpr int bytes = sizeof(typename Ranked<T>::Bits);  // even: they end up in images
        for (int byte = 0; byte < bytes; byte += 2) {
            sort_by<T>(byte, images, spare, p.images);
            sort_by<T>(byte + 1, spare, images, p.images);
        }
        count_widths<T>(p, u, images);
        for (std::int64_t k = threadIdx.x; k < p.classes; k += blockDim.x) {
            count_class<T>(p, u, k, images);
        }
        __syncthreads();
    }
}

}  // namespace

void class_ranks(const ClassRanksParams& p, int device, void* stream) {
    if (p.units == 0) return;
    const DeviceGuard guard(device, "class_ranks");
    const auto on = static_cast<cudaStream_t>(stream);
    const auto bytes = static_cast<std::size_t>(p.units * p.bins) * sizeof *p.widths;
    check_cuda(cudaMemsetAsync(p.widths, 0, bytes, on), "class_ranks", __FILE__, __LINE__);
    dispatch_real("class_ranks", p.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        const auto grid = static_cast<unsigned>(grid_size(p.workers, 1));
        rank_units<T><<<grid, block_threads, 0, on>>>(p);
        PYABLATE_CHECK_LAUNCH("class_ranks");
    });
}

}  // namespace pyablate::cuda
