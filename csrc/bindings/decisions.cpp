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
    read<std::int32_t>({"out", out}, DType::int32, {images, units});
    const HeadFlipsParams params{read<void>({"logits", logits}, dtype, {images, classes}),
                                 read<void>({"delta", delta}, dtype, {images, units}),
                                 read<void>({"weight", weight}, dtype, {units, classes}),
                                 read<void>({"bounds", bounds}, dtype, {3, units}),
                                 read_index({"baseline", baseline}, images, 0, classes),
                                 read<void>({"tolerance", tolerance}, dtype, {images}),
                                 static_cast<std::int32_t*>(out.data),
                                 images,
                                 units,
                                 classes,
                                 dtype};
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
    read<std::int32_t>({"out", out}, DType::int32, {pairs});
    const ClassifyParams params{read<void>({"logits", logits}, dtype, {images, classes}),
                                read<void>({"delta", delta}, dtype, {pairs, classes}),
                                read_index({"image", image}, pairs, 0, images),
                                read<void>({"tolerance", tolerance}, dtype, {images}),
                                static_cast<std::int32_t*>(out.data),
                                images,
                                pairs,
                                classes,
                                relative,
                                dtype};
    if (out.elements() == 0) return;
    run(place, params, threads, stream, cpu::classify, cuda::classify);
}

void confusion_counts(const TensorView& prediction, const TensorView& label, const TensorView& out,
                      int threads, std::uintptr_t stream) {
    const Place place = place_of({{"prediction", prediction}, {"label", label}, {"out", out}});
    check(prediction.dims == 2 && out.dims == 3, "prediction, out: expected [U, N] and [U, K, K]");
    const std::int64_t units = prediction.shape[0], images = prediction.shape[1];
    const std::int64_t classes = out.shape[2];
    read<std::int32_t>({"out", out}, DType::int32, {units, classes, classes});
    TensorView flat = prediction;
    check_contiguous({"prediction", prediction});
    flat.dims = 1;
    flat.shape[0] = units * images;
    flat.strides[0] = 1;
    const ConfusionCountsParams params{read_index({"prediction", flat}, units * images, 0, classes),
                                       read_index({"label", label}, images, 0, classes),
                                       static_cast<std::int32_t*>(out.data),
                                       units,
                                       images,
                                       classes};
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
