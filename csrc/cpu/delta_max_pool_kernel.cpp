// Max pooling of a change: see delta_max_pool.h for the formula.
//
// Channels last: a vector holds neighbouring channels of one window. Otherwise it holds
// neighbouring windows of one output row, gathered lane by lane unless they touch.
#include "change.h"
#include "encode.h"
#include "isa.h"
#include "pyablate/dispatch.h"
#include "simd.h"

namespace pyablate::PYABLATE_ISA {

namespace {

// The taps of a window that lie inside the map along one axis: first <= tap < last.
struct Span {
    std::int64_t first, last;
};

PYABLATE_INLINE Span inside(std::int64_t start, std::int64_t kernel, std::int64_t dilation,
                            std::int64_t size) {
    const std::int64_t first = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const std::int64_t room = size > start ? (size - start + dilation - 1) / dilation : 0;
    return {first, room < kernel ? room : kernel};
}

template <class V>
constexpr double lowest = std::is_same_v<typename V::Scalar, float> ? -__FLT_MAX__ : -__DBL_MAX__;

// Maximum of a window and how it changes (per lane); at(f) calls f(base, delta) for each tap.
template <class V, class F>
PYABLATE_INLINE void pool_window(F at, V& most, V& change) {
    const V nothing(-__builtin_inf());
    V top = nothing, difference = nothing;
    auto spoiled = top > top;  // nowhere
    at([&](V z, V) PYABLATE_LAMBDA_INLINE { top = where(z > top, z, top); });
    // still -inf: no tap inside the map, or none that could win
    const auto empty = top < V(lowest<V>);
    most = where(empty, V(0.0), top);
    at([&](V z, V d) PYABLATE_LAMBDA_INLINE {
        const V moved = (z - most) + d;  // NaN where z, d or the maximum is, or it is infinite
        spoiled.lanes |= moved.lanes != moved.lanes;
        difference = where(moved > difference, moved, difference);
    });
    change = where(spoiled, V(__builtin_nan("")), where(empty, V(0.0), difference));
}

// One row of output: maxima and changes go to [Wo, C] (channels last) or [C, Wo].
template <class D, class B, class T>
void pool_channels_last(const DeltaMaxPoolParams& p, std::int64_t pair, std::int64_t y, T* most,
                        T* change) {
    const std::int64_t c = p.channels;
    const double scale = p.scale == nullptr ? 1.0 : p.scale[pair];
    const B* base = static_cast<const B*>(p.base) + p.image[pair] * p.height * p.width * c;
    const D* delta = static_cast<const D*>(p.delta) + pair * p.height * p.width * c;
    const std::int64_t top = y * p.stride_h - p.padding_h;
    const Span rows = inside(top, p.kernel_h, p.dilation_h, p.height);
    for (std::int64_t x = 0; x < p.out_w; ++x) {
        const std::int64_t left = x * p.stride_w - p.padding_w;
        const Span columns = inside(left, p.kernel_w, p.dilation_w, p.width);
        for_each_vector<T>(c, [&](auto vector, std::int64_t o, int n) PYABLATE_LAMBDA_INLINE {
            using V = decltype(vector);
            V window_most, window_change;
            pool_window(
                [&](auto f) PYABLATE_LAMBDA_INLINE {
                    for (std::int64_t i = rows.first; i < rows.last; ++i) {
                        for (std::int64_t j = columns.first; j < columns.last; ++j) {
                            const std::int64_t at =
                                ((top + i * p.dilation_h) * p.width + left + j * p.dilation_w) * c +
                                o;
                            f(load_n<V>(base + at, n), load_n<V>(delta + at, n) * V(scale));
                        }
                    }
                },
                window_most, window_change);
            store_n(most + x * c + o, window_most, n);
            store_n(change + x * c + o, window_change, n);
        });
    }
}

// Lanes x, x + step, ... of a row, n of them; `outside` where that is not in [0, width).
template <class V, class S>
PYABLATE_INLINE V gather(const S* row, std::int64_t x, std::int64_t step, std::int64_t width,
                         S outside, int n) {
    const bool inner = x >= 0 && x + (n - 1) * step < width;
    if (inner && step == 1) return load_n<V>(row + x, n);
    S lanes[V::size];
    if (inner && n == V::size) {
        for (int i = 0; i < V::size; ++i) lanes[i] = row[x + i * step];
    } else {
        for (int i = 0; i < V::size; ++i) {
            const std::int64_t at = x + i * step;
            lanes[i] = i < n && at >= 0 && at < width ? row[at] : outside;
        }
    }
    return load<V>(lanes);
}

template <class S>
constexpr S lowest_value() {
    return -static_cast<S>(__builtin_inf());
}
template <>
constexpr BFloat16 lowest_value<BFloat16>() {
    return {0xff80};
}

template <class D, class B, class T>
void pool_plane(const DeltaMaxPoolParams& p, const B* base, const D* delta, double scale,
                std::int64_t y, T* most, T* change) {
    const std::int64_t top = y * p.stride_h - p.padding_h;
    const Span rows = inside(top, p.kernel_h, p.dilation_h, p.height);
    for_each_vector<T>(p.out_w, [&](auto vector, std::int64_t x, int n) PYABLATE_LAMBDA_INLINE {
        using V = decltype(vector);
        const std::int64_t left = x * p.stride_w - p.padding_w;
        V window_most, window_change;
        pool_window(
            [&](auto f) PYABLATE_LAMBDA_INLINE {
                for (std::int64_t i = rows.first; i < rows.last; ++i) {
                    const std::int64_t row = (top + i * p.dilation_h) * p.width;
                    for (std::int64_t j = 0; j < p.kernel_w; ++j) {
                        const std::int64_t at = left + j * p.dilation_w;
                        f(gather<V>(base + row, at, p.stride_w, p.width, lowest_value<B>(), n),
                          gather<V>(delta + row, at, p.stride_w, p.width, D{}, n) * V(scale));
                    }
                }
            },
            window_most, window_change);
        store_n(most + x, window_most, n);
        store_n(change + x, window_change, n);
    });
}

// A part is what lies together in the output: a row of a pair (channels last) or a plane. Its
// changes go through `finish` to `out`; without a function they are the results already.
template <class D, class B>
void pool_part(const DeltaMaxPoolParams& p, std::int64_t size, ChangeRun finish, void* scratch,
               std::int64_t part, void* out) {
    using T = Compute<D>;
    T* most = static_cast<T*>(scratch);
    const bool done = finish == nullptr;
    T* change = done ? static_cast<T*>(out) : most + size;
    if (p.channels_last) {
        pool_channels_last<D, B>(p, part / p.out_h, part % p.out_h, most, change);
    } else {
        const std::int64_t plane = p.height * p.width;
        const std::int64_t pair = part / p.channels;
        const std::int64_t from = p.image[pair] * p.channels + part % p.channels;
        for (std::int64_t y = 0; y < p.out_h; ++y) {
            pool_plane(p, static_cast<const B*>(p.base) + from * plane,
                       static_cast<const D*>(p.delta) + part * plane,
                       p.scale == nullptr ? 1.0 : p.scale[pair], y, most + y * p.out_w,
                       change + y * p.out_w);
        }
    }
    if (!done) finish(most, change, nullptr, out, size, {p.activation});
}

// All parts of one pair, then their codes.
template <class D, class B>
void pool_pair(const DeltaMaxPoolParams& p, const cpu::PoolParts& parts, ChangeRun finish,
               float* scratch, std::int64_t pair) {
    float* whole = scratch + 2 * parts.size;
    for (std::int64_t i = 0; i < parts.per_pair; ++i) {
        pool_part<D, B>(p, parts.size, finish, scratch, pair * parts.per_pair + i,
                        whole + i * parts.size);
    }
    encode(whole, parts.per_pair * parts.size, pair, p.codes, p.out, p.dtype);
}

}  // namespace

// Items are parts or, with codes, pairs.
void delta_max_pool(const DeltaMaxPoolParams& p, const cpu::PoolParts& parts, void* scratch,
                    std::int64_t begin, std::int64_t end) {
    dispatch_change("delta_max_pool", p.dtype, p.base_dtype, [&](auto delta, auto base) {
        using D = typename decltype(delta)::type;
        using B = typename decltype(base)::type;
        using T = Compute<D>;
        const bool whole = p.codes.values != nullptr;
        const DType stored = whole ? DType::float32 : p.dtype;
        ChangeRun finish = nullptr;
        if (p.activation.kind != ActivationKind::identity || stored != dtype_of<T>) {
            finish = find_change_run(p.activation.kind, dtype_of<T>, dtype_of<T>, stored);
        }
        for (std::int64_t item = begin; item < end; ++item) {
            if (whole) {
                pool_pair<D, B>(p, parts, finish, static_cast<float*>(scratch), item);
            } else {
                pool_part<D, B>(p, parts.size, finish, scratch, item,
                                static_cast<D*>(p.out) + item * parts.size);
            }
        }
    });
}

}  // namespace pyablate::PYABLATE_ISA
