// Memory that the threads of one call work in, not initialised; no two threads share a cache line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "pyablate/tensor_view.h"

namespace pyablate::cpu {

class Scratch {
  public:
    Scratch(std::int64_t elements_each, DType dtype, int threads)
        : each_((static_cast<std::size_t>(elements_each * item_size(dtype)) + line - 1) / line *
                line),
          memory_(static_cast<char*>(::operator new(
              each_* static_cast<std::size_t>(std::max(threads, 1)), std::align_val_t(line)))) {}

    void* of(int thread) const { return memory_.get() + each_ * static_cast<std::size_t>(thread); }

  private:
    static constexpr std::size_t line = 64;
    struct Free {
        void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(line)); }
    };
    std::size_t each_;
    std::unique_ptr<char, Free> memory_;
};

}  // namespace pyablate::cpu
