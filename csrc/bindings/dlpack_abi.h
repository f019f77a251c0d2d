// The part of DLPack's C exchange table that is used here, as laid out by DLPack 1.3 (the struct's
// documentation: https://dmlc.github.io/dlpack/latest/c_api.html). Only reading is needed: the
// functions that make or hand over tensors are kept as untyped pointers.
#pragma once

#include <cstdint>

namespace pyablate::dlpack {

enum DeviceType : std::int32_t { cpu = 1, cuda = 2, cuda_host = 3, cuda_managed = 13 };

enum TypeCode : std::uint8_t { int_code = 0, uint_code = 1, float_code = 2, bfloat_code = 4 };

struct Tensor {
    void* data;
    struct {
        DeviceType type;
        std::int32_t index;
    } device;
    std::int32_t dims;
    struct {
        std::uint8_t code;
        std::uint8_t bits;
        std::uint16_t lanes;
    } dtype;
    std::int64_t* shape;
    std::int64_t* strides;  // in elements; null in old producers for a contiguous tensor
    std::uint64_t byte_offset;
};

struct Version {
    std::uint32_t major;
    std::uint32_t minor;
};

struct ExchangeApi {
    Version version;
    ExchangeApi* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    // Fills `out` with a view that is valid until control returns to Python; -1 on failure, with a
    // Python exception set. May be null.
    int (*tensor_from_object)(void* object, Tensor* out);
    void* current_stream;
};

constexpr std::uint32_t known_major = 1;
constexpr const char* capsule_name = "dlpack_exchange_api";
constexpr const char* type_attribute = "__dlpack_c_exchange_api__";

}  // namespace pyablate::dlpack
