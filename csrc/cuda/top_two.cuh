// Which class wins, and by enough? Shared by head_flips and classify.
#pragma once

#include <climits>

#include "common.cuh"

namespace pyablate::cuda {

constexpr unsigned whole_warp = 0xffffffffu;

__device__ inline int lane() {  // of blocks along x
    return static_cast<int>(threadIdx.x % warp_threads);
}

template <class T>
struct Top {
    T best = -infinity<T>();
    T second = -infinity<T>();
    std::int32_t index = INT_MAX;
    bool nan = false;

    __device__ void add(T x, std::int32_t k) {
        nan = nan || x != x;
        if (x > best) {
            second = best;
            best = x;
            index = k;
        } else if (x > second) {
            second = x;
        }
    }

    __device__ void merge(const Top& other) {
        nan = nan || other.nan;
        const bool theirs = other.best > best || (other.best == best && other.index < index);
        const T loser = theirs ? best : other.best;
        const T runner_up = theirs ? other.second : second;
        second = loser > runner_up ? loser : runner_up;
        if (theirs) {
            best = other.best;
            index = other.index;
        }
    }
};

// The decision over the classes by the 32 lanes of a warp; value(k, x) fills x with those from k on.
// Neighbouring lanes take neighbours, N at a time, then the lanes' top twos are merged by halves.
template <class T, int N, class F>
__device__ std::int32_t decide(std::int64_t classes, T limit, F value) {
    Top<T> top;
    for (std::int64_t k = N * lane(); k < classes; k += N * warp_threads) {
        T x[N];
        value(k, x);
        for (int i = 0; i < N; ++i) top.add(x[i], static_cast<std::int32_t>(k + i));
    }
    for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
        Top<T> other;
        other.best = __shfl_xor_sync(whole_warp, top.best, offset);
        other.second = __shfl_xor_sync(whole_warp, top.second, offset);
        other.index = __shfl_xor_sync(whole_warp, top.index, offset);
        other.nan = __shfl_xor_sync(whole_warp, static_cast<int>(top.nan), offset) != 0;
        top.merge(other);
    }
    const bool finite = top.best - top.best == 0;
    if (top.nan || !finite || !(top.best - top.second > limit)) return -1;
    return top.index;
}

// A logit and its change; NaN where the change is not finite.
template <class T>
__device__ inline T changed(T logit, T change) {
    return logit + change + (change - change);
}

template <class T>
__device__ inline T larger(T a, T b) {
    return b > a ? b : a;
}

template <class T>
__device__ inline T warp_max(T x) {
    for (int offset = warp_threads / 2; offset > 0; offset /= 2) {
        x = larger(x, __shfl_xor_sync(whole_warp, x, offset));
    }
    return x;
}

}  // namespace pyablate::cuda
