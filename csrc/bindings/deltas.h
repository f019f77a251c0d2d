// What the bindings of the operations on deltas share: functions, codes, and where results go.
#pragma once

#include <array>
#include <tuple>
#include <utility>

#include "operations.h"
#include "pyablate/codes.h"
#include "pyablate/math.h"

namespace pyablate {

using Two = std::array<std::int64_t, 2>;                  // height, width
using Function = std::tuple<int, double, double>;         // kind, a, b
using CodeTensors = std::pair<MaybeTensor, MaybeTensor>;  // values and scales, or neither

inline Activation activation_of(const Function& function) {
    const auto [kind, a, b] = function;
    check(kind >= 0 && kind < activation_kinds, "activation: no function has the number ", kind);
    return {static_cast<ActivationKind>(kind), a, b};
}

inline void check_float(const char* name, const TensorView& tensor, const Place& place) {
    const DType is = tensor.dtype;
    check(is == DType::float32 || is == DType::float64 || is == DType::bfloat16 ||
              (is == DType::float16 && place.cuda),
          name, ": expected float32, float64, bfloat16 or, on a GPU alone, float16, got ",
          name_of(is));
}

inline void check_base_dtype(const TensorView& base, DType delta) {
    const DType low = delta == DType::float16 ? DType::float16 : DType::bfloat16;
    check(
        base.dtype == computing(delta) || (base.dtype == low && computing(delta) == DType::float32),
        "base: expected ", name_of(computing(delta)), " or ", name_of(low), " beside float32, got ",
        name_of(base.dtype));
}

// The clean output of a convolution, [N, O, Ho, Wo] channels_last, null where it is left out.
inline const void* base_of(const MaybeTensor& base, DType delta, std::int64_t outputs,
                           std::int64_t out_h, std::int64_t out_w) {
    if (!base) return nullptr;
    check_base_dtype(*base, delta);
    check_shape({"base", base}, {base->shape[0], outputs, out_h, out_w});
    check_dense({"base", base}, true);
    return base->data;
}

inline void check_window(const Two& kernel, const Two& stride, const Two& padding,
                         const Two& dilation) {
    for (const std::size_t i : {0u, 1u}) {
        check(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
              "kernel, stride, dilation: expected positive numbers; padding: none below 0");
    }
}

// What the sizes of a result are read from: itself, or its codes where only they are wanted.
inline const TensorView& sized(const MaybeTensor& out, const CodeTensors& codes) {
    check(out || codes.first, "out: expected a tensor, or codes");
    return out ? *out : *codes.first;
}

// A result of that layout, null where only its codes are wanted.
inline void* data_of(const MaybeTensor& out, DType dtype, bool channels_last) {
    check_dtype({"out", out}, dtype);
    check_dense({"out", out}, channels_last);
    return out ? out->data : nullptr;
}

// The codes of a result of `dtype`, of its shape and layout.
inline Codes codes_of(const CodeTensors& codes, const TensorView& result, DType dtype,
                      bool channels_last) {
    const auto& [values, scale] = codes;
    if (!values) return {};
    check(scale.has_value(), "code_scale: expected a tensor beside the codes");
    check_dtype({"codes", values}, DType::uint8);
    check(values->elements() == result.elements() && values->shape[0] == result.shape[0],
          "codes: expected the shape of out");
    check_dense({"codes", values}, channels_last);
    check(dtype != DType::float64 && values->device == DeviceKind::cpu,
          "codes: expected float32 or bfloat16 results on a CPU");
    return {static_cast<std::uint8_t*>(values->data),
            write<float>({"code_scale", scale}, DType::float32, {result.shape[0]})};
}

}  // namespace pyablate
