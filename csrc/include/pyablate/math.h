// The elementwise functions and how a change d passes through them: f(z + d) - f(z).
//
// Written once for floats and doubles (both backends) and for the CPU's vectors, which bring their own
// exp, tanh, erf, expm1 and where. The piecewise linear functions never form z + d where the answer
// is d itself, so that their error is relative to the change and not to the activation.
#pragma once

#include <cmath>
#include <type_traits>

#include "pyablate/bfloat16.h"

namespace pyablate {

// The order is that of pyablate.ops.activations.ActivationName.
enum class ActivationKind : int {
    identity,
    relu,
    hardtanh,    // clamped to [a, b]
    leaky_relu,  // slope a
    elu,         // alpha a
    gelu,
    gelu_tanh,
    silu,
    hardswish,
    hardsigmoid,
    sigmoid,
    tanh,
};
constexpr int activation_kinds = 12;

struct Activation {
    ActivationKind kind = ActivationKind::identity;
    double a = 0;
    double b = 0;
};

PYABLATE_HOST_DEVICE inline float where(bool condition, float x, float y) {
    return condition ? x : y;
}
PYABLATE_HOST_DEVICE inline double where(bool condition, double x, double y) {
    return condition ? x : y;
}

namespace math {

// Written so that a NaN in x comes out as NaN.
template <class T>
PYABLATE_HOST_DEVICE inline T at_least(T x, T low) {
    return where(low > x, low, x);
}
template <class T>
PYABLATE_HOST_DEVICE inline T at_most(T x, T high) {
    return where(high < x, high, x);
}
template <class T>
PYABLATE_HOST_DEVICE inline T clamp(T x, T low, T high) {
    return at_most(at_least(x, low), high);
}

// f(z + d) - f(z) for clamp: d from inside, or what is left of z + d from beyond a bound c, between
// the bounds seen from c. Inside, nothing is added to d but z - z, which keeps a NaN; (z + d) - z
// would lose its digits. A z that is infinite as its bound is makes NaN.
template <class T>
PYABLATE_HOST_DEVICE inline T clamp_change(T z, T d, T low, T high) {
    const T c = clamp(z, low, high);
    const T inside = d + (z - z), outside = (z + d) - c;
    const T left = where(z > high, outside, where(z < low, outside, inside));
    return clamp(left, low - c, high - c);
}

// The same for max(z, 0): z - c is 0 or z itself, which costs no digit.
template <class T>
PYABLATE_HOST_DEVICE inline T relu_change(T z, T d) {
    const T c = at_least(z, T(0));
    return at_least(d + (z - c), T(0) - c);
}

// 1 / x for x from 1 on, and x / 6. On a GPU a division of floats calls a function; what is used
// there instead is off by 2 units in the last place at most.
template <class T>
PYABLATE_HOST_DEVICE inline T reciprocal(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, float>) return __fdividef(1.0f, x);
#endif
    return T(1) / x;
}
template <class T>
PYABLATE_HOST_DEVICE inline T sixth(T x) {
#ifdef __CUDA_ARCH__
    if constexpr (std::is_same_v<T, float>) return x * (1.0f / 6.0f);
#endif
    return x / T(6);
}

template <class T>
PYABLATE_HOST_DEVICE inline T sigmoid(T x) {
    using std::exp;
    return reciprocal(T(1) + exp(T(0) - x));
}

}  // namespace math

// f(z), for the functions whose change has no shorter form (and, for the pooling, all others)
template <ActivationKind K, class T>
PYABLATE_HOST_DEVICE inline T activate(T z, T a, T b) {
    using std::erf;
    using std::expm1;
    using std::tanh;
    if constexpr (K == ActivationKind::relu) {
        return math::at_least(z, T(0));
    } else if constexpr (K == ActivationKind::hardtanh) {
        return math::clamp(z, a, b);
    } else if constexpr (K == ActivationKind::leaky_relu) {
        return where(z > T(0), z, a * z);
    } else if constexpr (K == ActivationKind::elu) {
        return where(z > T(0), z, a * expm1(math::at_most(z, T(0))));
    } else if constexpr (K == ActivationKind::gelu) {
        return T(0.5) * z * (T(1) + erf(z * T(0.70710678118654752440)));  // 1 / sqrt(2)
    } else if constexpr (K == ActivationKind::gelu_tanh) {
        const T inner = T(0.79788456080286535588) * (z + T(0.044715) * z * z * z);  // sqrt(2 / pi)
        return T(0.5) * z * (T(1) + tanh(inner));
    } else if constexpr (K == ActivationKind::silu) {
        return z * math::sigmoid(z);
    } else if constexpr (K == ActivationKind::hardswish) {
        return math::sixth(z * math::clamp(z + T(3), T(0), T(6)));
    } else if constexpr (K == ActivationKind::hardsigmoid) {
        return math::clamp(z * T(1.0 / 6.0) + T(0.5), T(0), T(1));
    } else if constexpr (K == ActivationKind::sigmoid) {
        return math::sigmoid(z);
    } else if constexpr (K == ActivationKind::tanh) {
        return tanh(z);
    } else {
        return z;
    }
}

// f(z + d) - f(z)
template <ActivationKind K, class T>
PYABLATE_HOST_DEVICE inline T activate_change(T z, T d, T a, T b) {
    if constexpr (K == ActivationKind::identity) {
        return d;
    } else if constexpr (K == ActivationKind::relu) {
        return math::relu_change(z, d);
    } else if constexpr (K == ActivationKind::hardtanh) {
        return math::clamp_change(z, d, a, b);
    } else if constexpr (K == ActivationKind::leaky_relu) {
        // x = max(x, 0) + min(x, 0), and the second changes as the first does upside down. An
        // infinite z makes one of its parts NaN.
        const T positive = math::at_least(z, T(0)), negative = z - positive;
        const T bound = negative - z;  // -positive
        return math::at_least(d + negative, bound) - a * math::at_least(bound - d, negative);
    } else if constexpr (K == ActivationKind::elu) {
        using std::expm1;
        const T after = expm1(math::at_most(z + d, T(0)));
        return math::relu_change(z, d) + a * (after - expm1(math::at_most(z, T(0))));
    } else if constexpr (K == ActivationKind::hardsigmoid) {
        const T sixth = T(1.0 / 6.0);
        return math::clamp_change(z * sixth + T(0.5), d * sixth, T(0), T(1));
    } else {
        return activate<K>(z + d, a, b) - activate<K>(z, a, b);
    }
}

// Calls f(std::integral_constant<ActivationKind, kind>); bindings/ has checked the kind. f may be for a
// GPU alone.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
PYABLATE_HOST_DEVICE inline auto dispatch_activation(ActivationKind kind, F&& f) {
    using K = ActivationKind;
    switch (kind) {
        case K::relu:
            return f(std::integral_constant<K, K::relu>{});
        case K::hardtanh:
            return f(std::integral_constant<K, K::hardtanh>{});
        case K::leaky_relu:
            return f(std::integral_constant<K, K::leaky_relu>{});
        case K::elu:
            return f(std::integral_constant<K, K::elu>{});
        case K::gelu:
            return f(std::integral_constant<K, K::gelu>{});
        case K::gelu_tanh:
            return f(std::integral_constant<K, K::gelu_tanh>{});
        case K::silu:
            return f(std::integral_constant<K, K::silu>{});
        case K::hardswish:
            return f(std::integral_constant<K, K::hardswish>{});
        case K::hardsigmoid:
            return f(std::integral_constant<K, K::hardsigmoid>{});
        case K::sigmoid:
            return f(std::integral_constant<K, K::sigmoid>{});
        case K::tanh:
            return f(std::integral_constant<K, K::tanh>{});
        default:
            return f(std::integral_constant<K, K::identity>{});
    }
}

// Whether x <= y implies f(x) <= f(y), so that f may be applied after a maximum instead of before.
inline bool is_monotone(const Activation& f) {
    switch (f.kind) {
        case ActivationKind::gelu:
        case ActivationKind::gelu_tanh:
        case ActivationKind::silu:
        case ActivationKind::hardswish:
            return false;
        case ActivationKind::leaky_relu:
        case ActivationKind::elu:
            return f.a >= 0;
        default:
            return true;
    }
}

}  // namespace pyablate
