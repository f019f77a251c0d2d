// Operations on single units: copies without one, and the first convolution behind it.
#include "deltas.h"
#include "pyablate/masked_copies.h"
#include "pyablate/unit_delta.h"

namespace pyablate {

namespace {

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
        check(
            row_elements(*a.view) == outer * units * inner && a.view->item_size == value.item_size,
            a.name, ": expected rows of outer * units * inner elements of value's dtype");
    }
    check_dense({"value", value});
    const std::int64_t elements = value.elements();
    const ValueShape shape = value.dims == 0                  ? ValueShape::one
                             : value.dims == 1 && x.dims != 2 ? ValueShape::per_pair
                             : elements == pairs              ? ValueShape::per_pair
                                                              : ValueShape::map_per_pair;
    check(shape == ValueShape::one || elements == pairs || elements == pairs * outer * inner,
          "value: expected one number, one per pair or a map per pair");
    const MaskedCopiesParams params{
        .x = x.data,
        .image = read_index({"image", image}, pairs, 0, x.shape[0]),
        .unit = read_index({"unit", unit}, pairs, -1, units),
        .value = value.data,
        .out = out.data,
        .images = x.shape[0],
        .pairs = pairs,
        .outer = outer,
        .units = units,
        .inner = inner,
        .value_shape = shape,
        .item_size = x.item_size,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::masked_copies, cuda::masked_copies);
}

void unit_delta(const TensorView& delta, const TensorView& weight, const TensorView& channel,
                const TensorView& image, const TensorView& column, const MaybeTensor& base,
                const TensorView& base_image, const MaybeTensor& out, const CodeTensors& codes,
                const Two& stride, const Two& padding, const Two& dilation,
                const Function& activation, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"delta", delta},
                                  {"weight", weight},
                                  {"channel", channel},
                                  {"image", image},
                                  {"column", column},
                                  {"base", base},
                                  {"base_image", base_image},
                                  {"out", out},
                                  {"codes", codes.first},
                                  {"code_scale", codes.second}});
    const TensorView& result = sized(out, codes);
    check_float("delta", delta, place);
    check(delta.dims == 4 && weight.dims == 4 && result.dims == 4,
          "delta, weight, out: expected four dimensions");
    const std::int64_t images = delta.shape[0], units = delta.shape[1];
    const std::int64_t inputs = weight.shape[0], outputs = weight.shape[3];
    const std::int64_t kernel_h = weight.shape[1], kernel_w = weight.shape[2];
    const std::int64_t pairs = result.shape[0], out_h = result.shape[2], out_w = result.shape[3];
    const std::int64_t base_images = base ? base->shape[0] : images;
    check_shape({"out", result}, {pairs, outputs, out_h, out_w});
    check(out_h > 0 && out_w > 0, "out: expected maps with at least one position");
    check_window({kernel_h, kernel_w}, stride, padding, dilation);
    const UnitDeltaParams params{
        .delta = delta.data,
        .weight = read<void>({"weight", weight}, computing(delta.dtype),
                             {inputs, kernel_h, kernel_w, outputs}),
        .channel = read_index({"channel", channel}, units, 0, inputs),
        .image = read_index({"image", image}, pairs, 0, images),
        .column = read_index({"column", column}, pairs, 0, units),
        .base = base_of(base, delta.dtype, outputs, out_h, out_w),
        .base_image = read_index({"base_image", base_image}, pairs, 0, base_images),
        .out = data_of(out, delta.dtype, true),
        .codes = codes_of(codes, result, delta.dtype, true),
        .delta_strides = {delta.strides[0], delta.strides[1], delta.strides[2], delta.strides[3]},
        .images = images,
        .units = units,
        .height = delta.shape[2],
        .width = delta.shape[3],
        .inputs = inputs,
        .kernel_h = kernel_h,
        .kernel_w = kernel_w,
        .outputs = outputs,
        .pairs = pairs,
        .base_images = base_images,
        .out_h = out_h,
        .out_w = out_w,
        .stride_h = stride[0],
        .stride_w = stride[1],
        .padding_h = padding[0],
        .padding_w = padding[1],
        .dilation_h = dilation[0],
        .dilation_w = dilation[1],
        .activation = base ? activation_of(activation) : Activation{},
        .dtype = delta.dtype,
        .base_dtype = base ? base->dtype : computing(delta.dtype),
    };
    if (result.elements() == 0) return;
    run(place, params, threads, stream, cpu::unit_delta, cuda::unit_delta);
}

}  // namespace

void define_units(py::module_& m) {
    m.def("masked_copies", &masked_copies, "x"_a, "image"_a, "unit"_a, "value"_a, "out"_a,
          py::kw_only(), "outer"_a, "units"_a, "inner"_a, "threads"_a, "stream"_a);
    m.def("unit_delta", &unit_delta, "delta"_a, "weight"_a, "channel"_a, "image"_a, "column"_a,
          py::kw_only(), "base"_a, "base_image"_a, "out"_a, "codes"_a, "stride"_a, "padding"_a,
          "dilation"_a, "activation"_a, "threads"_a, "stream"_a);
}

}  // namespace pyablate
