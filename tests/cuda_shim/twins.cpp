// The extension's bindings with the CUDA backends behind them, on CPU tensors: every tensor on the CPU
// is taken for one on a CUDA device, and the CPU's backends are missing.
#define view_tensor view_tensor_where_it_is
#include "../../csrc/bindings/torch_view.cpp"
#undef view_tensor

#include <cstdlib>

#include "../../csrc/cpu/isa.h"
#include "pyablate/class_moments.h"
#include "pyablate/class_ranks.h"
#include "pyablate/confusion_counts.h"
#include "pyablate/masked_copies.h"

namespace pyablate {

TensorView view_tensor(pybind11::handle object) {
    TensorView view = view_tensor_where_it_is(object);
    if (view.device == DeviceKind::cpu) view.device = DeviceKind::cuda;
    return view;
}

namespace cpu {

// Never called; a new operation adds its line.
void masked_copies(const MaskedCopiesParams&, int) {
    std::abort();
}
void head_flips(const HeadFlipsParams&, int) {
    std::abort();
}
void classify(const ClassifyParams&, int) {
    std::abort();
}
void confusion_counts(const ConfusionCountsParams&, int) {
    std::abort();
}
void class_moments(const ClassMomentsParams&, int) {
    std::abort();
}
void class_ranks(const ClassRanksParams&, int) {
    std::abort();
}
void map_moments(const MapMomentsParams&, int) {
    std::abort();
}
void delta_activation(const DeltaActivationParams&, int) {
    std::abort();
}
void delta_mean(const DeltaMeanParams&, int) {
    std::abort();
}
void delta_max_pool(const DeltaMaxPoolParams&, int) {
    std::abort();
}
void delta_winograd(const DeltaWinogradParams&, int) {
    std::abort();
}
void depthwise(const DepthwiseParams&, int) {
    std::abort();
}
void delta_product(const DeltaProductParams&, int) {
    std::abort();
}
void perturbed(const DifferenceParams&, int) {
    std::abort();
}
void subtracted(const DifferenceParams&, int) {
    std::abort();
}
void unit_delta(const UnitDeltaParams&, int) {
    std::abort();
}

const Kernels& kernels() {
    static const Kernels none = [] {
        Kernels all{};
        all.name = "cuda-on-cpu";
        return all;
    }();
    return none;
}
bool use_isa(const std::string&) {
    return false;
}

}  // namespace cpu
}  // namespace pyablate
