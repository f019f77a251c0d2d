#include "isa.h"

#include <atomic>

namespace pyablate::cpu {

namespace {

#define PYABLATE_KERNELS(isa)     \
    {#isa,                        \
     isa::unit_delta,             \
     isa::delta_activation,       \
     isa::delta_activation_codes, \
     isa::delta_mean,             \
     isa::delta_max_pool,         \
     isa::delta_winograd,         \
     isa::depthwise,              \
     isa::delta_product,          \
     isa::perturbed,              \
     isa::subtracted,             \
     isa::head_flips,             \
     isa::classify,               \
     isa::map_moments}

const Kernels baseline_kernels = PYABLATE_KERNELS(baseline);

#ifdef PYABLATE_X86_KERNELS
const Kernels avx2_kernels = PYABLATE_KERNELS(avx2);
const Kernels avx512_kernels = PYABLATE_KERNELS(avx512);

// The compiler's probe also asks whether the operating system saves the wide registers.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels* find(const std::string& name) {
    if (name == "baseline") return &baseline_kernels;
#ifdef PYABLATE_X86_KERNELS
    if (name == "avx2" && has_avx2()) return &avx2_kernels;
    if (name == "avx512" && has_avx512()) return &avx512_kernels;
#endif
    return nullptr;
}

const Kernels* best() {
    for (const char* name : {"avx512", "avx2"}) {
        if (const Kernels* found = find(name)) return found;
    }
    return &baseline_kernels;
}

std::atomic<const Kernels*>& in_use() {
    static std::atomic<const Kernels*> chosen{best()};
    return chosen;
}

}  // namespace

const Kernels& kernels() {
    return *in_use().load();
}

bool use_isa(const std::string& name) {
    const Kernels* found = find(name);
    if (found != nullptr) in_use().store(found);
    return found != nullptr;
}

}  // namespace pyablate::cpu
