// Operations on maps: copies with a unit replaced, and differences carried through the network.
#include <array>
#include <optional>

#include "operations.h"
#include "pyablate/delta_activation.h"
#include "pyablate/delta_max_pool.h"
#include "pyablate/delta_mean.h"
#include "pyablate/masked_copies.h"
#include "pyablate/unit_delta.h"

namespace pyablate {

namespace {

using Two = std::array<std::int64_t, 2>;

Activation activation_of(int kind, double a, double b) {
    return {static_cast<ActivationKind>(kind), a, b};
}

// The dtype that sums of `dtype` are kept in.
DType computing(DType dtype) {
    return dtype == DType::float64 ? DType::float64 : DType::float32;
}

void check_base_dtype(const TensorView& base, DType delta) {
    check(base.dtype == computing(delta) ||
              (base.dtype == DType::bfloat16 && computing(delta) == DType::float32),
          "base: expected ", name_of(computing(delta)), " or bfloat16 beside float32, got ",
          name_of(base.dtype));
}

void check_scratch(const std::optional<TensorView>& scratch, DType dtype, std::int64_t elements,
                   int threads) {
    check(scratch && scratch->dtype == dtype && is_contiguous(*scratch) &&
              scratch->elements() >= elements * threads,
          "scratch: expected ", elements, " elements of ", name_of(dtype), " for each thread");
}

void masked_copies(const TensorView& x, const TensorView& image, const TensorView& unit,
                   const TensorView& value, const TensorView& out, std::int64_t outer,
                   std::int64_t units, std::int64_t inner, int threads, std::uintptr_t stream) {
    const Place place =
        place_of({{"x", x}, {"image", image}, {"unit", unit}, {"value", value}, {"out", out}});
    check(x.dims >= 2 && out.dims == x.dims, "x: expected as many dimensions as out, at least 2");
    const std::int64_t pairs = out.shape[0];
    const bool channels_last = !is_contiguous(x);
    for (const Argument& a : {Argument{"x", x}, Argument{"out", out}}) {
        check_dense(a, channels_last);
        check(row_elements(a.view) == outer * units * inner && a.view.item_size == value.item_size,
              a.name, ": expected rows of outer * units * inner elements of value's dtype");
    }
    check_contiguous({"value", value});
    const std::int64_t elements = value.elements();
    const ValueShape shape = value.dims == 0                  ? ValueShape::one
                             : value.dims == 1 && x.dims != 2 ? ValueShape::per_pair
                             : elements == pairs              ? ValueShape::per_pair
                                                              : ValueShape::map_per_pair;
    check(shape == ValueShape::one || elements == pairs || elements == pairs * outer * inner,
          "value: expected one number, one per pair or a map per pair");
    const MaskedCopiesParams params{x.data,
                                    read_index({"image", image}, pairs, 0, x.shape[0]),
                                    read_index({"unit", unit}, pairs, -1, units),
                                    value.data,
                                    out.data,
                                    x.shape[0],
                                    pairs,
                                    outer,
                                    units,
                                    inner,
                                    shape,
                                    x.item_size};
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::masked_copies, cuda::masked_copies);
}

// One number per pair, or null: 1.
const float* read_scale(const char* name, const std::optional<TensorView>& scale,
                        std::int64_t pairs) {
    return scale ? read<float>({name, *scale}, DType::float32, {pairs}) : nullptr;
}

// Where the sizes of a result are read: from itself, or from its codes where only they are wanted.
const TensorView& sized(const std::optional<TensorView>& out,
                        const std::optional<TensorView>& codes) {
    check(out || codes, "out: expected a tensor, or codes");
    return out ? *out : *codes;
}

void* data_of(const std::optional<TensorView>& tensor) {
    return tensor ? tensor->data : nullptr;
}

// Codes of a result of `dtype`, if wanted: its shape and layout.
Codes codes_of(const std::optional<TensorView>& values, const std::optional<TensorView>& scale,
               const TensorView& result, DType dtype, bool channels_last) {
    if (!values) return {};
    check(scale.has_value(), "code_scale: expected a tensor beside the codes");
    check_dtype({"codes", *values}, DType::uint8);
    check(values->elements() == result.elements() && values->shape[0] == result.shape[0],
          "codes: expected the shape of out");
    check_dense({"codes", *values}, channels_last);
    check(dtype != DType::float64 && result.device == DeviceKind::cpu,
          "codes: expected float32 or bfloat16 results on a CPU");
    read<float>({"code_scale", *scale}, DType::float32, {result.shape[0]});
    return {static_cast<std::uint8_t*>(values->data), static_cast<float*>(scale->data)};
}

void delta_activation(const TensorView& base, const TensorView& delta,
                      const std::optional<TensorView>& scale,
                      const std::optional<TensorView>& addend,
                      const std::optional<TensorView>& addend_scale, const TensorView& image,
                      const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                      const std::optional<TensorView>& code_scale,
                      const std::optional<TensorView>& scratch, int kind, double a, double b,
                      int threads, std::uintptr_t stream) {
    const TensorView& second = addend ? *addend : delta;
    const TensorView& result = sized(out, codes);
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"scale", scale ? *scale : delta},
                                  {"addend", second},
                                  {"addend_scale", addend_scale ? *addend_scale : delta},
                                  {"image", image},
                                  {"out", result},
                                  {"codes", codes ? *codes : result},
                                  {"code_scale", code_scale ? *code_scale : result},
                                  {"scratch", scratch ? *scratch : result}});
    check(delta.dims >= 1 && base.dims == delta.dims, "base: expected the dimensions of delta");
    const std::int64_t pairs = delta.shape[0], images = base.shape[0];
    const std::int64_t width = row_elements(delta);
    const bool channels_last = !is_contiguous(delta);
    check_base_dtype(base, delta.dtype);
    for (const Argument& x : {Argument{"delta", delta}, Argument{"base", base},
                              Argument{"addend", second}, Argument{"out", result}}) {
        check_dense(x, channels_last);
        check(row_elements(x.view) == width, x.name, ": expected rows like those of delta");
        check(&x.view == &base || x.view.shape[0] == pairs, x.name,
              ": expected the length of delta");
    }
    check_dtype({"addend", second}, delta.dtype);
    if (out) check_dtype({"out", *out}, delta.dtype);
    const Codes coded = codes_of(codes, code_scale, result, delta.dtype, channels_last);
    const DeltaActivationParams params{base.data,
                                       delta.data,
                                       read_scale("scale", scale, pairs),
                                       addend ? addend->data : nullptr,
                                       read_scale("addend_scale", addend_scale, pairs),
                                       read_index({"image", image}, pairs, 0, images),
                                       data_of(out),
                                       coded,
                                       images,
                                       pairs,
                                       width,
                                       activation_of(kind, a, b),
                                       delta.dtype,
                                       base.dtype};
    if (result.elements() == 0) return;
    if (codes) check_scratch(scratch, DType::float32, width, threads);
    const py::gil_scoped_release released;
    if (place.cuda) {
        return cuda::delta_activation(params, place.index, reinterpret_cast<void*>(stream));
    }
    cpu::delta_activation(params, scratch ? scratch->data : nullptr, threads);
}

struct Maps {
    std::int64_t pairs, images, channels, height, width;
};

// The sizes of a delta [P, C, H, W] and its base [N, C, H, W], checked against each other.
Maps maps_of(const TensorView& base, const TensorView& delta, bool channels_last) {
    check(delta.dims == 4 && base.dims == 4, "base, delta: expected four dimensions");
    const Maps maps{delta.shape[0], base.shape[0], delta.shape[1], delta.shape[2], delta.shape[3]};
    check_base_dtype(base, delta.dtype);
    check_shape({"base", base}, {maps.images, maps.channels, maps.height, maps.width});
    for (const Argument& x : {Argument{"delta", delta}, Argument{"base", base}}) {
        check_dense(x, channels_last);
    }
    return maps;
}

void delta_mean(const TensorView& base, const TensorView& delta,
                const std::optional<TensorView>& scale, const std::optional<TensorView>& addend,
                const std::optional<TensorView>& addend_scale, const TensorView& image,
                const TensorView& out, bool channels_last, const std::optional<TensorView>& scratch,
                int kind, double a, double b, int threads, std::uintptr_t stream) {
    const TensorView& second = addend ? *addend : delta;
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"scale", scale ? *scale : delta},
                                  {"addend", second},
                                  {"addend_scale", addend_scale ? *addend_scale : delta},
                                  {"image", image},
                                  {"out", out},
                                  {"scratch", scratch ? *scratch : out}});
    const auto [pairs, images, channels, height, width] = maps_of(base, delta, channels_last);
    check(height * width > 0, "delta: expected maps with at least one position");
    check_dtype({"addend", second}, delta.dtype);
    check_shape({"addend", second}, {pairs, channels, height, width});
    check_dense({"addend", second}, channels_last);
    read<void>({"out", out}, computing(delta.dtype), {pairs, channels});
    const DeltaMeanParams params{base.data,
                                 delta.data,
                                 read_scale("scale", scale, pairs),
                                 addend ? addend->data : nullptr,
                                 read_scale("addend_scale", addend_scale, pairs),
                                 read_index({"image", image}, pairs, 0, images),
                                 out.data,
                                 images,
                                 pairs,
                                 channels,
                                 height * width,
                                 channels_last,
                                 activation_of(kind, a, b),
                                 delta.dtype,
                                 base.dtype};
    if (out.elements() == 0) return;
    if (place.cuda) {
        const py::gil_scoped_release released;
        return cuda::delta_mean(params, place.index, reinterpret_cast<void*>(stream));
    }
    check_scratch(scratch, computing(delta.dtype), cpu::delta_mean_scratch(params), threads);
    const py::gil_scoped_release released;
    cpu::delta_mean(params, scratch->data, threads);
}

void delta_max_pool(const TensorView& base, const TensorView& delta,
                    const std::optional<TensorView>& scale, const TensorView& image,
                    const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                    const std::optional<TensorView>& code_scale, bool channels_last,
                    const Two& kernel, const Two& stride, const Two& padding, const Two& dilation,
                    const Two& out_size, const std::optional<TensorView>& scratch, int kind,
                    double a, double b, int threads, std::uintptr_t stream) {
    const TensorView& result = sized(out, codes);
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"scale", scale ? *scale : delta},
                                  {"image", image},
                                  {"out", result},
                                  {"codes", codes ? *codes : result},
                                  {"code_scale", code_scale ? *code_scale : result},
                                  {"scratch", scratch ? *scratch : result}});
    const auto [pairs, images, channels, height, width] = maps_of(base, delta, channels_last);
    if (out) check_dtype({"out", *out}, delta.dtype);
    check_shape({"out", result}, {pairs, channels, out_size[0], out_size[1]});
    check_dense({"out", result}, channels_last);
    for (const std::size_t i : {0u, 1u}) {
        check(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
              "kernel, stride, dilation: expected positive numbers; padding: none below 0");
    }
    const DeltaMaxPoolParams params{base.data,
                                    delta.data,
                                    read_scale("scale", scale, pairs),
                                    read_index({"image", image}, pairs, 0, images),
                                    data_of(out),
                                    codes_of(codes, code_scale, result, delta.dtype, channels_last),
                                    images,
                                    pairs,
                                    channels,
                                    height,
                                    width,
                                    out_size[0],
                                    out_size[1],
                                    kernel[0],
                                    kernel[1],
                                    stride[0],
                                    stride[1],
                                    padding[0],
                                    padding[1],
                                    dilation[0],
                                    dilation[1],
                                    channels_last,
                                    activation_of(kind, a, b),
                                    delta.dtype,
                                    base.dtype};
    check(is_monotone(params.activation), "activation: expected a monotone function");
    if (result.elements() == 0) return;
    if (place.cuda) {
        const py::gil_scoped_release released;
        return cuda::delta_max_pool(params, place.index, reinterpret_cast<void*>(stream));
    }
    check_scratch(scratch, computing(delta.dtype), cpu::delta_max_pool_scratch(params), threads);
    const py::gil_scoped_release released;
    cpu::delta_max_pool(params, scratch->data, threads);
}

// The sizes of a convolution, from its tensors and checked against each other.
UnitDeltaParams unit_delta_sizes(const TensorView& delta, const TensorView& weight,
                                 const TensorView& out, const Two& stride, const Two& padding,
                                 const Two& dilation) {
    check(delta.dims == 4 && weight.dims == 4 && out.dims == 4,
          "delta, weight, out: expected four dimensions");
    UnitDeltaParams p{};
    p.images = delta.shape[0];
    p.units = delta.shape[1];
    p.height = delta.shape[2];
    p.width = delta.shape[3];
    for (int i = 0; i < 4; ++i) p.delta_strides[i] = delta.strides[i];
    p.inputs = weight.shape[0];
    p.kernel_h = weight.shape[1];
    p.kernel_w = weight.shape[2];
    p.outputs = weight.shape[3];
    p.stride_h = stride[0];
    p.stride_w = stride[1];
    p.padding_h = padding[0];
    p.padding_w = padding[1];
    p.dilation_h = dilation[0];
    p.dilation_w = dilation[1];
    p.pairs = out.shape[0];
    p.out_h = out.shape[2];
    p.out_w = out.shape[3];
    for (const std::size_t i : {0u, 1u}) {
        check(stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0,
              "stride, dilation: expected positive numbers; padding: none below 0");
    }
    check(p.kernel_h > 0 && p.kernel_w > 0 && p.out_h > 0 && p.out_w > 0,
          "weight, out: expected a kernel and maps with at least one position");
    return p;
}

void unit_delta(const TensorView& delta, const TensorView& weight, const TensorView& channel,
                const TensorView& image, const TensorView& column,
                const std::optional<TensorView>& base, const TensorView& base_image,
                const std::optional<TensorView>& out, const std::optional<TensorView>& codes,
                const std::optional<TensorView>& code_scale,
                const std::optional<TensorView>& scratch, const Two& stride, const Two& padding,
                const Two& dilation, int kind, double a, double b, int threads,
                std::uintptr_t stream) {
    const TensorView& result = sized(out, codes);
    const TensorView& rows = base ? *base : result;
    const Place place = place_of({{"delta", delta},
                                  {"weight", weight},
                                  {"channel", channel},
                                  {"image", image},
                                  {"column", column},
                                  {"base", rows},
                                  {"base_image", base_image},
                                  {"out", result},
                                  {"codes", codes ? *codes : result},
                                  {"code_scale", code_scale ? *code_scale : result},
                                  {"scratch", scratch ? *scratch : result}});
    UnitDeltaParams p = unit_delta_sizes(delta, weight, result, stride, padding, dilation);
    p.dtype = delta.dtype;
    p.activation = base ? activation_of(kind, a, b) : Activation{};
    p.base_dtype = base ? base->dtype : computing(delta.dtype);
    p.base_images = base ? base->shape[0] : p.images;
    p.delta = delta.data;
    p.weight = read<void>({"weight", weight}, computing(delta.dtype),
                          {p.inputs, p.kernel_h, p.kernel_w, p.outputs});
    p.channel = read_index({"channel", channel}, p.units, 0, p.inputs);
    p.image = read_index({"image", image}, p.pairs, 0, p.images);
    p.column = read_index({"column", column}, p.pairs, 0, p.units);
    p.base_image = read_index({"base_image", base_image}, p.pairs, 0, p.base_images);
    if (base) {
        check_base_dtype(*base, delta.dtype);
        check_shape({"base", *base}, {p.base_images, p.outputs, p.out_h, p.out_w});
        check_dense({"base", *base}, true);
        p.base = base->data;
    }
    if (out) check_dtype({"out", *out}, delta.dtype);
    check_shape({"out", result}, {p.pairs, p.outputs, p.out_h, p.out_w});
    check_dense({"out", result}, true);
    p.out = data_of(out);
    p.codes = codes_of(codes, code_scale, result, delta.dtype, true);
    if (result.elements() == 0) return;
    if (place.cuda) {
        const py::gil_scoped_release released;
        return cuda::unit_delta(p, place.index, reinterpret_cast<void*>(stream));
    }
    check_scratch(scratch, computing(delta.dtype), cpu::unit_delta_scratch(p).total, threads);
    const py::gil_scoped_release released;
    cpu::unit_delta(p, scratch->data, threads);
}

std::int64_t unit_delta_scratch(const TensorView& delta, const TensorView& weight,
                                const TensorView& result, const std::optional<TensorView>& codes,
                                const Two& stride, const Two& dilation) {
    UnitDeltaParams p = unit_delta_sizes(delta, weight, result, stride, {0, 0}, dilation);
    if (codes) p.codes.values = static_cast<std::uint8_t*>(codes->data);
    return cpu::unit_delta_scratch(p).total;
}

}  // namespace

void define_maps(py::module_& m) {
    m.def("masked_copies", &masked_copies, "x"_a, "image"_a, "unit"_a, "value"_a, "out"_a,
          "outer"_a, "units"_a, "inner"_a, "threads"_a, "stream"_a);
    m.def("delta_activation", &delta_activation, "base"_a, "delta"_a, "scale"_a, "addend"_a,
          "addend_scale"_a, "image"_a, "out"_a, "codes"_a, "code_scale"_a, "scratch"_a, "kind"_a,
          "a"_a, "b"_a, "threads"_a, "stream"_a);
    m.def("delta_mean", &delta_mean, "base"_a, "delta"_a, "scale"_a, "addend"_a, "addend_scale"_a,
          "image"_a, "out"_a, "channels_last"_a, "scratch"_a, "kind"_a, "a"_a, "b"_a, "threads"_a,
          "stream"_a);
    m.def("delta_max_pool", &delta_max_pool, "base"_a, "delta"_a, "scale"_a, "image"_a, "out"_a,
          "codes"_a, "code_scale"_a, "channels_last"_a, "kernel"_a, "stride"_a, "padding"_a,
          "dilation"_a, "out_size"_a, "scratch"_a, "kind"_a, "a"_a, "b"_a, "threads"_a, "stream"_a);
    m.def("unit_delta", &unit_delta, "delta"_a, "weight"_a, "channel"_a, "image"_a, "column"_a,
          "base"_a, "base_image"_a, "out"_a, "codes"_a, "code_scale"_a, "scratch"_a, "stride"_a,
          "padding"_a, "dilation"_a, "kind"_a, "a"_a, "b"_a, "threads"_a, "stream"_a);
    m.def("unit_delta_scratch", &unit_delta_scratch, "delta"_a, "weight"_a, "result"_a, "codes"_a,
          "stride"_a, "dilation"_a,
          "Scratch elements that one thread of unit_delta needs on the CPU.");
}

}  // namespace pyablate
