#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace pyablate::cpu {

namespace {

// Handing work to another thread takes some 20 us: about as long as this many elementary steps.
constexpr std::int64_t steps_worth_a_thread = 1 << 16;

// The team of the OpenMP runtime that PyTorch brought along (GNU's, or LLVM's under the same name).
// Its threads wait actively after each of PyTorch's operations: threads of our own would have to
// wait for them to give up the cores, some 200 us per call. A second runtime would be worse.
using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

const pid_t owner = getpid();

Parallel find_team() {
    static const Parallel found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == owner ? found : nullptr;  // a team does not survive fork()
}

using Task = std::function<void(int)>;  // called with the number of the thread

void run_in_team(Parallel team, int threads, const Task& task) {
    struct Shared {
        const Task& task;
        std::atomic<int> started{0};
    } shared{task};
    team(
        [](void* data) {
            auto& all = *static_cast<Shared*>(data);
            all.task(all.started.fetch_add(1));
        },
        &shared, static_cast<unsigned>(threads), 0);
}

void run_in_threads(int threads, const Task& task) {
    std::vector<std::thread> pool;
    pool.reserve(static_cast<std::size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) {
        try {
            pool.emplace_back(task, i);
        } catch (const std::system_error&) {
            break;  // no more threads to be had: the others do the work
        }
    }
    task(0);
    for (std::thread& thread : pool) thread.join();
}

}  // namespace

void parallel_for(std::int64_t items, std::int64_t piece, int threads,
                  const std::function<void(std::int64_t, std::int64_t, int)>& work) {
    if (items <= 0) return;
    const std::int64_t pieces = (items + piece - 1) / piece;
    const int wanted = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), pieces));
    std::atomic<std::int64_t> next{0};
    const auto take = [&](int thread) {
        for (;;) {
            const std::int64_t begin = next.fetch_add(1) * piece;
            if (begin >= items) return;
            work(begin, std::min(begin + piece, items), thread);
        }
    };
    if (wanted == 1) return take(0);
    if (const Parallel team = find_team()) {
        run_in_team(team, wanted, take);
    } else {
        run_in_threads(wanted, take);
    }
}

std::int64_t piece_size(std::int64_t items, std::int64_t cost, int threads) {
    const std::int64_t least = steps_worth_a_thread / std::max<std::int64_t>(cost, 1) + 1;
    const std::int64_t even = items / (static_cast<std::int64_t>(std::max(threads, 1)) * 8) + 1;
    return std::max(least, even);
}

}  // namespace pyablate::cpu
