// Thread pool for systems on which torch uses LLVM's or Intel's OpenMP library, which cannot be called through
// functions passed from outside. DW_OWN_THREADS enables it on other systems.
#pragma once

#if (defined(_WIN32) || defined(__APPLE__)) && !defined(DW_OWN_THREADS)
#define DW_OWN_THREADS 1
#endif

namespace deltaw {

// Call part(data, i) for each i below count: part 0 on the calling thread, and part i on the i-th thread of a group.
//
// Successive calls from one thread use the same group unless calls from other threads intervene. There are as many
// groups as there have been concurrent callers. Their threads sleep between calls. A nested call runs all parts on its
// thread, and so does a call if the system cannot start threads. After a fork the child process starts without groups.
void run_on_pool(void (*part)(void *, int), void *data, int count);

}  // namespace deltaw
