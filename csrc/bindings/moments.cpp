// Moments of activations per unit and class.
#include "operations.h"
#include "pyablate/class_moments.h"

namespace pyablate {

namespace {

void class_moments(const TensorView& x, const TensorView& label, const TensorView& pooled,
                   const TensorView& least, const TensorView& positive, const TensorView& total,
                   const TensorView& square, const TensorView& maximum, const TensorView& active,
                   std::int64_t outer, std::int64_t units, std::int64_t inner, int threads,
                   std::uintptr_t stream) {
    const Place place = place_of({{"x", x},
                                  {"label", label},
                                  {"pooled", pooled},
                                  {"least", least},
                                  {"positive", positive},
                                  {"total", total},
                                  {"square", square},
                                  {"maximum", maximum},
                                  {"active", active}});
    check(x.dims >= 2 && total.dims == 2, "x, total: expected at least and just two dimensions");
    check_real({"x", x});
    check_dense({"x", x}, !is_contiguous(x));
    const std::int64_t images = x.shape[0], classes = total.shape[1];
    check(row_elements(x) == outer * units * inner && x.elements() > 0,
          "x: expected rows of outer * units * inner elements, at least one");
    const auto table = [&](const char* name, const TensorView& view, DType dtype) {
        return const_cast<void*>(read<void>({name, view}, dtype, {units, classes}));
    };
    const ClassMomentsParams params{
        x.data,
        read_index({"label", label}, images, 0, classes),
        const_cast<void*>(read<void>({"pooled", pooled}, x.dtype, {images, units})),
        const_cast<void*>(read<void>({"least", least}, x.dtype, {units})),
        const_cast<std::int64_t*>(
            read<std::int64_t>({"positive", positive}, DType::int64, {units})),
        static_cast<double*>(table("total", total, DType::float64)),
        static_cast<double*>(table("square", square, DType::float64)),
        static_cast<double*>(table("maximum", maximum, DType::float64)),
        static_cast<std::int64_t*>(table("active", active, DType::int64)),
        images,
        outer,
        units,
        inner,
        classes,
        x.dtype};
    run(place, params, threads, stream, cpu::class_moments, cuda::class_moments);
}

}  // namespace

void define_moments(py::module_& m) {
    m.def("class_moments", &class_moments, "x"_a, "label"_a, "pooled"_a, "least"_a, "positive"_a,
          "total"_a, "square"_a, "maximum"_a, "active"_a, "outer"_a, "units"_a, "inner"_a,
          "threads"_a, "stream"_a);
}

}  // namespace pyablate
