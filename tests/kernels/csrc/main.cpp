// C++ kernel tests with one, two and three threads and each arithmetic of the variant. They run under sanitizers
// (make sanitize) and in an emulator of another CPU (make kernels-arm). Arguments select tests by name: products,
// threads, blocks, attention, block, decode, rows, recurrence, convolution.
#include <algorithm>
#include <string>
#include <vector>

#include "check.h"
#include "kernels.h"
#include "thread_pool.h"
#include "tests.h"

#ifdef DW_OWN_THREADS
static int threads_now = 1;
int threads_in_use() { return threads_now; }
void use_threads(int count) { threads_now = count; }
static int hand_over_threads() { return dw_threads(nullptr, nullptr, nullptr, (void *)threads_in_use); }
#else
#include <omp.h>
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned);
int threads_in_use() { return omp_get_max_threads(); }
void use_threads(int count) { omp_set_num_threads(count); }
static int hand_over_threads() {
    return dw_threads((void *)GOMP_parallel, (void *)omp_get_thread_num, (void *)omp_get_num_threads, (void *)omp_get_max_threads);
}
#endif

namespace {

// Selects arithmetic `which` for the types that support it. Returns true if a type does.
bool choose(int which) {
    bool found = false;
    for (int type = 0; type < 3; type++)
        if (dw_arithmetics(type) >> which & 1) {
            found = true;
            expect(dw_set_arithmetic(type, which) == 0, "an arithmetic of the variant");
        } else expect(dw_set_arithmetic(type, which) != 0, "an arithmetic that the variant lacks");
    return found;
}

struct Suite {
    const char *name;
    void (*run)();
};
// Tests that run with each arithmetic.
const Suite SUITES[] = {
    {"products", test_products}, {"threads", test_threads}, {"blocks", test_blocks}, {"attention", test_attention},
    {"block", test_block},       {"decode", test_decode}};
// Tests that do not depend on the arithmetic.
const Suite OTHERS[] = {{"rows", test_rows}, {"recurrence", test_recurrence}, {"convolution", test_convolution}};

template <size_t COUNT>
bool is_one_of(const std::string &name, const Suite (&suites)[COUNT]) {
    return std::any_of(suites, suites + COUNT, [&](const Suite &suite) { return name == suite.name; });
}

}  // namespace

int main(int count, char **arguments) {
    const std::vector<std::string> names(arguments + 1, arguments + count);
    for (const std::string &name : names)
        if (!is_one_of(name, SUITES) && !is_one_of(name, OTHERS)) {
            printf("there are no tests of '%s'\n", name.c_str());
            return 2;
        }
    auto wanted = [&](const char *name) { return names.empty() || std::find(names.begin(), names.end(), name) != names.end(); };
    setvbuf(stdout, nullptr, _IOLBF, 0);  // print failures even if a later test crashes
    if (dw_ready() != 0) {
        printf("skipped: the system does not let the kernels' instructions be used\n");
        return 0;
    }
    if (names.empty()) test_vector(), test_tiles();
    if (wanted("threads")) test_own_team();
    for (int threads = 1; threads <= 3; threads++) {
        use_threads(threads);
        if (threads > 1) expect(hand_over_threads() == 0, "threads to work on");
        dw_set_cache(threads == 2 ? 1 << 17 : 1 << 20);  // with the smaller cache, rows are processed in several parts
        for (int which = 0; which < 3; which++)
            if (choose(which))
                for (const Suite &suite : SUITES)
                    if (wanted(suite.name)) suite.run();
        for (int type = 0; type < 3; type++) expect(dw_set_arithmetic(type, 99) != 0, "no such arithmetic");
        for (const Suite &suite : OTHERS)
            if (wanted(suite.name)) suite.run();
        if (names.empty()) test_interface();
        printf("%d thread%s: %d checks, %d failed\n", threads, threads > 1 ? "s" : "", checks, failures);
    }
    return failures > 0;
}
