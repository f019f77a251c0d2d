// Operations on logits and predictions: which pairs change their class, and counts of them.
#include "operations.h"
#include "pyablate/classify.h"
#include "pyablate/confusion_counts.h"
#include "pyablate/head_flips.h"

namespace pyablate {

namespace {

void head_flips(const TensorView& logits, const TensorView& delta, const TensorView& weight,
                const TensorView& bounds, const TensorView& baseline, const TensorView& tolerance,
                const TensorView& out, int threads, std::uintptr_t stream) {
    const Place place = place_of({{"logits", logits},
                                  {"delta", delta},
                                  {"weight", weight},
                                  {"bounds", bounds},
                                  {"baseline", baseline},
                                  {"tolerance", tolerance},
                                  {"out", out}});
    check(logits.dims == 2 && delta.dims == 2, "logits, delta: expected two dimensions");
    check_real({"logits", logits});
    const std::int64_t images = logits.shape[0], classes = logits.shape[1];
    const std::int64_t units = delta.shape[1];
    const DType dtype = logits.dtype;
    const HeadFlipsParams params{
        .logits = read<void>({"logits", logits}, dtype, {images, classes}),
        .delta = read<void>({"delta", delta}, dtype, {images, units}),
        .weight = read<void>({"weight", weight}, dtype, {units, classes}),
        .bounds = read<void>({"bounds", bounds}, dtype, {3, units}),
        .baseline = read_index({"baseline", baseline}, images, 0, classes),
        .tolerance = read<void>({"tolerance", tolerance}, dtype, {images}),
        .out = write<std::int32_t>({"out", out}, DType::int32, {images, units}),
        .images = images,
        .units = units,
        .classes = classes,
        .dtype = dtype,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::head_flips, cuda::head_flips);
}

void classify(const TensorView& logits, const TensorView& delta, const TensorView& image,
              const TensorView& tolerance, const TensorView& out, double relative, int threads,
              std::uintptr_t stream) {
    const Place place = place_of({{"logits", logits},
                                  {"delta", delta},
                                  {"image", image},
                                  {"tolerance", tolerance},
                                  {"out", out}});
    check(logits.dims == 2 && logits.shape[1] > 0, "logits: expected [N, K] with K > 0");
    check(out.dims == 1, "out: expected one dimension");
    check_real({"logits", logits});
    const std::int64_t images = logits.shape[0], classes = logits.shape[1];
    const std::int64_t pairs = out.shape[0];
    const DType dtype = logits.dtype;
    const ClassifyParams params{
        .logits = read<void>({"logits", logits}, dtype, {images, classes}),
        .delta = read<void>({"delta", delta}, dtype, {pairs, classes}),
        .image = read_index({"image", image}, pairs, 0, images),
        .tolerance = read<void>({"tolerance", tolerance}, dtype, {images}),
        .out = write<std::int32_t>({"out", out}, DType::int32, {pairs}),
        .images = images,
        .pairs = pairs,
        .classes = classes,
        .relative = relative,
        .dtype = dtype,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::classify, cuda::classify);
}

void confusion_counts(const TensorView& prediction, const TensorView& label, const TensorView& out,
                      int threads, std::uintptr_t stream) {
    const Place place = place_of({{"prediction", prediction}, {"label", label}, {"out", out}});
    check(prediction.dims == 2 && out.dims == 3, "prediction, out: expected [U, N] and [U, K, K]");
    const std::int64_t units = prediction.shape[0], images = prediction.shape[1];
    const std::int64_t classes = out.shape[2];
    TensorView flat = prediction;
    check_dense({"prediction", prediction});
    flat.dims = 1;
    flat.shape[0] = units * images;
    flat.strides[0] = 1;
    const ConfusionCountsParams params{
        .prediction = read_index({"prediction", flat}, units * images, 0, classes),
        .label = read_index({"label", label}, images, 0, classes),
        .out = write<std::int32_t>({"out", out}, DType::int32, {units, classes, classes}),
        .units = units,
        .images = images,
        .classes = classes,
    };
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::confusion_counts, cuda::confusion_counts);
}

}  // namespace

void define_decisions(py::module_& m) {
    m.def("head_flips", &head_flips, "logits"_a, "delta"_a, "weight"_a, "bounds"_a, "baseline"_a,
          "tolerance"_a, "out"_a, "threads"_a, "stream"_a);
    m.def("classify", &classify, "logits"_a, "delta"_a, "image"_a, "tolerance"_a, "out"_a,
          "relative"_a, "threads"_a, "stream"_a);
    m.def("confusion_counts", &confusion_counts, "prediction"_a, "label"_a, "out"_a, "threads"_a,
          "stream"_a);
}

}  // namespace pyablate
