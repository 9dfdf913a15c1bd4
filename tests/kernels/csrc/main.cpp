// The kernels' tests in C++, to be run under sanitizers: everything on one thread, then on teams of two and three, with each
// way to multiply that there is.
#include <omp.h>

#include "check.h"
#include "kernels.h"
#include "tests.h"

extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

int main() {
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512vl")) {
        printf("skipped: this processor does not have the kernels' instructions\n");
        return 0;
    }
    if (dw_ready() != 0) {
        printf("skipped: the system does not let the kernels' instructions be used\n");
        return 0;
    }
    test_tiles();
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        if (threads > 1) dw_threads((void *)GOMP_parallel, (void *)omp_get_thread_num, (void *)omp_get_num_threads, (void *)omp_get_max_threads);
        for (int way = 0; way <= 2; way++) {
            if (dw_set_arithmetic(1, way) != 0) continue;
            dw_set_arithmetic(2, dw_set_arithmetic(2, way) == 0 ? way : 0);
            test_products(), test_attention();
        }
        test_block(), test_rows(), test_interface();
        printf("%d thread%s: %d checks, %d failed\n", threads, threads > 1 ? "s" : "", checks, failures);
    }
    return failures > 0;
}
