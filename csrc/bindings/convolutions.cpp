// Plain convolutions that libraries are slow at.
#include "deltas.h"
#include "pyablate/depthwise.h"

namespace pyablate {

namespace {

void depthwise(const TensorView& x, const TensorView& filters, const TensorView& out,
               const Two& stride, const Two& padding, const Two& dilation, int threads,
               std::uintptr_t stream) {
    const Place place = place_of({{"x", x}, {"filters", filters}, {"out", out}});
    if (place.cuda) {
        check_float("x", x, place);
    } else {
        check_dtype({"x", x}, DType::float64);
    }
    check(x.dims == 4 && filters.dims == 3 && out.dims == 4,
          "x, filters, out: expected four, three and four dimensions");
    const std::int64_t images = x.shape[0], channels = x.shape[1];
    const Two size{x.shape[2], x.shape[3]}, kernel{filters.shape[0], filters.shape[1]};
    check_window(kernel, stride, padding, dilation);
    Two result;
    for (const std::size_t i : {0u, 1u}) {
        const std::int64_t room = size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
        check(room >= 0, "x: expected maps that the filters fit in");
        result[i] = room / stride[i] + 1;
    }
    check_shape({"out", out}, {images, channels, result[0], result[1]});
    check_dtype({"out", out}, x.dtype);
    check_dense({"x", x}, true);
    check_dense({"out", out}, true);
    const DepthwiseParams params{
        .dtype = x.dtype,
        .x = x.data,
        .filters =
            read<void>({"filters", filters}, computing(x.dtype), {kernel[0], kernel[1], channels}),
        .out = out.data,
        .images = images,
        .height = size[0],
        .width = size[1],
        .channels = channels,
        .out_h = result[0],
        .out_w = result[1],
        .kernel_h = kernel[0],
        .kernel_w = kernel[1],
        .stride_h = stride[0],
        .stride_w = stride[1],
        .padding_h = padding[0],
        .padding_w = padding[1],
        .dilation_h = dilation[0],
        .dilation_w = dilation[1],
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::depthwise, cuda::depthwise);
}

}  // namespace

void define_convolutions(py::module_& m) {
    m.def("depthwise", &depthwise, "x"_a, "filters"_a, "out"_a, py::kw_only(), "stride"_a,
          "padding"_a, "dilation"_a, "threads"_a, "stream"_a);
}

}  // namespace pyablate
