// How a kernel reports a failure. Inside the library it is an exception. No exception leaves a team of threads or an
// exported function: a team carries it over to the thread that called, an exported function turns it into a Status.
#pragma once
#include <new>
#include <stdexcept>

namespace deltaw {

enum Status { OK = 0, OUT_OF_MEMORY = 1, OUT_OF_BOUNDS = 2, FAILED = 3 };

struct Failure {
    Status status;
};

// Of the exception that is being handled. The standard library throws length_error for sizes beyond the address space.
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

// The body of an exported function.
template <class Body>
inline int guarded(Body &&body) noexcept {
    try {
        body();
        return OK;
    } catch (...) {
        return current_status();
    }
}

// For kernels that call other exported functions.
inline void check(int status) {
    if (status != OK) throw Failure{(Status)status};
}

inline void require_in_bounds(bool holds) {
    if (!holds) throw Failure{OUT_OF_BOUNDS};
}

}  // namespace deltaw
