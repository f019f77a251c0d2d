#include "pyablate/delta_mean.h"

#include "change.h"
#include "isa.h"
#include "pyablate/dispatch.h"

namespace pyablate::PYABLATE_ISA {

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
            const Change change = change_of(p, pair);
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
