// From run-time types to templates: a lambda is called with a value whose type carries the choice.
#pragma once

#include <type_traits>

#include "pyablate/bfloat16.h"
#include "pyablate/math.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

template <class T>
struct Type {
    using type = T;
};

// Both are compiled once, in cpu/dispatch.cpp, and not where they are called: files compiled for a
// wider instruction set must not leave behind functions that others might be linked to.
const char* name_of(DType dtype);
[[noreturn]] void fail_no_version(const char* op, DType dtype, DType base);
[[noreturn]] void fail_no_activation(int number);

// f(Type<float> or Type<double>)
template <class F>
void dispatch_real(const char* op, DType dtype, F&& f) {
    switch (dtype) {
        case DType::float32:
            return f(Type<float>{});
        case DType::float64:
            return f(Type<double>{});
        default:
            fail_no_version(op, dtype, dtype);
    }
}

// f(Type<delta>, Type<base>): the delta's type, and the base's, which may be bfloat16 beside float.
template <class F>
void dispatch_change(const char* op, DType delta, DType base, F&& f) {
    if (delta == DType::float64 && base == DType::float64) {
        f(Type<double>{}, Type<double>{});
    } else if (delta == DType::float32 && base == DType::float32) {
        f(Type<float>{}, Type<float>{});
    } else if (delta == DType::float32 && base == DType::bfloat16) {
        f(Type<float>{}, Type<BFloat16>{});
    } else if (delta == DType::bfloat16 && base == DType::float32) {
        f(Type<BFloat16>{}, Type<float>{});
    } else if (delta == DType::bfloat16 && base == DType::bfloat16) {
        f(Type<BFloat16>{}, Type<BFloat16>{});
    } else {
        fail_no_version(op, delta, base);
    }
}

// f(std::integral_constant<ActivationKind, kind>)
template <class F>
void dispatch_activation(ActivationKind kind, F&& f) {
    using K = ActivationKind;
    switch (kind) {
        case K::identity:
            return f(std::integral_constant<K, K::identity>{});
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
    }
    fail_no_activation(static_cast<int>(kind));
}

}  // namespace pyablate
