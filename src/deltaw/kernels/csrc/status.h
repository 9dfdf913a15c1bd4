// Errors of kernels. Within the library they are exceptions. Exceptions never leave a thread or an exported function:
// threads pass them to the calling thread, and exported functions convert them to a Status.
#pragma once
#include <new>
#include <stdexcept>

namespace deltaw {

enum Status { OK = 0, OUT_OF_MEMORY = 1, OUT_OF_BOUNDS = 2, FAILED = 3 };

struct Failure {
    Status status;
};

// Convert the exception being handled. The standard library throws length_error for sizes beyond the address space.
inline Status current_status() noexcept {
    try {
        throw;
    } catch (const Failure &failure) {
        return failure.status;
    } catch (const std::bad_alloc &) {
        return OUT_OF_MEMORY;
    } catch (const std::length_error &) {
        return OUT_OF_MEMORY;
    } catch (...) {
        return FAILED;
    }
}

// Run the body of an exported function and convert exceptions to a Status.
template <class Body>
inline int guarded(Body &&body) noexcept {
    try {
        body();
        return OK;
    } catch (...) {
        return current_status();
    }
}

// Throw if an exported function called by a kernel failed.
inline void check(int status) {
    if (status != OK) throw Failure{(Status)status};
}

inline void require_in_bounds(bool is_in_bounds) {
    if (!is_in_bounds) throw Failure{OUT_OF_BOUNDS};
}

}  // namespace deltaw
