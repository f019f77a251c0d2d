// The CUDA backends of a build without CUDA: they say what is missing and how to get it.
#include <stdexcept>
#include <string>

#include "pyablate/class_moments.h"
#include "pyablate/class_ranks.h"
#include "pyablate/classify.h"
#include "pyablate/confusion_counts.h"
#include "pyablate/delta_activation.h"
#include "pyablate/delta_max_pool.h"
#include "pyablate/delta_mean.h"
#include "pyablate/delta_product.h"
#include "pyablate/depthwise.h"
#include "pyablate/difference.h"
#include "pyablate/head_flips.h"
#include "pyablate/map_moments.h"
#include "pyablate/masked_copies.h"
#include "pyablate/unit_delta.h"

namespace pyablate::cuda {

namespace {

[[noreturn]] void missing(const char* op) {
    throw std::runtime_error(
        std::string(op) +
        ": this build of pyablate has no CUDA code; install nvcc and reinstall "
        "with PYABLATE_CUDA=ON");
}

}  // namespace

void masked_copies(const MaskedCopiesParams&, int, void*) {
    missing("masked_copies");
}
void head_flips(const HeadFlipsParams&, int, void*) {
    missing("head_flips");
}
void class_moments(const ClassMomentsParams&, int, void*) {
    missing("class_moments");
}
void class_ranks(const ClassRanksParams&, int, void*) {
    missing("class_ranks");
}
void map_moments(const MapMomentsParams&, int, void*) {
    missing("map_moments");
}
void classify(const ClassifyParams&, int, void*) {
    missing("classify");
}
void confusion_counts(const ConfusionCountsParams&, int, void*) {
    missing("confusion_counts");
}
void delta_activation(const DeltaActivationParams&, int, void*) {
    missing("delta_activation");
}
void delta_mean(const DeltaMeanParams&, int, void*) {
    missing("delta_mean");
}
void delta_max_pool(const DeltaMaxPoolParams&, int, void*) {
    missing("delta_max_pool");
}
void depthwise(const DepthwiseParams&, int, void*) {
    missing("depthwise");
}
void delta_product(const DeltaProductParams&, int, void*) {
    missing("delta_product");
}
void perturbed(const DifferenceParams&, int, void*) {
    missing("perturbed");
}
void subtracted(const DifferenceParams&, int, void*) {
    missing("subtracted");
}
void unit_delta(const UnitDeltaParams&, int, void*) {
    missing("unit_delta");
}

}  // namespace pyablate::cuda
