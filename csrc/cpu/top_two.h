// Which class wins, and by enough? Shared by head_flips and classify.
#pragma once

#include "simd.h"

namespace pyablate::PYABLATE_ISA {

// The two largest of the values seen in each lane, and whether one was NaN.
template <class V>
struct TopTwo {
    using T = typename V::Scalar;
    V best{-__builtin_inf()};
    V second{-__builtin_inf()};
    V nan{0.0};

    PYABLATE_INLINE void add(V x) {
        const V smaller = where(x < best, x, best);
        second = where(smaller > second, smaller, second);
        best = where(x > best, x, best);
        nan = where(Mask<T, V::size>{x.lanes != x.lanes}, V(1.0), nan);
    }
};

template <class T>
struct Top {
    T best, second;
    bool nan;
};

// The two largest of value(V{}, k) over k in [0, classes); value(double's V, k, n) loads n lanes.
template <class T, class F>
PYABLATE_INLINE Top<T> top_two(std::int64_t classes, F value) {
    using V = Vec<T, full_lanes<T>>;
    TopTwo<V> lanes;
    std::int64_t k = 0;
    for (; k + V::size <= classes; k += V::size) lanes.add(value(V{}, k, V::size));
    if (k < classes) {
        // lanes past the last class must not win
        const int n = static_cast<int>(classes - k);
        V x = value(V{}, k, n);
        for (int i = n; i < V::size; ++i) x.lanes[i] = -static_cast<T>(__builtin_inf());
        lanes.add(x);
    }
    Top<T> top{lanes.best.lanes[0], lanes.second.lanes[0], lanes.nan.lanes[0] != 0};
    for (int i = 1; i < V::size; ++i) {
        const T best = lanes.best.lanes[i], second = lanes.second.lanes[i];
        const T smaller = best < top.best ? best : top.best;
        if (best > top.best) top.best = best;
        if (smaller > top.second) top.second = smaller;
        if (second > top.second) top.second = second;
        top.nan = top.nan || lanes.nan.lanes[i] != 0;
    }
    return top;
}

// A logit and its change; NaN where the change is not finite.
template <class V>
PYABLATE_INLINE V changed(V logit, V change) {
    return logit + change + (change - change);
}

// First k whose value is the best, or -1 unless that is finite, no value is NaN and the lead over
// the second is above the limit.
template <class T, class F>
PYABLATE_INLINE std::int32_t decide(std::int64_t classes, T limit, F value) {
    const Top<T> top = top_two<T>(classes, value);
    const bool finite = top.best - top.best == 0;
    if (top.nan || !finite || !(top.best - top.second > limit)) return -1;
    using V = Vec<T, full_lanes<T>>;
    for (std::int64_t k = 0; k < classes; k += V::size) {
        const int n = classes - k < V::size ? static_cast<int>(classes - k) : V::size;
        const V x = value(V{}, k, n);
        for (int i = 0; i < n; ++i) {
            if (x.lanes[i] == top.best) return static_cast<std::int32_t>(k + i);
        }
    }
    return -1;
}

}  // namespace pyablate::PYABLATE_ISA
