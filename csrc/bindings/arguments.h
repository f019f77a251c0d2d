// Checks that every operation makes of its arguments before it trusts a pointer. ops/ has made
// friendlier ones already; these keep a wrong call from reading memory that is not there.
#pragma once

#include <initializer_list>
#include <optional>

#include "pyablate/check.h"
#include "pyablate/dispatch.h"
#include "pyablate/tensor_view.h"

namespace pyablate {

using MaybeTensor = std::optional<TensorView>;

// A tensor and its name in messages. One that may be left out passes every check where it
// is, and is read as null.
struct Argument {
    const char* name;
    const TensorView* view;

    Argument(const char* n, const TensorView& v) : name(n), view(&v) {}
    Argument(const char* n, const MaybeTensor& v) : name(n), view(v ? &*v : nullptr) {}
};

struct Place {
    bool cuda;
    int index;
};

// Where all the tensors are; ValueError if they are not together or neither on a CPU nor CUDA. The
// first must be given.
inline Place place_of(std::initializer_list<Argument> arguments) {
    const TensorView& first = *arguments.begin()->view;
    for (const Argument& a : arguments) {
        if (a.view == nullptr) continue;
        check(a.view->device == first.device && a.view->device_index == first.device_index, a.name,
              ": expected the device of ", arguments.begin()->name);
        check(a.view->device != DeviceKind::other, a.name, ": expected a CPU or CUDA tensor");
    }
    return {first.device == DeviceKind::cuda, first.device_index};
}

inline void check_dtype(const Argument& a, DType dtype) {
    if (a.view == nullptr) return;
    check(a.view->dtype == dtype, a.name, ": expected ", name_of(dtype), ", got ",
          name_of(a.view->dtype));
}

inline void check_real(const Argument& a) {
    check(a.view->dtype == DType::float32 || a.view->dtype == DType::float64, a.name,
          ": expected float32 or float64, got ", name_of(a.view->dtype));
}

inline void check_shape(const Argument& a, std::initializer_list<std::int64_t> shape) {
    if (a.view == nullptr) return;
    check(a.view->dims == static_cast<int>(shape.size()), a.name, ": expected ", shape.size(),
          " dimensions, got ", a.view->dims);
    int axis = 0;
    for (const std::int64_t size : shape) {
        check(a.view->shape[axis] == size, a.name, ": expected size ", size, " along axis ", axis,
              ", got ", a.view->shape[axis]);
        ++axis;
    }
}

inline void check_dense(const Argument& a, bool channels_last = false) {
    if (a.view == nullptr) return;
    check(channels_last ? is_channels_last(*a.view) : is_contiguous(*a.view), a.name,
          ": expected a ", channels_last ? "channels_last" : "contiguous", " tensor");
}

inline std::int64_t row_elements(const TensorView& t) {
    std::int64_t n = 1;
    for (int i = 1; i < t.dims; ++i) n *= t.shape[i];
    return n;
}

// A contiguous tensor of the given dtype and shape, as a pointer.
template <class T>
T* write(const Argument& a, DType dtype, std::initializer_list<std::int64_t> shape) {
    check_dtype(a, dtype);
    check_shape(a, shape);
    check_dense(a);
    return a.view == nullptr ? nullptr : static_cast<T*>(a.view->data);
}
template <class T>
const T* read(const Argument& a, DType dtype, std::initializer_list<std::int64_t> shape) {
    return write<T>(a, dtype, shape);
}

// A contiguous int32 vector of `length` indices in [low, high); looked at on the CPU only.
inline const std::int32_t* read_index(const Argument& a, std::int64_t length, std::int64_t low,
                                      std::int64_t high) {
    const auto* index = read<std::int32_t>(a, DType::int32, {length});
    if (a.view->device != DeviceKind::cpu) return index;
    for (std::int64_t i = 0; i < length; ++i) {
        check(index[i] >= low && index[i] < high, a.name, ": expected indices from ", low, " to ",
              high - 1, ", got ", index[i]);
    }
    return index;
}

}  // namespace pyablate
