// Loads a library of the kernels for Windows as Python does, and calls what it exports: the names, the structure of the
// calls, and the threads, which a library has otherwise than a program.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

static int threads(void) { return 3; }

static HMODULE library;
static void *function(const char *name) {
    void *const found = (void *)GetProcAddress(library, name);
    if (!found) printf("FAILED: it does not export %s\n", name), exit(1);
    return found;
}
static int failures = 0, checks = 0;
static void expect(int holds, const char *what) {
    checks++;
    if (!holds) failures++, printf("FAILED: %s\n", what);
}

enum { M = 900, K = 64, N = 48 };
static float x[M * K], w[N * K], y[M * N], again[M * N];

// y (M, N) = x · wᵀ, in fp32.
static int multiply(float *into) {
    typedef int (*Linear)(int, int64_t, int64_t, int64_t, const void *, int, const void *, int, const float *, const float *, const void *, int,
                          const float *, const float *, int64_t, float, const void *, uint8_t *, float *, int, int, void *, void *);
    return ((Linear)function("dw_linear"))(0, M, N, K, x, 0, w, 1, 0, 0, 0, 0, 0, 0, 0, 0.0f, 0, 0, 0, 0, 0, into, 0);
}

int main(int count, char **arguments) {
    library = count > 1 ? LoadLibraryA(arguments[1]) : 0;
    if (!library) return printf("FAILED: it cannot be loaded (error %lu)\n", GetLastError()), 1;
    char words[512] = "";
    ((int64_t(*)(char *, int64_t))function("dw_processor_flags"))(words, sizeof(words));
    expect(((int (*)(void))function("dw_abi"))() > 0, "the ABI's number");
    expect(((int (*)(void))function("dw_ready"))() == 0, "it is ready");
    expect(((int (*)(void *, void *, void *, void *))function("dw_threads"))(0, 0, 0, 0) == 0, "no threads");
    for (int i = 0; i < M * K; i++) x[i] = (float)(i % 7 - 3);
    for (int i = 0; i < N * K; i++) w[i] = (float)(i % 5 - 2);
    expect(multiply(y) == 0, "a product on one thread");
    int right = 1;
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float sum = 0;
            for (int k = 0; k < K; k++) sum += x[m * K + k] * w[n * K + k];
            right = right && sum == y[m * N + n];
        }
    expect(right, "the product of whole numbers");
    expect(((int (*)(void *, void *, void *, void *))function("dw_threads"))(0, 0, 0, (void *)threads) == 0, "three threads");
    for (int time = 0; time < 100; time++) expect(multiply(again) == 0 && !memcmp(y, again, sizeof(y)), "the same on three threads");
    expect(!GetProcAddress(library, "_Znwy") && !GetProcAddress(library, "malloc"), "nothing but the C interface");
    printf("library: %d checks, %d failed; the processor has %s\n", checks, failures, words);
    return failures > 0;
}
