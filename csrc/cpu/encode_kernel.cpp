#include "encode.h"

#include "change.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

using Floats = Vec<float, full_lanes<float>>;
typedef std::int32_t Bits __attribute__((vector_size(4 * Floats::size)));

Bits bits_of(const Floats& values) {
    Bits bits;
    __builtin_memcpy(&bits, &values.lanes, sizeof bits);
    return bits;
}

}  // namespace

std::int32_t largest_bits(const float* change, std::int64_t count) {
    Bits most = {};
    for_vectors<Floats>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        const Bits bits = bits_of(load_n<Floats>(change + i, n)) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    std::int32_t found = 0;
    for (int lane = 0; lane < Floats::size; ++lane) {
        if (most[lane] > found) found = most[lane];
    }
    return found;
}

double code_inverse(std::int32_t most, float* scale) {
    float largest;
    __builtin_memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000;
    // Of the smallest numbers the inverse would be infinite: no change that could matter.
    const bool dead = finite && !(largest > 1e-30f);
    *scale = !finite ? __builtin_nanf("") : dead ? 0.0f : largest / code_most;
    return dead || !finite ? 0.0 : static_cast<double>(code_most / largest);
}

void write_codes(const float* change, std::int64_t count, double inverse, std::uint8_t* codes) {
    if (inverse == 0) {  // nothing to tell: no change, or one that is not finite
        __builtin_memset(codes, code_zero, static_cast<std::size_t>(count));
        return;
    }
    typedef std::int16_t Halves __attribute__((vector_size(2 * Floats::size)));
    typedef std::uint8_t Bytes __attribute__((vector_size(Floats::size)));
    // Adding 1.5 * 2^23 leaves no fraction bits: the rounded sum stands in the low bits.
    const Floats factor(inverse), magic(12582912.0 + code_zero);
    for_vectors<Floats>(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        const Floats shifted = load_n<Floats>(change + i, n) * factor + magic;
        // By way of 16 bits: GCC 12 takes the direct way lane by lane, eight times as slowly.
        const Halves halves = __builtin_convertvector(bits_of(shifted), Halves);
        const Bytes bytes = __builtin_convertvector(halves, Bytes);
        __builtin_memcpy(codes + i, &bytes, static_cast<std::size_t>(n));
    });
}

void encode(const float* change, std::int64_t count, std::int64_t pair, const Codes& codes,
            void* out, DType dtype) {
    const double inverse = code_inverse(largest_bits(change, count), codes.scale + pair);
    write_codes(change, count, inverse, codes.values + pair * count);
    if (out == nullptr) return;  // nobody wants the numbers themselves
    const ChangeRun keep =
        find_change_run(ActivationKind::identity, DType::float32, DType::float32, dtype);
    keep(nullptr, change, nullptr, static_cast<char*>(out) + pair * count * item_size(dtype), count,
         {});
}

}  // namespace pyablate::PYABLATE_ISA
