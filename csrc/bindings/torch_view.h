// How a torch.Tensor is seen from C++, without libtorch.
#pragma once

#include <pybind11/pybind11.h>

#include "pyablate/tensor_view.h"

namespace pyablate {

// Reads a plain, strided torch.Tensor (or Parameter). Raises TypeError for anything else, and for a
// tensor that has elements but no memory. The view does not keep the tensor alive.
TensorView view_tensor(pybind11::handle object);

// "dlpack" if PyTorch's C exchange table is read, "attributes" if tensors are read by their Python
// attributes; the second also if `use_table` is false, for tests.
const char* tensor_access(bool use_table);

}  // namespace pyablate

namespace pybind11::detail {

template <>
struct type_caster<pyablate::TensorView> {
    PYBIND11_TYPE_CASTER(pyablate::TensorView, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        value = pyablate::view_tensor(source);
        return true;
    }
};

}  // namespace pybind11::detail
