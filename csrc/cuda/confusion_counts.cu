#include "pyablate/confusion_counts.h"

#include "common.cuh"

namespace pyablate::cuda {

namespace {

constexpr std::int64_t shared_limit = 48 * 1024;  // what every device gives a block unasked

// Adds 1 to the cells [K, K] of N predictions of a unit; those with a class out of range have none.
template <int N>
__device__ inline void count(const ConfusionCountsParams& p, std::int64_t u, std::int64_t n,
                             std::int32_t* cells) {
    std::int32_t label[N], predicted[N];
    load(p.label + n, label);
    load(p.prediction + u * p.images + n, predicted);
    for (int i = 0; i < N; ++i) {
        if (in_range(label[i], p.classes) && in_range(predicted[i], p.classes)) {
            atomicAdd(&cells[label[i] * p.classes + predicted[i]], 1);
        }
    }
}

// One block per unit: its matrix is counted in shared memory and written once, C cells at a time.
template <int N, int C>
__global__ void count_shared(const ConfusionCountsParams p) {
    extern __shared__ uint4 memory[];
    auto* counts = reinterpret_cast<std::int32_t*>(memory);  // [K, K]
    const std::int64_t cells = p.classes * p.classes;
    for (std::int64_t u = blockIdx.x; u < p.units; u += gridDim.x) {
        for (std::int64_t i = threadIdx.x; i < cells; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        for (std::int64_t n = N * threadIdx.x; n < p.images; n += N * blockDim.x) {
            count<N>(p, u, n, counts);
        }
        __syncthreads();
        for (std::int64_t i = C * threadIdx.x; i < cells; i += C * blockDim.x) {
            std::int32_t counted[C];
            load(counts + i, counted);
            store(p.out + u * cells + i, counted);
        }
        __syncthreads();
    }
}

// Counted in global memory, which the launcher has zeroed; threads in y take the units.
template <int N>
__global__ void count_global(const ConfusionCountsParams p) {
    for (std::int64_t u = first_row(); u < p.units; u += all_rows()) {
        for (std::int64_t n = N * first_thread(); n < p.images; n += N * all_threads()) {
            count<N>(p, u, n, p.out + u * p.classes * p.classes);
        }
    }
}

}  // namespace

void confusion_counts(const ConfusionCountsParams& p, int device, void* stream) {
    if (p.units == 0) return;
    const DeviceGuard guard(device, "confusion_counts");
    const auto on = static_cast<cudaStream_t>(stream);
    const std::int64_t cells = p.classes * p.classes;
    const std::int64_t bytes = cells * static_cast<std::int64_t>(sizeof(std::int32_t));
    const bool packs = aligned(p.prediction, p.label) && p.images % 4 == 0;
    if (bytes <= shared_limit) {
        const auto grid = static_cast<unsigned>(grid_size(p.units, 1));
        dispatch_width<4>(packs, [&](auto n) {
            dispatch_width<4>(aligned(p.out) && cells % 4 == 0, [&](auto c) {
                count_shared<n(), c()>
                    <<<grid, block_threads, static_cast<std::size_t>(bytes), on>>>(p);
            });
        });
    } else {
        check_cuda(cudaMemsetAsync(p.out, 0, static_cast<std::size_t>(p.units * bytes), on),
                   "confusion_counts", __FILE__, __LINE__);
        if (p.images == 0) return;
        dispatch_width<4>(packs, [&](auto n) {
            const Tiles over = tiles(p.images / n(), p.units);
            count_global<n()><<<over.grid, over.block, 0, on>>>(p);
        });
    }
    PYABLATE_CHECK_LAUNCH("confusion_counts");
}

}  // namespace pyablate::cuda
