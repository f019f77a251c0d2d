// The kernels of each instruction set, and which of them this machine runs.
//
// The files <op>_kernel.cpp are compiled once per instruction set, each time inside a namespace of
// its name, so that nothing compiled for AVX-512 can stand in for code that runs without it.
#pragma once

#include <cstdint>
#include <string>

#include "pyablate/classify.h"
#include "pyablate/delta_activation.h"
#include "pyablate/delta_max_pool.h"
#include "pyablate/delta_mean.h"
#include "pyablate/delta_product.h"
#include "pyablate/delta_winograd.h"
#include "pyablate/depthwise.h"
#include "pyablate/difference.h"
#include "pyablate/head_flips.h"
#include "pyablate/map_moments.h"
#include "pyablate/unit_delta.h"

namespace pyablate {

namespace cpu {

// Elements of a row that are worked on together, so that few long rows feed many threads; as floats
// they take half of a first cache.
constexpr std::int64_t activation_block = 4096;

// What is pooled together: an output row of a pair (channels last), or a plane.
struct PoolParts {
    std::int64_t size, per_pair;
};

// How the scratch of one thread of unit_delta is divided, in elements of the dtype of weight.
struct UnitDeltaScratch {
    std::int64_t window;   // padded input rows, or the maps of a run of pairs
    std::int64_t counts;   // nonzero elements up to each position of a window row
    std::int64_t rows;     // which input row each window row holds
    std::int64_t results;  // one row of results, before the function
    std::int64_t whole;    // with codes: all results of a pair
};

// How the scratch of one thread of delta_winograd is divided, in floats.
struct WinogradScratch {
    std::int64_t tiles;     // that go through the products together
    std::int64_t inputs;    // transformed: one of 36 planes
    std::int64_t products;  // one of 36 planes
    std::int64_t zeros;     // what lies outside the maps
};

// Pairs of one column that are convolved together where each has a single output position.
constexpr std::int64_t unit_delta_run = 28;

}  // namespace cpu

// Each works on the items [begin, end) of its operation.
#define PYABLATE_DECLARE_KERNELS                                                                 \
    void unit_delta(const UnitDeltaParams& p, const cpu::UnitDeltaScratch& sizes, void* scratch, \
                    std::int64_t begin, std::int64_t end);                                       \
    void delta_activation(const DeltaActivationParams& p, std::int64_t begin, std::int64_t end); \
    void delta_activation_codes(const DeltaActivationParams& p, float* row, std::int64_t begin,  \
                                std::int64_t end);                                               \
    void delta_mean(const DeltaMeanParams& p, void* scratch, std::int64_t begin,                 \
                    std::int64_t end);                                                           \
    void delta_max_pool(const DeltaMaxPoolParams& p, const cpu::PoolParts& parts, void* scratch, \
                        std::int64_t begin, std::int64_t end);                                   \
    void delta_winograd(const DeltaWinogradParams& p, const cpu::WinogradScratch& sizes,         \
                        float* scratch, std::int64_t begin, std::int64_t end);                   \
    void depthwise(const DepthwiseParams& p, std::int64_t begin, std::int64_t end);              \
    void delta_product(const DeltaProductParams& p, std::int64_t begin, std::int64_t end);       \
    void perturbed(const DifferenceParams& p, std::int64_t begin, std::int64_t end);             \
    void subtracted(const DifferenceParams& p, std::int64_t begin, std::int64_t end);            \
    void head_flips(const HeadFlipsParams& p, std::int64_t begin, std::int64_t end);             \
    void classify(const ClassifyParams& p, std::int64_t begin, std::int64_t end);                \
    void map_moments(const MapMomentsParams& p, std::int64_t begin, std::int64_t end);

namespace baseline {
PYABLATE_DECLARE_KERNELS
}
namespace avx2 {
PYABLATE_DECLARE_KERNELS
}
namespace avx512 {
PYABLATE_DECLARE_KERNELS
}

namespace cpu {

struct Kernels {
    const char* name;
    decltype(&baseline::unit_delta) unit_delta;
    decltype(&baseline::delta_activation) delta_activation;
    decltype(&baseline::delta_activation_codes) delta_activation_codes;
    decltype(&baseline::delta_mean) delta_mean;
    decltype(&baseline::delta_max_pool) delta_max_pool;
    decltype(&baseline::delta_winograd) delta_winograd;
    decltype(&baseline::depthwise) depthwise;
    decltype(&baseline::delta_product) delta_product;
    decltype(&baseline::perturbed) perturbed;
    decltype(&baseline::subtracted) subtracted;
    decltype(&baseline::head_flips) head_flips;
    decltype(&baseline::classify) classify;
    decltype(&baseline::map_moments) map_moments;
};

// The kernels in use: at first the best that this machine runs.
const Kernels& kernels();

// Uses "baseline", "avx2" or "avx512" from now on, for tests; false if this machine cannot.
bool use_isa(const std::string& name);

}  // namespace cpu
}  // namespace pyablate
