#include "pyablate/classify.h"

#include "isa.h"
#include "pyablate/dispatch.h"
#include "top_two.h"

namespace pyablate::PYABLATE_ISA {

namespace {

template <class T>
void classify_pair(const ClassifyParams& p, std::int64_t pair) {
    const std::int64_t image = p.image[pair];
    const T* logits = static_cast<const T*>(p.logits) + image * p.classes;
    const T* delta = static_cast<const T*>(p.delta) + pair * p.classes;
    T limit = static_cast<const T*>(p.tolerance)[image];
    if (p.relative != 0) {
        T low = delta[0], high = delta[0];
        for (std::int64_t k = 1; k < p.classes; ++k) {
            low = delta[k] < low ? delta[k] : low;
            high = delta[k] > high ? delta[k] : high;
        }
        limit = limit + static_cast<T>(p.relative) * (high - low);
    }
    p.out[pair] = decide<T>(
        p.classes, limit, [&](auto vector, std::int64_t k, int some) PYABLATE_LAMBDA_INLINE {
            using V = decltype(vector);
            return changed(load_n<V>(logits + k, some), load_n<V>(delta + k, some));
        });
}

}  // namespace

void classify(const ClassifyParams& p, std::int64_t begin, std::int64_t end) {
    dispatch_real("classify", p.dtype, [&](auto type) {
        for (std::int64_t pair = begin; pair < end; ++pair) {
            classify_pair<typename decltype(type)::type>(p, pair);
        }
    });
}

}  // namespace pyablate::PYABLATE_ISA
