#include "threads.h"

#include <dlfcn.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

bool cut_grids = true;

namespace {

constexpr std::size_t stack_bytes = 256 * 1024;  // instrumented frames are large

enum class State { ready, waiting, ended };

bool same_text(const char* a, const char* b) {
    return a == b || std::strcmp(a, b) == 0;
}

struct Meeting {
    const char* what = "";
    bool block = false;
    std::uint32_t mask = 0;
    Place place{"", 0};

    bool same(const Meeting& other) const {
        return block == other.block && mask == other.mask && place.line == other.place.line &&
               same_text(what, other.what) && same_text(place.file, other.place.file);
    }
};

// A fibre serves the thread of its number in one block after the other.
struct Thread {
    ucontext_t context{};
    std::unique_ptr<char[]> stack;
    void* fake_stack = nullptr;
    uint3 index;
    State state = State::ready;
    Meeting meeting;
    std::uint64_t bits = 0;
    Lanes lanes;
};

struct SharedVariable {
    std::string name;
    int line;
    std::unique_ptr<char[]> memory;
};

std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::size_t> ready;
std::size_t running = 0;
std::size_t at_barrier = 0;
const std::function<void()>* body = nullptr;
std::string failure;
ucontext_t scheduler;
const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_bytes = 0;
std::unique_ptr<char[]> dynamic_memory;
std::vector<SharedVariable> static_memory;
unsigned char pattern = 0xff;

std::mt19937& random_numbers() {
    static std::mt19937 generator([] {
        const char* seed = std::getenv("PYABLATE_SHIM_SEED");
        return seed != nullptr ? static_cast<unsigned>(std::strtoul(seed, nullptr, 10)) : 0u;
    }());
    return generator;
}

std::size_t draw(std::size_t below) {
    return random_numbers()() % below;
}

std::unique_ptr<char[]> shared_memory(std::size_t bytes) {
    std::unique_ptr<char[]> memory(new char[bytes]);
    std::memset(memory.get(), pattern, bytes);
    return memory;
}

// --- changing between threads -------------------------------------------------------------------

// The C library's own swapcontext: AddressSanitizer's would clear its marks on the stack that it
// goes to, at each change, which is slow and hides errors.
void change(ucontext_t& from, ucontext_t& to) {
    using Swap = int (*)(ucontext_t*, const ucontext_t*);
    static const auto swap =
        reinterpret_cast<Swap>(dlsym(dlopen("libc.so.6", RTLD_NOW | RTLD_NOLOAD), "swapcontext"));
    swap(&from, &to);
}

void resume(std::size_t number) {
    Thread& t = *threads[number];
    running = number;
    threadIdx = t.index;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, t.stack.get(), stack_bytes);
    change(scheduler, t.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void leave() {
    Thread& t = *threads[running];
    __sanitizer_start_switch_fiber(&t.fake_stack, scheduler_stack, scheduler_stack_bytes);
    change(t.context, scheduler);
    __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}

void enter() {
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
    for (;;) {
        (*body)();
        threads[running]->state = State::ended;
        leave();
    }
}

void make_threads(std::size_t count) {
    while (threads.size() < count) {
        auto t = std::make_unique<Thread>();
        t->stack.reset(new char[stack_bytes]);
        getcontext(&t->context);
        t->context.uc_stack.ss_sp = t->stack.get();
        t->context.uc_stack.ss_size = stack_bytes;
        t->context.uc_link = nullptr;
        makecontext(&t->context, enter, 0);
        threads.push_back(std::move(t));
    }
    threads.resize(count);
}

// --- meetings -----------------------------------------------------------------------------------

void let_go_on(std::size_t number) {
    threads[number]->state = State::ready;
    ready.push_back(number);
}

// Lets the lanes of a warp go on if all that the running thread waits for have come.
void try_warp(std::size_t first, const Meeting& meeting) {
    Lanes lanes;
    for (std::size_t i = 0; i < warpSize && first + i < threads.size(); ++i) {
        const Thread& t = *threads[first + i];
        if ((meeting.mask >> i & 1u) == 0 || t.state == State::ended) continue;
        if (t.state != State::waiting || !t.meeting.same(meeting)) return;
        lanes.present |= 1u << i;
        lanes.bits[i] = t.bits;
    }
    for (std::size_t i = 0; i < warpSize; ++i) {
        if ((lanes.present >> i & 1u) == 0) continue;
        threads[first + i]->lanes = lanes;
        let_go_on(first + i);
    }
}

void try_block() {
    if (at_barrier < threads.size()) return;
    const Meeting& first = threads[0]->meeting;
    for (const auto& t : threads) {
        if (!t->meeting.same(first)) return;
    }
    for (std::size_t i = 0; i < threads.size(); ++i) let_go_on(i);
    at_barrier = 0;
}

// A thread that ended is not waited for any longer by the lanes of its warp.
void try_warp_of_ended() {
    const std::size_t first = running / warpSize * warpSize;
    for (std::size_t i = first; i < first + warpSize && i < threads.size(); ++i) {
        const Thread& t = *threads[i];
        if (t.state == State::waiting && !t.meeting.block) try_warp(first, Meeting(t.meeting));
    }
}

std::string describe(std::size_t number) {
    const Thread& t = *threads[number];
    std::ostringstream text;
    text << "thread " << number;
    if (t.state == State::ended) {
        text << " has ended";
    } else {
        text << " waits in " << t.meeting.what << " (" << t.meeting.place.file << ":"
             << t.meeting.place.line << ")";
    }
    return text.str();
}

// Some wait and none can go on: one thread that waits, and one that is somewhere else.
std::string describe_divergence() {
    std::size_t waiting = 0;
    while (threads[waiting]->state == State::ended) ++waiting;
    const Thread& t = *threads[waiting];
    for (std::size_t i = 0; i < threads.size(); ++i) {
        const bool elsewhere =
            threads[i]->state == State::ended || !threads[i]->meeting.same(t.meeting);
        if (elsewhere) return "divergence: " + describe(waiting) + ", " + describe(i);
    }
    return "divergence: " + describe(waiting) + " in vain";
}

// --- blocks -------------------------------------------------------------------------------------

// Which thread goes on is drawn anew at each step, but those of one warp, itself drawn, are held
// back as long as others can go on: it is behind by as much as the barriers allow.
std::size_t next_thread(std::size_t slow_warp) {
    std::size_t chosen = draw(ready.size());
    for (int tries = 0; tries < 8 && ready[chosen] / warpSize == slow_warp; ++tries) {
        chosen = draw(ready.size());
    }
    std::swap(ready[chosen], ready.back());
    const std::size_t number = ready.back();
    ready.pop_back();
    return number;
}

void run_block() {
    ready.clear();
    at_barrier = 0;
    for (std::size_t i = 0; i < threads.size(); ++i) {
        const auto number = static_cast<unsigned>(i);
        threads[i]->index.x = number % blockDim.x;
        threads[i]->index.y = number / blockDim.x % blockDim.y;
        threads[i]->index.z = number / blockDim.x / blockDim.y;
        let_go_on(i);
    }
    const std::size_t slow_warp = draw(threads.size() / warpSize + 1);
    std::size_t ended = 0;
    while (!ready.empty() && failure.empty()) {
        const std::size_t number = next_thread(slow_warp);
        resume(number);
        if (threads[number]->state != State::ended) continue;
        ++ended;
        try_warp_of_ended();
    }
    if (failure.empty() && ended < threads.size()) failure = describe_divergence();
    if (failure.empty()) return;
    threads.clear();  // the fibres stopped somewhere inside
    throw std::runtime_error(std::exchange(failure, std::string()));
}

void start_block(std::size_t shared_bytes) {
    // as integers -1 and a large number, as floats NaN and a large number
    pattern = draw(2) == 0 ? 0xff : 0x7b;
    dynamic_memory = shared_memory(shared_bytes);
    static_memory.clear();
}

}  // namespace

void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes,
              const std::function<void()>& kernel) {
    constexpr unsigned limits[] = {1, 2, 7, 64};
    if (cut_grids) grid.x = std::min(grid.x, limits[draw(4)]);
    body = &kernel;
    blockDim = block;
    gridDim = grid;
    make_threads(static_cast<std::size_t>(block.x) * block.y * block.z);
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_numbers());
    for (const unsigned i : order) {
        blockIdx.x = i % grid.x;
        blockIdx.y = i / grid.x % grid.y;
        blockIdx.z = i / grid.x / grid.y;
        start_block(shared_bytes);
        run_block();
    }
    dynamic_memory.reset();
    static_memory.clear();
}

void* dynamic_shared_bytes() {
    return dynamic_memory.get();
}

void* static_shared_bytes(const char* name, int line, std::size_t bytes) {
    for (const SharedVariable& variable : static_memory) {
        if (variable.line == line && variable.name == name) return variable.memory.get();
    }
    static_memory.push_back({name, line, shared_memory(bytes)});
    return static_memory.back().memory.get();
}

int lane() {
    return static_cast<int>(running % warpSize);
}

void meet_block(const char* what, Place place) {
    Thread& t = *threads[running];
    t.meeting = {what, true, 0, place};
    t.state = State::waiting;
    ++at_barrier;
    try_block();
    leave();
}

const Lanes& meet_warp(const char* what, std::uint32_t mask, std::uint64_t bits, Place place) {
    if ((mask >> lane() & 1u) == 0) fail(what, "the mask lacks the calling lane", place);
    Thread& t = *threads[running];
    t.meeting = {what, false, mask, place};
    t.bits = bits;
    t.state = State::waiting;
    try_warp(running / warpSize * warpSize, t.meeting);
    leave();
    return t.lanes;
}

void fail(const char* what, const char* why, Place place) {
    std::ostringstream text;
    text << what << ": " << why << " (" << place.file << ":" << place.line << ", thread " << running
         << ")";
    failure = text.str();
    leave();
    std::abort();  // not reached: a failed launch is never resumed
}

}  // namespace shim
