// Kernels with one mistake each, and right ones, for the tests of the shim itself: `faulty NAME`
// runs one and ends with 1 if its results are wrong; sanitizers and the shim end it in their own
// ways.
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace {

// out[i] = the sum of x over the block of i, by halves
template <bool with_barriers>
__global__ void block_sum(const unsigned* x, unsigned* out) {
    extern __shared__ unsigned partial[];
    const unsigned i = threadIdx.x;
    partial[i] = x[blockIdx.x * blockDim.x + i];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (with_barriers) __syncthreads();
        if (i < half) partial[i] += partial[i + half];
    }
    __syncthreads();
    out[blockIdx.x * blockDim.x + i] = partial[0];
}

template <bool with_barriers>
bool sums_blocks() {
    std::vector<unsigned> x(3 * 128), out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<unsigned>(i);
    shim::cut_grids = false;  // the kernel does not step by the grid
    block_sum<with_barriers><<<3, 128, 128 * sizeof(unsigned)>>>(x.data(), out.data());
    for (unsigned i = 0; i < 3 * 128; ++i) {
        if (out[i] != 128 * (128 * (i / 128)) + 127 * 64) return false;
    }
    return true;
}

// The barrier at the end of the loop's body is missing: a warp ahead overwrites what others read.
template <bool at_the_end>
__global__ void rotate_often(int* x, int steps) {
    __shared__ int values[96];
    for (int step = 0; step < steps; ++step) {
        values[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        x[threadIdx.x] = values[(threadIdx.x + 1) % 96];
        if (at_the_end) __syncthreads();
    }
}

template <bool at_the_end>
bool rotates() {
    std::vector<int> x(96);
    for (int i = 0; i < 96; ++i) x[i] = i;
    rotate_often<at_the_end><<<1, 96>>>(x.data(), 5);
    for (int i = 0; i < 96; ++i) {
        if (x[i] != (i + 5) % 96) return false;
    }
    return true;
}

// step by the whole grid, in two dimensions of the block
__global__ void fill(float* out, int size, int past_the_end) {
    const int inside = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    const int step = threads * static_cast<int>(gridDim.x);
    for (int i = inside + threads * static_cast<int>(blockIdx.x); i < size + past_the_end;
         i += step) {
        out[i] = static_cast<float>(i);
    }
}

bool fills(int past_the_end) {
    std::vector<float> out(1025);
    for (int repeat = 0; repeat < 8; ++repeat) {
        out.assign(1025, -1);
        fill<<<dim3(65), dim3(4, 4)>>>(out.data(), 1025, past_the_end);
        for (int i = 0; i < 1025; ++i) {
            if (out[i] != static_cast<float>(i)) return false;
        }
    }
    return true;
}

__global__ void read_past_static_shared(int* out) {
    __shared__ int values[33];
    values[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x + 1];
}

__global__ void read_past_dynamic_shared(int* out) {
    extern __shared__ int values[];
    values[threadIdx.x] = 1;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x + 1];
}

// counts into shared memory that nothing has zeroed
__global__ void forget_to_zero(int* out) {
    __shared__ int count;
    atomicAdd(&count, 1);
    __syncthreads();
    if (threadIdx.x == 0) *out = count;
}

__global__ void wait_at_two_places(int* out) {
    if (threadIdx.x < 7) {
        __syncthreads();
        out[threadIdx.x] = 1;
    } else {
        __syncthreads();
        out[threadIdx.x] = 2;
    }
}

__global__ void end_before_the_barrier(int* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void some_lanes_shuffle(int* out) {
    if (threadIdx.x % 32 < 16) {
        out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 1);
    } else {
        __syncwarp();
    }
}

// 48 threads: the second warp has no lane 16
__global__ void shuffle_from_a_lane_that_is_not(int* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, static_cast<int>(threadIdx.x), 16);
}

// each warp's intrinsics against their meaning, in 33 + 15 threads
__global__ void use_warps(int* wrong) {
    const int lane = static_cast<int>(threadIdx.x % 32), lanes = threadIdx.x < 32 ? 32 : 16;
    const unsigned all = 0xffffffffu, half = lane % 2 == 0 ? 0x55555555u : 0xaaaaaaaau;
    const auto expect = [&](bool holds) {
        if (!holds) atomicAdd(wrong, 1);
    };
    expect(__shfl_xor_sync(all, 1.5 * lane, 3) == 1.5 * (lane ^ 3));
    expect(__shfl_sync(all, lane, 5) == 5);
    expect(__shfl_sync(all, lane, 5, 8) == lane / 8 * 8 + 5);
    expect(__shfl_up_sync(all, lane, 3) == (lane < 3 ? lane : lane - 3));
    expect(__shfl_down_sync(all, lane, 3, 8) == (lane % 8 > 4 ? lane : lane + 3));
    expect(__ballot_sync(all, lane < 2) == 3);
    expect(__any_sync(all, lane == 15) && !__any_sync(all, lane == 32));
    expect(__all_sync(all, lane < lanes) && !__all_sync(all, lane != 7));
    expect(__reduce_add_sync(all, lane - 1) == lanes * (lanes - 1) / 2 - lanes);
    expect(__reduce_max_sync(all, lane - 40) == lanes - 41);
    expect(__reduce_min_sync(all, -lane) == 1 - lanes);
    expect(__shfl_xor_sync(half, lane, 2) == (lane ^ 2));
    if (lane % 2 == 0) expect(__ballot_sync(half, 1) == (lanes == 32 ? half : half & 0xffffu));
    __syncwarp();
    if (lane >= 8) return;  // those that ended are not waited for
    expect(__ballot_sync(all, 1) == 0xffu);
}

template <class... P>
std::function<bool()> on_threads(void (*kernel)(P...), unsigned count, int expected) {
    return [=] {
        std::vector<int> out(count, expected);
        kernel<<<1, count, count * sizeof(int)>>>(out.data());
        return out[0] == expected;
    };
}

bool refuses_bad_launches() {
    int out = 0;
    forget_to_zero<<<0, 32>>>(&out);
    const bool no_blocks = cudaGetLastError() != cudaSuccess;
    forget_to_zero<<<1, 1025>>>(&out);
    const bool many_threads = cudaGetLastError() != cudaSuccess;
    forget_to_zero<<<1, 32, 48 * 1024 + 1>>>(&out);
    const bool much_memory = cudaGetLastError() != cudaSuccess;
    return no_blocks && many_threads && much_memory && cudaGetLastError() == cudaSuccess &&
           cudaSetDevice(1) != cudaSuccess && out == 0;
}

bool uses_warps() {
    int wrong = 0;
    use_warps<<<1, 48>>>(&wrong);
    return wrong == 0;
}

const std::map<std::string, std::function<bool()>> cases = {
    {"barriers", sums_blocks<true>},
    {"no-barrier", sums_blocks<false>},
    {"loop", rotates<true>},
    {"no-barrier-in-loop", rotates<false>},
    {"grid", [] { return fills(0); }},
    {"past-the-end", [] { return fills(1); }},
    {"past-static-shared", on_threads(read_past_static_shared, 33, 1)},
    {"past-dynamic-shared", on_threads(read_past_dynamic_shared, 33, 1)},
    {"not-zeroed", on_threads(forget_to_zero, 32, 32)},
    {"two-places", on_threads(wait_at_two_places, 32, 1)},
    {"ended", on_threads(end_before_the_barrier, 32, 1)},
    {"some-lanes", on_threads(some_lanes_shuffle, 32, 1)},
    {"no-such-lane", on_threads(shuffle_from_a_lane_that_is_not, 48, 16)},
    {"warps", uses_warps},
    {"launches", refuses_bad_launches},
};

}  // namespace

int main(int, char** arguments) {
    try {
        return cases.at(arguments[1])() ? 0 : 1;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 2;
    }
}
