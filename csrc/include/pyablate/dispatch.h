// From run-time types to templates: a lambda is called with a value whose type carries the choice.
#pragma once

#include "pyablate/bfloat16.h"
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
// Deltas of float16 are for GPUs: see cuda/common.cuh.
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

}  // namespace pyablate
