#include "pyablate/delta_activation.h"

#include "change.h"
#include "encode.h"
#include "isa.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// The block of a row that begins at `start`: `count` elements through `run`.
void run_block(const DeltaActivationParams& p, ChangeRun run, std::int64_t pair, std::int64_t start,
               std::int64_t count, void* out) {
    const std::int64_t at = (pair * p.width + start) * item_size(p.dtype);
    const std::int64_t from = (p.image[pair] * p.width + start) * item_size(p.base_dtype);
    const char* addend = static_cast<const char*>(p.addend);
    run(static_cast<const char*>(p.base) + from, static_cast<const char*>(p.delta) + at,
        addend == nullptr ? addend : addend + at, out, count, change_of(p, pair));
}

std::int64_t block_at(const DeltaActivationParams& p, std::int64_t start) {
    const std::int64_t left = p.width - start;
    return left < cpu::activation_block ? left : cpu::activation_block;
}

}  // namespace

// Items are the blocks of the rows of [P, M], row by row.
void delta_activation(const DeltaActivationParams& p, std::int64_t begin, std::int64_t end) {
    const ChangeRun run = find_change_run(p.activation.kind, p.base_dtype, p.dtype, p.dtype);
    const std::int64_t blocks = (p.width + cpu::activation_block - 1) / cpu::activation_block;
    for (std::int64_t item = begin; item < end; ++item) {
        const std::int64_t pair = item / blocks;
        const std::int64_t start = item % blocks * cpu::activation_block;
        run_block(p, run, pair, start, block_at(p, start),
                  static_cast<char*>(p.out) + (pair * p.width + start) * item_size(p.dtype));
    }
}

// Items are whole rows: the largest change is known only at the end. Each row is gone through
// twice, in blocks that stay in the first cache while all that is done to them is done.
void delta_activation_codes(const DeltaActivationParams& p, float* row, std::int64_t begin,
                            std::int64_t end) {
    const ChangeRun run = find_change_run(p.activation.kind, p.base_dtype, p.dtype, DType::float32);
    const ChangeRun keep =
        find_change_run(ActivationKind::identity, DType::float32, DType::float32, p.dtype);
    const std::int64_t block = cpu::activation_block;
    for (std::int64_t pair = begin; pair < end; ++pair) {
        std::int32_t most = 0;
        for (std::int64_t start = 0; start < p.width; start += block) {
            const std::int64_t count = block_at(p, start);
            run_block(p, run, pair, start, count, row + start);
            const std::int32_t found = largest_bits(row + start, count);
            if (found > most) most = found;
        }
        const double inverse = code_inverse(most, p.codes.scale + pair);
        for (std::int64_t start = 0; start < p.width; start += block) {
            const std::int64_t count = block_at(p, start), at = pair * p.width + start;
            write_codes(row + start, count, inverse, p.codes.values + at);
            if (p.out == nullptr) continue;  // nobody wants the numbers themselves
            keep(nullptr, row + start, nullptr, static_cast<char*>(p.out) + at * item_size(p.dtype),
                 count, {});
        }
    }
}

}  // namespace pyablate::PYABLATE_ISA
