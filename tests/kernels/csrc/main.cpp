// The kernels' tests in C++: everything on one thread, then on teams of two and three, with each arithmetic that the
// variant has. Run under sanitizers (make sanitize) and under an emulator of another processor (make kernels-arm).
#include <omp.h>

#include "check.h"
#include "kernels.h"
#include "tests.h"

extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);

namespace {

// Sets arithmetic `which` for the types of numbers that have it; whether one has.
bool choose(int which) {
    bool found = false;
    for (int type = 0; type < 3; type++)
        if (dw_arithmetics(type) >> which & 1) {
            found = true;
            expect(dw_set_arithmetic(type, which) == 0, "an arithmetic of the variant");
        } else expect(dw_set_arithmetic(type, which) != 0, "an arithmetic that the variant lacks");
    return found;
}

}  // namespace

int main() {
    setvbuf(stdout, nullptr, _IOLBF, 0);  // what failed is seen even where a later test ends the program
    if (dw_ready() != 0) {
        printf("skipped: the system does not let the kernels' instructions be used\n");
        return 0;
    }
    test_vector(), test_tiles();
    for (int threads = 1; threads <= 3; threads++) {
        omp_set_num_threads(threads);
        if (threads > 1) dw_threads((void *)GOMP_parallel, (void *)omp_get_thread_num, (void *)omp_get_num_threads, (void *)omp_get_max_threads);
        dw_set_cache(threads == 2 ? 1 << 17 : 1 << 20);  // in the smaller one, rows go by in several parts
        for (int which = 0; which < 3; which++)
            if (choose(which)) test_products(), test_blocks(), test_attention(), test_block(), test_decode();
        for (int type = 0; type < 3; type++) expect(dw_set_arithmetic(type, 99) != 0, "no such arithmetic");
        test_rows(), test_interface();
        printf("%d thread%s: %d checks, %d failed\n", threads, threads > 1 ? "s" : "", checks, failures);
    }
    return failures > 0;
}
