// Statistics of activations: of each map, and by unit and class.
#include "operations.h"
#include "pyablate/class_moments.h"
#include "pyablate/class_ranks.h"
#include "pyablate/map_moments.h"

namespace pyablate {

namespace {

// A table [units, images] whose rows are parts of longer ones.
void* write_part(const Argument& a, DType dtype, std::int64_t units, std::int64_t images) {
    check_dtype(a, dtype);
    check_shape(a, {units, images});
    check((images == 1 || a.view->strides[1] == 1) && (units == 1 || a.view->strides[0] >= images),
          a.name, ": expected rows of consecutive entries");
    return a.view->data;
}

void map_moments(const TensorView& x, const TensorView& pooled, const TensorView& active,
                 const TensorView& least, const TensorView& positive, std::int64_t outer,
                 std::int64_t units, std::int64_t inner, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"x", x},
                                  {"pooled", pooled},
                                  {"active", active},
                                  {"least", least},
                                  {"positive", positive}});
    check(x.dims >= 2, "x: expected at least two dimensions");
    check_real({"x", x});
    check_dense({"x", x}, !is_contiguous(x));
    const std::int64_t images = x.shape[0];
    check(row_elements(x) == outer * units * inner && x.elements() > 0,
          "x: expected rows of outer * units * inner elements, at least one");
    const MapMomentsParams params{
        .x = x.data,
        .pooled = write_part({"pooled", pooled}, x.dtype, units, images),
        .active =
            static_cast<std::uint8_t*>(write_part({"active", active}, DType::uint8, units, images)),
        .least = write<void>({"least", least}, x.dtype, {units}),
        .positive = write<std::int64_t>({"positive", positive}, DType::int64, {units}),
        .images = images,
        .outer = outer,
        .units = units,
        .inner = inner,
        .pooled_row = pooled.strides[0],
        .active_row = active.strides[0],
        .dtype = x.dtype,
    };
    run(place, params, threads, stream, cpu::map_moments, cuda::map_moments);
}

void class_moments(const TensorView& pooled, const TensorView& active, const TensorView& label,
                   const TensorView& total, const TensorView& square, const TensorView& maximum,
                   const TensorView& active_images, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"pooled", pooled},
                                  {"active", active},
                                  {"label", label},
                                  {"total", total},
                                  {"square", square},
                                  {"maximum", maximum},
                                  {"active_images", active_images}});
    check(pooled.dims == 2 && total.dims == 2, "pooled, total: expected two dimensions");
    check_real({"pooled", pooled});
    const std::int64_t units = pooled.shape[0], images = pooled.shape[1];
    const std::int64_t classes = total.shape[1];
    const ClassMomentsParams params{
        .pooled = read<void>({"pooled", pooled}, pooled.dtype, {units, images}),
        .active = read<std::uint8_t>({"active", active}, DType::uint8, {units, images}),
        .label = read_index({"label", label}, images, 0, classes),
        .total = write<double>({"total", total}, DType::float64, {units, classes}),
        .square = write<double>({"square", square}, DType::float64, {units, classes}),
        .maximum = write<double>({"maximum", maximum}, DType::float64, {units, classes}),
        .active_images =
            write<std::int64_t>({"active_images", active_images}, DType::int64, {units, classes}),
        .units = units,
        .images = images,
        .classes = classes,
        .dtype = pooled.dtype,
    };
    run(place, params, threads, stream, cpu::class_moments, cuda::class_moments);
}

void class_ranks(const TensorView& x, const TensorView& label, const TensorView& count,
                 const TensorView& rank_sum, const TensorView& gain, const TensorView& first,
                 const TensorView& quantiles, const TensorView& widths, std::int64_t top,
                 const TensorView& scratch, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"x", x},
                                  {"label", label},
                                  {"count", count},
                                  {"rank_sum", rank_sum},
                                  {"gain", gain},
                                  {"first", first},
                                  {"quantiles", quantiles},
                                  {"widths", widths},
                                  {"scratch", scratch}});
    check(x.dims == 2 && quantiles.dims == 3, "x, quantiles: expected [U, N] and [U, B, K]");
    check_real({"x", x});
    const std::int64_t units = x.shape[0], images = x.shape[1];
    const std::int64_t bins = quantiles.shape[1], classes = quantiles.shape[2];
    check(bins > 0 && top >= 0, "bins, top: expected at least one bin and no less than no image");
    check(scratch.dims == 2 && scratch.shape[0] > 0, "scratch: expected a row for each worker");
    const std::int64_t workers = place.cuda ? scratch.shape[0] : threads;
    check(workers <= scratch.shape[0], "scratch: expected a row for each thread");
    const ClassRanksParams params{
        .x = read<void>({"x", x}, x.dtype, {units, images}),
        .label = read_index({"label", label}, images, 0, classes),
        .count = read<std::int64_t>({"count", count}, DType::int64, {classes}),
        .rank_sum = write<std::int64_t>({"rank_sum", rank_sum}, DType::int64, {units, classes}),
        .gain = write<std::int64_t>({"gain", gain}, DType::int64, {units, classes}),
        .first = write<std::int32_t>({"first", first}, DType::int32, {units, classes}),
        .quantiles =
            write<std::int32_t>({"quantiles", quantiles}, DType::int32, {units, bins, classes}),
        .widths = write<std::int32_t>({"widths", widths}, DType::int32, {units, bins}),
        .units = units,
        .images = images,
        .classes = classes,
        .bins = bins,
        .top = top,
        .scratch =
            write<std::int64_t>({"scratch", scratch}, DType::int64,
                                {scratch.shape[0], class_ranks_scratch(images, classes, x.dtype)}),
        .workers = workers,
        .dtype = x.dtype,
    };
    run(place, params, threads, stream, cpu::class_ranks, cuda::class_ranks);
}

// int64 elements of scratch for each thread or block.
std::int64_t class_ranks_row(const TensorView& x, std::int64_t classes) {
    check(x.dims == 2, "x: expected [U, N]");
    return class_ranks_scratch(x.shape[1], classes, x.dtype);
}

}  // namespace

void define_moments(py::module_& m) {
    m.def("map_moments", &map_moments, "x"_a, "pooled"_a, "active"_a, "least"_a, "positive"_a,
          "outer"_a, "units"_a, "inner"_a, "threads"_a, "stream"_a);
    m.def("class_moments", &class_moments, "pooled"_a, "active"_a, "label"_a, "total"_a, "square"_a,
          "maximum"_a, "active_images"_a, "threads"_a, "stream"_a);
    m.def("class_ranks", &class_ranks, "x"_a, "label"_a, "count"_a, "rank_sum"_a, "gain"_a,
          "first"_a, "quantiles"_a, "widths"_a, "top"_a, "scratch"_a, "threads"_a, "stream"_a);
    m.def("class_ranks_scratch", &class_ranks_row, "x"_a, "classes"_a,
          "Columns of the scratch of class_ranks; its rows are as many as threads or GPU blocks.");
}

}  // namespace pyablate
