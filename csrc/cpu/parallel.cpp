#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace pyablate::cpu {

namespace {
// Starting a thread takes some 20 us: about as long as this many elementary steps.
constexpr std::int64_t steps_worth_a_thread = 1 << 16;
}  // namespace

void parallel_for(std::int64_t items, std::int64_t piece, int threads,
                  const std::function<void(std::int64_t, std::int64_t, int)>& work) {
    if (items <= 0) return;
    const std::int64_t pieces = (items + piece - 1) / piece;
    const int helpers = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), pieces)) - 1;
    std::atomic<std::int64_t> next{0};
    const auto take = [&](int thread) {
        for (;;) {
            const std::int64_t begin = next.fetch_add(1) * piece;
            if (begin >= items) return;
            work(begin, std::min(begin + piece, items), thread);
        }
    };
    std::vector<std::thread> pool;
    pool.reserve(static_cast<std::size_t>(helpers));
    for (int i = 0; i < helpers; ++i) {
        try {
            pool.emplace_back(take, i + 1);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the others do the work
        }
    }
    take(0);
    for (std::thread& thread : pool) thread.join();
}

std::int64_t piece_size(std::int64_t items, std::int64_t cost, int threads) {
    const std::int64_t least = steps_worth_a_thread / std::max<std::int64_t>(cost, 1) + 1;
    const std::int64_t even = items / (static_cast<std::int64_t>(std::max(threads, 1)) * 8) + 1;
    return std::max(least, even);
}

}  // namespace pyablate::cpu
