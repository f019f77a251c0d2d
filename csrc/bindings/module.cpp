// The Python module pyablate._core: what was built, and the operations (operations.h).
#include <pybind11/typing.h>

#include "../cpu/isa.h"
#include "operations.h"
#include "pyablate/launch.h"

namespace pyablate {

namespace {

py::typing::Dict<py::str, py::object> build_info() {
    py::typing::Dict<py::str, py::object> info;
#ifdef __VERSION__
    info["compiler"] = PYABLATE_COMPILER " " __VERSION__;
#else
    info["compiler"] = PYABLATE_COMPILER;
#endif
    const std::string architectures = PYABLATE_CUDA_ARCHITECTURES;
    const std::string toolkit = PYABLATE_CUDA_TOOLKIT;
    const std::string sanitizers = PYABLATE_SANITIZERS;
    const auto or_none = [](const std::string& text) -> py::object {
        return text.empty() ? py::object(py::none()) : py::object(py::str(text));
    };
    info["cuda"] = !architectures.empty();
    info["cuda_architectures"] = or_none(architectures);
    info["cuda_toolkit"] = or_none(toolkit);
    info["cpu_isa"] = cpu::kernels().name;
    info["sanitizers"] = or_none(sanitizers);
    return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "Native operations of pyablate; call them through pyablate.ops.";
    m.attr("has_cuda") = PYABLATE_CUDA_ARCHITECTURES[0] != '\0';

    m.def("build_info", &build_info, "What was built and which CPU kernels are in use.");
    m.def("use_isa", &cpu::use_isa, "name"_a,
          "Use the CPU kernels 'baseline', 'avx2' or 'avx512'; False if this machine cannot.");
    m.def("tensor_access", &tensor_access, "use_table"_a,
          "Read tensors by the exchange table if allowed and there; tell how they are read.");
    m.def("grid_size", &grid_size, "elements"_a, "per_block"_a,
          "Blocks of a CUDA launch, for tests.");

    define_units(m);
    define_convolutions(m);
    define_deltas(m);
    define_decisions(m);
    define_moments(m);
}

}  // namespace pyablate
