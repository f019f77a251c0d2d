// How the operations see a tensor: a pointer, sizes and strides, and where it lives. No framework.
#pragma once

#include <cstdint>

namespace pyablate {

enum class DType : std::uint8_t { float32, float64, bfloat16, float16, int32, int64, uint8, other };

// Bytes of a number of these dtypes, and the dtype that their sums are kept in.
constexpr std::int64_t item_size(DType dtype) {
    return dtype == DType::float64                               ? 8
           : dtype == DType::bfloat16 || dtype == DType::float16 ? 2
                                                                 : 4;
}
constexpr DType computing(DType dtype) {
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

enum class DeviceKind : std::uint8_t { cpu, cuda, other };

constexpr int max_dims = 8;

struct TensorView {
    void* data = nullptr;
    DType dtype = DType::other;
    int item_size = 0;  // bytes
    DeviceKind device = DeviceKind::other;
    int device_index = 0;
    int dims = 0;
    std::int64_t shape[max_dims] = {};
    std::int64_t strides[max_dims] = {};  // in elements

    std::int64_t elements() const {
        std::int64_t n = 1;
        for (int i = 0; i < dims; ++i) n *= shape[i];
        return n;
    }
};

// Whether the tensor's elements lie one after the other, axes in the given order (outermost first).
inline bool is_dense(const TensorView& t, const int* order) {
    std::int64_t expected = 1;
    for (int i = t.dims - 1; i >= 0; --i) {
        const int axis = order[i];
        if (t.shape[axis] != 1 && t.strides[axis] != expected) return false;
        expected *= t.shape[axis];
    }
    return true;
}

inline bool is_contiguous(const TensorView& t) {
    constexpr int order[max_dims] = {0, 1, 2, 3, 4, 5, 6, 7};
    return t.elements() == 0 || is_dense(t, order);
}

inline bool is_channels_last(const TensorView& t) {
    constexpr int order[4] = {0, 2, 3, 1};
    return t.dims == 4 && (t.elements() == 0 || is_dense(t, order));
}

}  // namespace pyablate
