// The kernels' tests in C++, to be run under sanitizers: everything on one thread, then on teams of two and three.
#include <omp.h>

#include "check.h"
#include "kernels.h"
#include "tests.h"

extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

int main() {
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        if (threads > 1) dw_threads((void *)GOMP_parallel, (void *)omp_get_thread_num, (void *)omp_get_num_threads, (void *)omp_get_max_threads);
        test_products(), test_rows(), test_attention(), test_block(), test_interface();
        printf("%d thread%s: %d checks, %d failed\n", threads, threads > 1 ? "s" : "", checks, failures);
    }
    return failures > 0;
}
