#include "torch_view.h"

#include <string>

#include "dlpack_abi.h"

namespace py = pybind11;

namespace pyablate {

namespace {

// What is looked up in Python once. The references are never given back: the interpreter may be
// gone when static objects end.
struct Torch {
    PyObject* tensor;     // torch.Tensor
    PyObject* parameter;  // torch.nn.Parameter
    PyObject* strided;    // torch.strided
    PyObject *float32, *float64, *bfloat16, *float16, *int32, *int64, *uint8;
    const dlpack::ExchangeApi* table;  // null where PyTorch has none that is known here

    Torch() {
        const py::module_ torch = py::module_::import("torch");
        const auto keep = [](py::object object) { return object.release().ptr(); };
        tensor = keep(torch.attr("Tensor"));
        parameter = keep(torch.attr("nn").attr("Parameter"));
        strided = keep(torch.attr("strided"));
        float32 = keep(torch.attr("float32"));
        float64 = keep(torch.attr("float64"));
        bfloat16 = keep(torch.attr("bfloat16"));
        float16 = keep(torch.attr("float16"));
        int32 = keep(torch.attr("int32"));
        int64 = keep(torch.attr("int64"));
        uint8 = keep(torch.attr("uint8"));
        table = find_table(tensor);
    }

    static const dlpack::ExchangeApi* find_table(PyObject* type) {
        const py::object capsule =
            py::getattr(py::handle(type), dlpack::type_attribute, py::none());
        if (!PyCapsule_IsValid(capsule.ptr(), dlpack::capsule_name)) return nullptr;
        auto* table = static_cast<const dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule.ptr(), dlpack::capsule_name));
        while (table != nullptr && table->version.major != dlpack::known_major) {
            table = table->previous;
        }
        return table != nullptr && table->tensor_from_object != nullptr ? table : nullptr;
    }
};

const Torch& torch() {
    static const Torch* found = new Torch();  // on failure the exception passes on to the caller
    return *found;
}

bool table_allowed = true;

std::string type_name(py::handle object) {
    return py::str(py::type::of(object).attr("__name__"));
}

DType dtype_of(std::uint8_t code, int bits) {
    if (code == dlpack::float_code && bits == 32) return DType::float32;
    if (code == dlpack::float_code && bits == 64) return DType::float64;
    if (code == dlpack::bfloat_code && bits == 16) return DType::bfloat16;
    if (code == dlpack::float_code && bits == 16) return DType::float16;
    if (code == dlpack::int_code && bits == 32) return DType::int32;
    if (code == dlpack::int_code && bits == 64) return DType::int64;
    if (code == dlpack::uint_code && bits == 8) return DType::uint8;
    return DType::other;
}

TensorView from_table(py::handle object, const dlpack::ExchangeApi& table) {
    dlpack::Tensor seen{};
    if (table.tensor_from_object(object.ptr(), &seen) != 0) {
        py::raise_from(PyExc_TypeError, "expected a tensor on a CPU or CUDA device, with storage");
        throw py::error_already_set();
    }
    TensorView view;
    view.data = static_cast<char*>(seen.data) + (seen.data != nullptr ? seen.byte_offset : 0);
    view.dtype = dtype_of(seen.dtype.code, seen.dtype.bits);
    view.item_size = seen.dtype.bits / 8;
    const auto device = seen.device.type;
    view.device = device == dlpack::cpu || device == dlpack::cuda_host ? DeviceKind::cpu
                  : device == dlpack::cuda                             ? DeviceKind::cuda
                                                                       : DeviceKind::other;
    view.device_index = seen.device.index;
    if (seen.dims > max_dims) throw py::type_error("tensors of at most 8 dimensions are supported");
    view.dims = seen.dims;
    std::int64_t dense = 1;
    for (int i = seen.dims - 1; i >= 0; --i) {
        view.shape[i] = seen.shape[i];
        view.strides[i] = seen.strides != nullptr ? seen.strides[i] : dense;
        dense *= seen.shape[i];
    }
    return view;
}

TensorView from_attributes(py::handle object) {
    const Torch& t = torch();
    TensorView view;
    view.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
    PyObject* dtype = object.attr("dtype").ptr();
    view.dtype = dtype == t.float32    ? DType::float32
                 : dtype == t.float64  ? DType::float64
                 : dtype == t.bfloat16 ? DType::bfloat16
                 : dtype == t.float16  ? DType::float16
                 : dtype == t.int32    ? DType::int32
                 : dtype == t.int64    ? DType::int64
                 : dtype == t.uint8    ? DType::uint8
                                       : DType::other;
    view.item_size = object.attr("element_size")().cast<int>();
    const py::object device = object.attr("device");
    const std::string kind = py::str(device.attr("type"));
    view.device = kind == "cpu"    ? DeviceKind::cpu
                  : kind == "cuda" ? DeviceKind::cuda
                                   : DeviceKind::other;
    const py::object index = device.attr("index");
    view.device_index = index.is_none() ? 0 : index.cast<int>();
    const py::tuple shape = object.attr("shape");
    const py::tuple strides = object.attr("stride")();
    if (shape.size() > max_dims) {
        throw py::type_error("tensors of at most 8 dimensions are supported");
    }
    view.dims = static_cast<int>(shape.size());
    for (int i = 0; i < view.dims; ++i) {
        const auto at = static_cast<std::size_t>(i);
        view.shape[i] = shape[at].cast<std::int64_t>();
        view.strides[i] = strides[at].cast<std::int64_t>();
    }
    return view;
}

}  // namespace

TensorView view_tensor(py::handle object) {
    const Torch& t = torch();
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
    if (type != t.tensor && type != t.parameter) {
        throw py::type_error("expected a plain torch.Tensor, got " + type_name(object));
    }
    if (object.attr("layout").ptr() != t.strided) {
        throw py::type_error("expected a strided tensor, got one with layout " +
                             std::string(py::str(object.attr("layout"))));
    }
    const TensorView view = t.table != nullptr && table_allowed ? from_table(object, *t.table)
                                                                : from_attributes(object);
    if (view.data == nullptr && view.elements() > 0) {
        throw py::type_error("expected a tensor with memory of its own, got one without storage");
    }
    return view;
}

const char* tensor_access(bool use_table) {
    table_allowed = use_table;
    return use_table && torch().table != nullptr ? "dlpack" : "attributes";
}

}  // namespace pyablate
