#include "pyablate/dispatch.h"

#include "pyablate/check.h"

namespace pyablate {

const char* name_of(DType dtype) {
    switch (dtype) {
        case DType::float32:
            return "float32";
        case DType::float64:
            return "float64";
        case DType::bfloat16:
            return "bfloat16";
        case DType::float16:
            return "float16";
        case DType::int32:
            return "int32";
        case DType::int64:
            return "int64";
        case DType::uint8:
            return "uint8";
        default:
            return "another dtype";
    }
}

void fail_no_version(const char* op, DType dtype, DType base) {
    fail(op, ": no version for a tensor of ", name_of(dtype), " beside one of ", name_of(base));
}

}  // namespace pyablate
