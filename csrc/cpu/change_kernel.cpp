#include "change.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "vector_math.h"

namespace pyablate::PYABLATE_ISA {

namespace {

template <ActivationKind K, class B, class D, class O>
void change_run(const void* base_, const void* delta_, const void* addend_, void* out_,
                std::int64_t count, const Change& change) {
    using V = Vec<Compute<D>, full_lanes<Compute<D>>>;
    const B* base = static_cast<const B*>(base_);
    const D* delta = static_cast<const D*>(delta_);
    const D* addend = static_cast<const D*>(addend_);
    O* out = static_cast<O*>(out_);
    const V a(change.activation.a), b(change.activation.b);
    const V scale(change.scale), addend_scale(change.addend_scale);
    const auto step = [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        V d = load_n<V>(delta + i, n) * scale;
        if (addend != nullptr) d = d + load_n<V>(addend + i, n) * addend_scale;
        if constexpr (K != ActivationKind::identity) {
            d = activate_change<K>(load_n<V>(base + i, n), d, a, b);
        }
        store_n(out + i, d, n);
    };
    std::int64_t i = 0;
    for (; i + V::size <= count; i += V::size) step(i, V::size);
    if (i < count) step(i, static_cast<int>(count - i));
}

template <class B, class D, class O>
ChangeRun find(ActivationKind kind) {
    ChangeRun found = nullptr;
    dispatch_activation(kind, [&](auto k) { found = change_run<decltype(k)::value, B, D, O>; });
    return found;
}

}  // namespace

ChangeRun find_change_run(ActivationKind kind, DType base, DType delta, DType out) {
    ChangeRun found = nullptr;
    dispatch_change("delta_activation", delta, base, [&](auto d, auto b) {
        using D = typename decltype(d)::type;
        using B = typename decltype(b)::type;
        if (out == delta) {
            found = find<B, D, D>(kind);
        } else if constexpr (std::is_same_v<D, float>) {
            if (out == DType::bfloat16) found = find<B, float, BFloat16>(kind);
        } else if constexpr (std::is_same_v<D, BFloat16>) {
            if (out == DType::float32) found = find<B, BFloat16, float>(kind);
        }
    });
    if (found == nullptr) fail_no_version("delta_activation", delta, out);
    return found;
}

namespace {

using Floats = Vec<float, full_lanes<float>>;
typedef std::int32_t Bits __attribute__((vector_size(4 * Floats::size)));

Bits bits_of(const Floats& values) {
    Bits bits;
    __builtin_memcpy(&bits, &values.lanes, sizeof bits);
    return bits;
}

// Calls step(i, lanes) for all vectors of `count` numbers. The whole ones see a constant, so that
// their loads and stores are single instructions.
template <class Step>
void for_vectors(std::int64_t count, const Step& step) {
    std::int64_t i = 0;
    for (; i + Floats::size <= count; i += Floats::size) step(i, Floats::size);
    if (i < count) step(i, static_cast<int>(count - i));
}

// Bits of the largest magnitude; magnitudes compare like the numbers that their bits spell, and
// infinities and NaN are the largest.
std::int32_t largest_bits(const float* change, std::int64_t count) {
    Bits most = {};
    for_vectors(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        const Bits bits = bits_of(load_n<Floats>(change + i, n)) & 0x7fffffff;
        most = bits > most ? bits : most;
    });
    std::int32_t found = 0;
    for (int lane = 0; lane < Floats::size; ++lane) {
        if (most[lane] > found) found = most[lane];
    }
    return found;
}

// Sets the scale of codes whose largest change has these bits; returns its inverse.
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
    for_vectors(count, [&](std::int64_t i, int n) PYABLATE_LAMBDA_INLINE {
        const Floats shifted = load_n<Floats>(change + i, n) * factor + magic;
        // By way of 16 bits: GCC 12 takes the direct way lane by lane, eight times as slowly.
        const Halves halves = __builtin_convertvector(bits_of(shifted), Halves);
        const Bytes bytes = __builtin_convertvector(halves, Bytes);
        __builtin_memcpy(codes + i, &bytes, static_cast<std::size_t>(n));
    });
}

}  // namespace

void encode(const float* change, std::int64_t count, std::uint8_t* codes, float* scale) {
    write_codes(change, count, code_inverse(largest_bits(change, count), scale), codes);
}

namespace {

// 16 KiB of float: half of a first cache.
constexpr std::int64_t code_block = 4096;

std::int64_t bytes_of(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

Change change_of(const DeltaActivationParams& p, std::int64_t pair) {
    return {p.activation, p.scale == nullptr ? 1.0 : p.scale[pair],
            p.addend_scale == nullptr ? 1.0 : p.addend_scale[pair]};
}

// Runs `count` elements of a pair's row from `start` on through `run`.
void run_part(const DeltaActivationParams& p, ChangeRun run, std::int64_t pair, std::int64_t start,
              std::int64_t count, void* out) {
    const std::int64_t at = (pair * p.width + start) * bytes_of(p.dtype);
    const std::int64_t from = (p.image[pair] * p.width + start) * bytes_of(p.base_dtype);
    const char* addend = static_cast<const char*>(p.addend);
    run(static_cast<const char*>(p.base) + from, static_cast<const char*>(p.delta) + at,
        addend == nullptr ? addend : addend + at, out, count, change_of(p, pair));
}

}  // namespace

// Items are the blocks of the rows of [P, M], row by row.
void delta_activation(const DeltaActivationParams& p, std::int64_t begin, std::int64_t end) {
    const ChangeRun run = find_change_run(p.activation.kind, p.base_dtype, p.dtype, p.dtype);
    const std::int64_t block = cpu::activation_block;
    const std::int64_t blocks = (p.width + block - 1) / block;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t pair = item / blocks;
        const std::int64_t start = item % blocks * block;
        const std::int64_t left = p.width - start;
        run_part(p, run, pair, start, left < block ? left : block,
                 static_cast<char*>(p.out) + (pair * p.width + start) * bytes_of(p.dtype));
    }
}

// Items are whole rows: the largest change is known only at the end. Each row is gone through
// twice, in blocks that stay in the first cache while all that is done to them is done.
void delta_activation_codes(const DeltaActivationParams& p, float* row, std::int64_t begin,
                            std::int64_t end) {
    const ChangeRun run = find_change_run(p.activation.kind, p.base_dtype, p.dtype, DType::float32);
    const ChangeRun keep =
        find_change_run(ActivationKind::identity, DType::float32, DType::float32, p.dtype);
    const auto blocks = [&](const auto& step) {
        for (std::int64_t start = 0; start < p.width; start += code_block) {
            const std::int64_t left = p.width - start;
            step(start, left < code_block ? left : code_block);
        }
    };
    for (std::int64_t pair = begin; pair < end; ++pair) {
        std::int32_t most = 0;
        blocks([&](std::int64_t start, std::int64_t count) {
            run_part(p, run, pair, start, count, row + start);
            const std::int32_t found = largest_bits(row + start, count);
            if (found > most) most = found;
        });
        const double inverse = code_inverse(most, p.codes.scale + pair);
        blocks([&](std::int64_t start, std::int64_t count) {
            const std::int64_t at = pair * p.width + start;
            write_codes(row + start, count, inverse, p.codes.values + at);
            if (p.out == nullptr) return;  // nobody wants the numbers themselves
            keep(nullptr, row + start, nullptr, static_cast<char*>(p.out) + at * bytes_of(p.dtype),
                 count, {});
        });
    }
}

// Items are pairs. Channels last, whole positions are added up lane by lane; else rows.
void delta_mean(const DeltaMeanParams& p, void* scratch, std::int64_t begin, std::int64_t end) {
    dispatch_change("delta_mean", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        using T = Compute<D>;
        const ChangeRun run =
            find_change_run(p.activation.kind, p.base_dtype, p.dtype, dtype_of<T>);
        const std::int64_t size = p.channels * p.positions;
        T* part = static_cast<T*>(scratch);
        for (std::int64_t pair = begin; pair < end; ++pair) {
            const Change change{p.activation, p.scale == nullptr ? 1.0 : p.scale[pair],
                                p.addend_scale == nullptr ? 1.0 : p.addend_scale[pair]};
            const B* from = static_cast<const B*>(p.base) + p.image[pair] * size;
            const D* first = static_cast<const D*>(p.delta) + pair * size;
            const D* second =
                p.addend == nullptr ? nullptr : static_cast<const D*>(p.addend) + pair * size;
            T* out = static_cast<T*>(p.out) + pair * p.channels;
            const T share = T(1) / static_cast<T>(p.positions);
            const std::int64_t rows = p.channels_last ? p.positions : p.channels;
            const std::int64_t width = p.channels_last ? p.channels : p.positions;
            if (p.channels_last) {
                for (std::int64_t c = 0; c < p.channels; ++c) out[c] = 0;
            }
            for (std::int64_t row = 0; row < rows; ++row) {
                const std::int64_t at = row * width;
                run(from + at, first + at, second == nullptr ? second : second + at, part, width,
                    change);
                if (p.channels_last) {
                    for (std::int64_t c = 0; c < width; ++c) out[c] += part[c];
                } else {
                    T sum = 0;
                    for (std::int64_t m = 0; m < width; ++m) sum += part[m];
                    out[row] = sum * share;
                }
            }
            if (p.channels_last) {
                for (std::int64_t c = 0; c < p.channels; ++c) out[c] *= share;
            }
        }
    });
}

}  // namespace pyablate::PYABLATE_ISA
