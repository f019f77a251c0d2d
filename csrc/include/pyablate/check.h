// Errors: a message made of its parts, thrown as the exception that Python sees as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace pyablate {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::invalid_argument(message.str());
}

template <class... Parts>
void check(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

}  // namespace pyablate
