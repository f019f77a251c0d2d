#include "common.cuh"
#include "pyablate/confusion_counts.h"

namespace pyablate::cuda {

namespace {

constexpr std::int64_t shared_limit = 48 * 1024;  // what every device gives a block unasked

// The cell of prediction n of a unit, or -1 if a class is out of range.
__device__ inline std::int64_t cell(const ConfusionCountsParams& p, std::int64_t u,
                                    std::int64_t n) {
    const std::int32_t label = p.label[n], predicted = p.prediction[u * p.images + n];
    const bool valid = in_range(label, p.classes) && in_range(predicted, p.classes);
    return valid ? label * p.classes + predicted : -1;
}

// One block per unit: its matrix [K, K] is counted in shared memory and written once.
__global__ void count_shared(const ConfusionCountsParams p) {
    extern __shared__ std::int32_t counts[];  // [K, K]
    const std::int64_t cells = p.classes * p.classes;
    for (std::int64_t u = blockIdx.x; u < p.units; u += gridDim.x) {
        for (std::int64_t i = threadIdx.x; i < cells; i += blockDim.x) counts[i] = 0;
        __syncthreads();
        for (std::int64_t n = threadIdx.x; n < p.images; n += blockDim.x) {
            const std::int64_t i = cell(p, u, n);
            if (i >= 0) atomicAdd(&counts[i], 1);
        }
        __syncthreads();
        for (std::int64_t i = threadIdx.x; i < cells; i += blockDim.x) {
            p.out[u * cells + i] = counts[i];
        }
        __syncthreads();
    }
}

// One thread per prediction, counted in global memory, which the launcher has zeroed.
__global__ void count_global(const ConfusionCountsParams p) {
    const std::int64_t total = p.units * p.images;
    for (std::int64_t at = first_thread(); at < total; at += all_threads()) {
        const std::int64_t u = at / p.images;
        const std::int64_t i = cell(p, u, at % p.images);
        if (i >= 0) atomicAdd(&p.out[u * p.classes * p.classes + i], 1);
    }
}

}  // namespace

void confusion_counts(const ConfusionCountsParams& p, int device, void* stream) {
    if (p.units == 0) return;
    const DeviceGuard guard(device, "confusion_counts");
    const auto on = static_cast<cudaStream_t>(stream);
    const std::int64_t bytes =
        p.classes * p.classes * static_cast<std::int64_t>(sizeof(std::int32_t));
    if (bytes <= shared_limit) {
        const auto grid = static_cast<unsigned>(grid_size(p.units, 1));
        count_shared<<<grid, block_threads, static_cast<std::size_t>(bytes), on>>>(p);
    } else {
        check_cuda(cudaMemsetAsync(p.out, 0, static_cast<std::size_t>(p.units * bytes), on),
                   "confusion_counts", __FILE__, __LINE__);
        if (p.images == 0) return;
        const auto grid = static_cast<unsigned>(grid_size(p.units * p.images, block_threads));
        count_global<<<grid, block_threads, 0, on>>>(p);
    }
    PYABLATE_CHECK_LAUNCH("confusion_counts");
}

}  // namespace pyablate::cuda
