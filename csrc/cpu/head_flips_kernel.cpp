#include "pyablate/head_flips.h"

#include <type_traits>

#include "isa.h"
#include "pyablate/dispatch.h"
#include "top_two.h"

namespace pyablate::PYABLATE_ISA {

namespace {

template <class T>
PYABLATE_INLINE T absolute(T x) {
    return x < 0 ? -x : x;
}

// The larger of two magnitudes; minus infinity, a class that cannot win, has none.
template <class T>
PYABLATE_INLINE T larger_magnitude(T x, T y) {
    const T nothing = -static_cast<T>(__builtin_inf());
    const T a = x == nothing ? 0 : absolute(x), b = y == nothing ? 0 : absolute(y);
    return a > b ? a : b;
}

// The classes that come nearest to winning an image, the label's aside: when a unit is ablated, one
// of them nearly always takes over, and a bound on the others saves looking at them.
template <class T>
struct Competitors {
    static constexpr int most = 16;
    int count = 0;
    std::int64_t index[most];
    T rest = -static_cast<T>(__builtin_inf());  // the largest logit of the classes not listed

    Competitors(const T* logits, std::int64_t classes, std::int64_t label) {
        for (std::int64_t k = 0; k < classes; ++k) {
            if (k == label) continue;
            if (count == most && !(logits[k] > logits[index[most - 1]])) {
                if (logits[k] > rest) rest = logits[k];
                continue;
            }
            if (count == most) {
                const T dropped = logits[index[most - 1]];
                if (dropped > rest) rest = dropped;
            } else {
                ++count;
            }
            int at = count - 1;
            for (; at > 0 && logits[k] > logits[index[at - 1]]; --at) index[at] = index[at - 1];
            index[at] = k;
        }
    }
};

// What `decide` would say, if the label and the nearest competitors settle it; -2 if not. `reach`
// is the most that the unit adds to any class, `guard` covers rounding.
template <class T>
PYABLATE_INLINE std::int32_t decide_among(const Competitors<T>& near, const T* logits,
                                          const T* column, std::int64_t label, T d, T reach,
                                          T tolerance, T guard) {
    std::int64_t winner = label;
    T best = logits[label] + d * column[label], second = -static_cast<T>(__builtin_inf());
    for (int i = 0; i < near.count; ++i) {
        const std::int64_t k = near.index[i];
        const T x = logits[k] + d * column[k];
        if (x > best) {
            second = best;
            best = x;
            winner = k;
        } else if (x > second) {
            second = x;
        }
    }
    const T others = near.rest + reach + guard;
    const T margin = best - second;
    if (second > others) {
        if (!(margin > tolerance)) return -1;
        return margin > 0 ? static_cast<std::int32_t>(winner)
                          : -2;  // equals: the lowest class wins
    }
    const T least = tolerance < 0 ? 0 : tolerance;
    const bool ahead = margin > least + guard && best - others > least;
    return ahead ? static_cast<std::int32_t>(winner) : -2;
}

template <class T>
void head_flips_image(const HeadFlipsParams& p, std::int64_t n) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.classes;
    const T* delta = static_cast<const T*>(p.delta) + n * p.units;
    const T* weight = static_cast<const T*>(p.weight);
    const T* low = static_cast<const T*>(p.bounds);
    const T* high = low + p.units;
    const T* largest = high + p.units;
    const T tolerance = static_cast<const T*>(p.tolerance)[n];
    const std::int32_t label = p.baseline[n];
    std::int32_t* out = p.out + n * p.units;

    const T infinity = static_cast<T>(__builtin_inf());
    T other = -infinity;
    bool nan = false;
    for (std::int64_t k = 0; k < p.classes; ++k) {
        if (k != label && logits[k] > other) other = logits[k];
        nan = nan || logits[k] != logits[k];
    }
    if (nan) {
        for (std::int64_t u = 0; u < p.units; ++u) out[u] = -1;
        return;
    }
    const T lead = logits[label] - other;
    const T scale = larger_magnitude(logits[label], other);
    const T epsilon = std::is_same_v<T, float> ? T(1.1920929e-7) : T(2.220446049250313e-16);

    const Competitors<T> near(logits, p.classes, label);
    for (std::int64_t u = 0; u < p.units; ++u) {
        const T d = delta[u];
        const T* column = weight + u * p.classes;
        const T own = column[label];
        const T loss = d * (d > 0 ? own - high[u] : own - low[u]);  // the smaller of the two
        const T guard = 32 * epsilon * (scale + absolute(d) * largest[u]);
        if (lead + loss > (tolerance < 0 ? 0 : tolerance) + guard) {
            out[u] = label;
            continue;
        }
        const T reach = d * (d > 0 ? high[u] : low[u]);
        out[u] = decide_among(near, logits, column, label, d, reach, tolerance, guard);
        if (out[u] != -2) continue;
        out[u] =
            decide<T>(p.classes, tolerance,
                      [&](auto vector, std::int64_t k, int some) PYABLATE_LAMBDA_INLINE {
                          using V = decltype(vector);
                          return changed(load_n<V>(logits + k, some),
                                         V(static_cast<double>(d)) * load_n<V>(column + k, some));
                      });
    }
}

}  // namespace

void head_flips(const HeadFlipsParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_real("head_flips", p.dtype, [&](auto type) {
        for (std::int64_t n = begin; n < end; ++n) {
            head_flips_image<typename decltype(type)::type>(p, n);
        }
    });
}

}  // namespace pyablate::PYABLATE_ISA
