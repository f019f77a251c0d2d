// Work on several threads: those of the process's OpenMP runtime, which PyTorch loads, or where
// there is none, or after a fork(), threads for the length of one call.
#pragma once

#include <cstdint>
#include <functional>

namespace pyablate::cpu {

// Calls work(begin, end, thread) over [0, items) in pieces of `piece`, from at most `threads`
// threads. Which thread takes which piece varies; no result may depend on it.
void parallel_for(std::int64_t items, std::int64_t piece, int threads,
                  const std::function<void(std::int64_t, std::int64_t, int)>& work);

// Piece size for items of `cost` elementary steps each: pieces long enough to pay for handing them
// out, and, where there is enough work, several for each thread so that none waits long at the end.
std::int64_t piece_size(std::int64_t items, std::int64_t cost, int threads);

}  // namespace pyablate::cpu
