// Operations on dense changes: a convolution, and what happens between two.
#include "deltas.h"

#include "pyablate/delta_activation.h"
#include "pyablate/delta_max_pool.h"
#include "pyablate/delta_mean.h"
#include "pyablate/delta_product.h"
#include "pyablate/delta_winograd.h"
#include "pyablate/difference.h"
#include "pyablate/launch.h"

namespace pyablate {

namespace {

void delta_activation(const TensorView& base, const TensorView& delta, const TensorView& image,
                      const MaybeTensor& scale, const MaybeTensor& addend,
                      const MaybeTensor& addend_scale, const MaybeTensor& out,
                      const CodeTensors& codes, const Function& activation, int threads,
                      std::uintptr_t stream) {
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"image", image},
                                  {"scale", scale},
                                  {"addend", addend},
                                  {"addend_scale", addend_scale},
                                  {"out", out},
                                  {"codes", codes.first},
                                  {"code_scale", codes.second}});
    const TensorView& result = sized(out, codes);
    check_float("delta", delta, place);
    check(delta.dims >= 1 && base.dims == delta.dims, "base: expected the dimensions of delta");
    const std::int64_t pairs = delta.shape[0], images = base.shape[0];
    const std::int64_t width = row_elements(delta);
    const bool channels_last = !is_contiguous(delta);
    check_base_dtype(base, delta.dtype);
    for (const Argument& x : {Argument{"delta", delta}, Argument{"base", base},
                              Argument{"addend", addend}, Argument{"out", result}}) {
        if (x.view == nullptr) continue;
        check_dense(x, channels_last);
        check(row_elements(*x.view) == width, x.name, ": expected rows like those of delta");
        check(x.view == &base || x.view->shape[0] == pairs, x.name,
              ": expected the length of delta");
    }
    check_dtype({"addend", addend}, delta.dtype);
    const DeltaActivationParams params{
        .base = base.data,
        .delta = delta.data,
        .scale = read<float>({"scale", scale}, DType::float32, {pairs}),
        .addend = addend ? addend->data : nullptr,
        .addend_scale = read<float>({"addend_scale", addend_scale}, DType::float32, {pairs}),
        .image = read_index({"image", image}, pairs, 0, images),
        .out = data_of(out, delta.dtype, channels_last),
        .codes = codes_of(codes, result, delta.dtype, channels_last),
        .images = images,
        .pairs = pairs,
        .width = width,
        .activation = activation_of(activation),
        .dtype = delta.dtype,
        .base_dtype = base.dtype,
    };
    if (result.elements() == 0) return;
    run(place, params, threads, stream, cpu::delta_activation, cuda::delta_activation);
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
    check_dense({"delta", delta}, channels_last);
    check_dense({"base", base}, channels_last);
    return maps;
}

void delta_mean(const TensorView& base, const TensorView& delta, const TensorView& image,
                const MaybeTensor& scale, const MaybeTensor& addend,
                const MaybeTensor& addend_scale, const TensorView& out, bool channels_last,
                const Function& activation, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"image", image},
                                  {"scale", scale},
                                  {"addend", addend},
                                  {"addend_scale", addend_scale},
                                  {"out", out}});
    check_float("delta", delta, place);
    const auto [pairs, images, channels, height, width] = maps_of(base, delta, channels_last);
    check(height * width > 0, "delta: expected maps with at least one position");
    check_dtype({"addend", addend}, delta.dtype);
    check_shape({"addend", addend}, {pairs, channels, height, width});
    check_dense({"addend", addend}, channels_last);
    const DeltaMeanParams params{
        .base = base.data,
        .delta = delta.data,
        .scale = read<float>({"scale", scale}, DType::float32, {pairs}),
        .addend = addend ? addend->data : nullptr,
        .addend_scale = read<float>({"addend_scale", addend_scale}, DType::float32, {pairs}),
        .image = read_index({"image", image}, pairs, 0, images),
        .out = write<void>({"out", out}, computing(delta.dtype), {pairs, channels}),
        .images = images,
        .pairs = pairs,
        .channels = channels,
        .positions = height * width,
        .channels_last = channels_last,
        .activation = activation_of(activation),
        .dtype = delta.dtype,
        .base_dtype = base.dtype,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::delta_mean, cuda::delta_mean);
}

void delta_max_pool(const TensorView& base, const TensorView& delta, const TensorView& image,
                    const MaybeTensor& scale, const MaybeTensor& out, const CodeTensors& codes,
                    bool channels_last, const Two& kernel, const Two& stride, const Two& padding,
                    const Two& dilation, const Function& activation, int threads,
                    std::uintptr_t stream) {
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"image", image},
                                  {"scale", scale},
                                  {"out", out},
                                  {"codes", codes.first},
                                  {"code_scale", codes.second}});
    const TensorView& result = sized(out, codes);
    check_float("delta", delta, place);
    const auto [pairs, images, channels, height, width] = maps_of(base, delta, channels_last);
    check(result.dims == 4, "out: expected 4 dimensions, got ", result.dims);
    check_shape({"out", result}, {pairs, channels, result.shape[2], result.shape[3]});
    check_window(kernel, stride, padding, dilation);
    const DeltaMaxPoolParams params{
        .base = base.data,
        .delta = delta.data,
        .scale = read<float>({"scale", scale}, DType::float32, {pairs}),
        .image = read_index({"image", image}, pairs, 0, images),
        .out = data_of(out, delta.dtype, channels_last),
        .codes = codes_of(codes, result, delta.dtype, channels_last),
        .images = images,
        .pairs = pairs,
        .channels = channels,
        .height = height,
        .width = width,
        .out_h = result.shape[2],
        .out_w = result.shape[3],
        .kernel_h = kernel[0],
        .kernel_w = kernel[1],
        .stride_h = stride[0],
        .stride_w = stride[1],
        .padding_h = padding[0],
        .padding_w = padding[1],
        .dilation_h = dilation[0],
        .dilation_w = dilation[1],
        .channels_last = channels_last,
        .activation = activation_of(activation),
        .dtype = delta.dtype,
        .base_dtype = base.dtype,
    };
    check(is_monotone(params.activation), "activation: expected a monotone function");
    if (result.elements() == 0) return;
    run(place, params, threads, stream, cpu::delta_max_pool, cuda::delta_max_pool);
}

void delta_winograd(const TensorView& delta, const TensorView& filters, const MaybeTensor& base,
                    const MaybeTensor& image, const MaybeTensor& addend, const TensorView& out,
                    const Two& padding, const Function& activation, int threads) {
    const Place place = place_of({{"delta", delta},
                                  {"filters", filters},
                                  {"base", base},
                                  {"image", image},
                                  {"addend", addend},
                                  {"out", out}});
    check(!place.cuda, "delta: expected a CPU tensor");
    check(delta.dims == 4 && filters.dims == 4 && out.dims == 4,
          "delta, filters, out: expected four dimensions");
    const std::int64_t pairs = delta.shape[0], inputs = delta.shape[1], outputs = out.shape[1];
    const std::int64_t height = delta.shape[2], width = delta.shape[3];
    const std::int64_t out_h = height + 2 * padding[0] - 2, out_w = width + 2 * padding[1] - 2;
    check(padding[0] >= 0 && padding[1] >= 0 && out_h > 0 && out_w > 0,
          "padding: expected none below 0, and maps of at least one position");
    const std::int64_t images = base ? base->shape[0] : 0;
    check(base.has_value() == image.has_value(), "image: expected a tensor beside base");
    const std::int64_t panels = divide_up(outputs, winograd_panel);
    check_dtype({"delta", delta}, DType::float32);
    check_dense({"delta", delta}, true);
    check_shape({"out", out}, {pairs, outputs, out_h, out_w});
    check_shape({"addend", addend}, {pairs, outputs, out_h, out_w});
    check_dtype({"addend", addend}, DType::float32);
    check_dense({"addend", addend}, true);
    const DeltaWinogradParams params{
        .delta = static_cast<const float*>(delta.data),
        .filters = read<float>({"filters", filters}, DType::float32,
                               {winograd_parts, panels, inputs, winograd_panel}),
        .base = base_of(base, DType::float32, outputs, out_h, out_w),
        .addend = addend ? static_cast<const float*>(addend->data) : nullptr,
        .image = image ? read_index({"image", image}, pairs, 0, images) : nullptr,
        .out = static_cast<float*>(data_of(out, DType::float32, true)),
        .pairs = pairs,
        .height = height,
        .width = width,
        .inputs = inputs,
        .outputs = outputs,
        .out_h = out_h,
        .out_w = out_w,
        .padding_h = padding[0],
        .padding_w = padding[1],
        .activation = base ? activation_of(activation) : Activation{},
        .base_dtype = base ? base->dtype : DType::float32,
    };
    if (out.elements() == 0) return;
    const py::gil_scoped_release released;
    cpu::delta_winograd(params, threads);
}

// Runs [., R, M] of neighbours, like those of out; with `spread` each of one number for all.
RunStrides runs_of(const Argument& a, std::int64_t rows, const TensorView& out,
                   bool spread = false) {
    check_shape(a, {rows, out.shape[1], out.shape[2]});
    check(out.shape[2] < 2 || a.view->strides[2] == (spread ? 0 : 1), a.name,
          ": expected neighbours along the last axis");
    return {a.view->strides[0], a.view->strides[1]};
}

// `given` is the delta, or what f gives after it; `delta` is the delta's dtype.
DifferenceParams difference_of(const TensorView& base, const Argument& given,
                               const TensorView& image, const TensorView& out, DType delta) {
    check(base.dims == 3 && out.dims == 3, "base, out: expected three dimensions");
    check_base_dtype(base, delta);
    check_dense({"out", out});
    return {
        .base = base.data,
        .given = given.view->data,
        .image = read_index({"image", image}, out.shape[0], 0, base.shape[0]),
        .out = out.data,
        .base_strides = runs_of({"base", base}, base.shape[0], out),
        .strides = runs_of(given, out.shape[0], out),
        .images = base.shape[0],
        .pairs = out.shape[0],
        .runs = out.shape[1],
        .width = out.shape[2],
        .dtype = delta,
        .base_dtype = base.dtype,
    };
}

void perturbed(const TensorView& base, const TensorView& delta, const TensorView& image,
               const TensorView& out, int threads, std::uintptr_t stream) {
    const Place place =
        place_of({{"delta", delta}, {"base", base}, {"image", image}, {"out", out}});
    check_float("delta", delta, place);
    check_dtype({"out", out}, computing(delta.dtype));
    const auto params = difference_of(base, {"delta", delta}, image, out, delta.dtype);
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::perturbed, cuda::perturbed);
}

void subtracted(const TensorView& after, const TensorView& base, const TensorView& image,
                const TensorView& out, int threads, std::uintptr_t stream) {
    const Place place =
        place_of({{"after", after}, {"base", base}, {"image", image}, {"out", out}});
    check_float("out", out, place);
    check_dtype({"after", after}, computing(out.dtype));
    const auto params = difference_of(base, {"after", after}, image, out, out.dtype);
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::subtracted, cuda::subtracted);
}

void delta_product(const TensorView& base, const TensorView& delta, const TensorView& other_base,
                   const TensorView& other, const TensorView& image, const TensorView& out,
                   int threads, std::uintptr_t stream) {
    const Place place = place_of({{"delta", delta},
                                  {"base", base},
                                  {"other_base", other_base},
                                  {"other", other},
                                  {"image", image},
                                  {"out", out}});
    check(out.dims == 3 && base.dims == 3 && other_base.dims == 3 && other.dims == 3,
          "base, other_base, other, out: expected three dimensions");
    check_float("delta", delta, place);
    const bool spread = out.shape[2] > 1 && other.strides[2] == 0;
    const std::int64_t pairs = out.shape[0], images = base.shape[0];
    check_base_dtype(base, delta.dtype);
    check_dtype({"other_base", other_base}, base.dtype);
    check_dtype({"other", other}, delta.dtype);
    check_dtype({"out", out}, delta.dtype);
    check_dense({"out", out});
    const DeltaProductParams params{
        .first = {base.data, delta.data, runs_of({"base", base}, images, out),
                  runs_of({"delta", delta}, pairs, out)},
        .second = {other_base.data, other.data,
                   runs_of({"other_base", other_base}, images, out, spread),
                   runs_of({"other", other}, pairs, out, spread)},
        .spread = spread,
        .image = read_index({"image", image}, pairs, 0, images),
        .out = out.data,
        .images = images,
        .pairs = pairs,
        .runs = out.shape[1],
        .width = out.shape[2],
        .dtype = delta.dtype,
        .base_dtype = base.dtype,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::delta_product, cuda::delta_product);
}

}  // namespace

void define_deltas(py::module_& m) {
    m.def("delta_activation", &delta_activation, "base"_a, "delta"_a, "image"_a, py::kw_only(),
          "scale"_a, "addend"_a, "addend_scale"_a, "out"_a, "codes"_a, "activation"_a, "threads"_a,
          "stream"_a);
    m.def("delta_mean", &delta_mean, "base"_a, "delta"_a, "image"_a, py::kw_only(), "scale"_a,
          "addend"_a, "addend_scale"_a, "out"_a, "channels_last"_a, "activation"_a, "threads"_a,
          "stream"_a);
    m.def("delta_max_pool", &delta_max_pool, "base"_a, "delta"_a, "image"_a, py::kw_only(),
          "scale"_a, "out"_a, "codes"_a, "channels_last"_a, "kernel"_a, "stride"_a, "padding"_a,
          "dilation"_a, "activation"_a, "threads"_a, "stream"_a);
    m.def("delta_winograd", &delta_winograd, "delta"_a, "filters"_a, py::kw_only(), "base"_a,
          "image"_a, "addend"_a, "out"_a, "padding"_a, "activation"_a, "threads"_a);
    m.def("delta_product", &delta_product, "base"_a, "delta"_a, "other_base"_a, "other"_a,
          "image"_a, py::kw_only(), "out"_a, "threads"_a, "stream"_a);
    m.def("perturbed", &perturbed, "base"_a, "delta"_a, "image"_a, py::kw_only(), "out"_a,
          "threads"_a, "stream"_a);
    m.def("subtracted", &subtracted, "after"_a, "base"_a, "image"_a, py::kw_only(), "out"_a,
          "threads"_a, "stream"_a);
}

}  // namespace pyablate
