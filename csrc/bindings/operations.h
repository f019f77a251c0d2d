// What the bindings of the operations share, and what adds them to the module. Each function of
// Python: validate, leave the GIL, hand over to the backend of the tensors' device. Outputs
// come from Python.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "arguments.h"
#include "torch_view.h"

namespace pyablate {

namespace py = pybind11;
using namespace py::literals;

void define_units(py::module_& m);
void define_convolutions(py::module_& m);
void define_deltas(py::module_& m);
void define_decisions(py::module_& m);
void define_moments(py::module_& m);

template <class P>
void run(const Place& place, const P& params, int threads, std::uintptr_t stream,
         void (*cpu_twin)(const P&, int), void (*cuda_twin)(const P&, int, void*)) {
    const py::gil_scoped_release released;
    if (place.cuda) {
        cuda_twin(params, place.index, reinterpret_cast<void*>(stream));
    } else {
        cpu_twin(params, threads);
    }
}

}  // namespace pyablate
