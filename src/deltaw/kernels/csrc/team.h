// Threads of the library's own, for systems on which torch's OpenMP library is LLVM's or Intel's: those are called by what
// their compiler makes of a program, not by functions that can be handed over. DW_OWN_THREADS asks for them elsewhere.
#pragma once

#if (defined(_WIN32) || defined(__APPLE__)) && !defined(DW_OWN_THREADS)
#define DW_OWN_THREADS 1
#endif

namespace deltaw {

// Calls part(data, i) once for each i below count: part 0 on the calling thread, part i on the i-th thread of a team, the
// same one in each call of a thread that nobody else's calls come between. Teams are kept, as many as threads have called
// at the same time; their threads sleep between calls. A thread that is a part of a call already does all parts itself,
// as does one for which the system starts no further threads. After a fork the child begins without teams.
void run_own_team(void (*part)(void *, int), void *data, int count);

}  // namespace deltaw
