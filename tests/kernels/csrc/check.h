// Helpers of the C++ kernel tests: buffers between guard pages, random numbers and comparisons.
#pragma once
#ifdef _WIN32
#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#undef near  // macros defined by windows.h
#undef far
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

typedef uint16_t bf16;
typedef std::vector<double> Numbers;

inline int failures = 0, checks = 0;

inline void expect(bool holds, const std::string &what) {
    checks++;
    if (holds) return;
    failures++;
    printf("FAILED %s\n", what.c_str());
}

// Checks the error in the norm, relative to the expected values or to values of size `least` if those are smaller.
inline void expect_close(const Numbers &found, const Numbers &expected, double tolerance, const std::string &what, double least = 1e-15) {
    double off = 0, norm = 0;
    for (size_t i = 0; i < expected.size(); i++) off += std::pow(found[i] - expected[i], 2), norm += std::pow(expected[i], 2);
    const double error = std::sqrt(off / std::max(norm, least * least * (double)std::max<size_t>(1, expected.size())));
    expect(found.size() == expected.size() && error <= tolerance, what + ": off by " + std::to_string(error));
}

inline uint64_t seed = 1;
inline double random_number() {  // approximately normal
    double sum = 0;
    for (int i = 0; i < 4; i++) {
        seed = seed * 6364136223846793005ull + 1442695040888963407ull;
        sum += (double)(seed >> 11) / (double)(1ull << 53) - 0.5;
    }
    return sum * 1.7;
}

template <class T> T from_double(double x) { return (T)x; }
template <> inline bf16 from_double<bf16>(double x) {
    const float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T> double to_double(T x) { return (double)x; }
template <> inline double to_double<bf16>(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
template <class T> int type_of();
template <> inline int type_of<float>() { return 0; }
template <> inline int type_of<bf16>() { return 1; }

// Page-aligned memory with guard pages.
#ifdef _WIN32
inline int64_t page_size() { return 4096; }
inline char *take_pages(int64_t bytes) {
    char *const at = (char *)VirtualAlloc(nullptr, bytes, MEM_COMMIT | MEM_RESERVE, PAGE_READWRITE);
    if (!at) abort();
    return at;
}
inline void give_pages_back(char *at, int64_t) { VirtualFree(at, 0, MEM_RELEASE); }
inline void forbid_page(char *at) {
    DWORD before;
    VirtualProtect(at, page_size(), PAGE_NOACCESS, &before);
}
#else
inline int64_t page_size() { return sysconf(_SC_PAGESIZE); }
inline char *take_pages(int64_t bytes) {
    void *const at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) abort();
    return (char *)at;
}
inline void give_pages_back(char *at, int64_t bytes) { munmap(at, bytes); }
inline void forbid_page(char *at) { mprotect(at, page_size(), PROT_NONE); }
#endif

// `count` values that end directly before a guard page, with another guard page in front. Guard pages also detect
// out-of-bounds accesses of masked vector instructions, which sanitizers do not check.
template <class T>
class Buffer {
  public:
    const int64_t count;

    explicit Buffer(int64_t count) : count(count), pages((count * (int64_t)sizeof(T) + page() - 1) / page() + 2) {
        whole = take_pages(pages * page());
        forbid_page(whole);
        forbid_page(whole + (pages - 1) * page());
        memset(whole + page(), 0xff, (pages - 2) * page());  // NaN in every floating-point type
    }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;
    ~Buffer() { give_pages_back(whole, pages * page()); }

    T *data() const { return (T *)(whole + (pages - 1) * page()) - count; }
    T &operator[](int64_t i) const { return data()[i]; }
    double at(int64_t i) const { return to_double(data()[i]); }

    Buffer &fill(double scale = 1.0, double offset = 0.0) {
        for (int64_t i = 0; i < count; i++) data()[i] = from_double<T>(random_number() * scale + offset);
        return *this;
    }
    Buffer &copy(const Buffer &other) {
        memcpy(data(), other.data(), count * sizeof(T));
        return *this;
    }
    Numbers numbers() const {
        Numbers found(count);
        for (int64_t i = 0; i < count; i++) found[i] = at(i);
        return found;
    }
    bool same(const Buffer &other) const { return count == other.count && !memcmp(data(), other.data(), count * sizeof(T)); }

  private:
    static int64_t page() { return page_size(); }
    const int64_t pages;
    char *whole;
};

// C (M, N) += scale · A (M, K) · B (K, N). B is stored as (N, K) if `across`.
inline void add_product(Numbers &c, const Numbers &a, const Numbers &b, int64_t M, int64_t N, int64_t K, double scale = 1, bool across = false) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t n = 0; n < N; n++) c[m * N + n] += scale * a[m * K + k] * (across ? b[n * K + k] : b[k * N + n]);
}

inline Numbers transposed(const Numbers &a, int64_t M, int64_t N) {
    Numbers t(a.size());
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) t[n * M + m] = a[m * N + n];
    return t;
}

inline double dot(const Numbers &a, const Numbers &b) {
    double sum = 0;
    for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
    return sum;
}

// Checks gradients against differences of outputs(inputs), along the gradients. grad: gradient of the outputs.
template <class F>
void expect_gradients(F &&outputs, const std::vector<Numbers> &inputs, const std::vector<Numbers> &gradients, const Numbers &grad, double tolerance,
                      const std::string &what) {
    for (size_t i = 0; i < inputs.size(); i++) {
        if (inputs[i].empty()) continue;
        const double square = dot(gradients[i], gradients[i]), step = 1e-4 / std::sqrt(square + 1e-30);
        double sums[2];
        for (int side = 0; side < 2; side++) {
            std::vector<Numbers> moved = inputs;
            for (size_t n = 0; n < moved[i].size(); n++) moved[i][n] += (side ? step : -step) * gradients[i][n];
            sums[side] = dot(outputs(moved), grad);
        }
        expect_close({square}, {(sums[1] - sums[0]) / (2 * step)}, tolerance, what + " gradient " + std::to_string(i));
    }
}
