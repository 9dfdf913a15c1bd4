// Features of x86 processors on systems that do not list them in a file. They are read with CPUID, because compiler
// builtins do not work on all systems. Only features that variants need are reported (variants.txt).
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef __x86_64__
#include <cpuid.h>

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers read_cpuid(unsigned leaf, unsigned part) {
    Registers r;
    __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
    return r;
}

// Register states that the system saves for each thread, one bit each. Instructions that use other states must not be
// used.
uint64_t saved_states(bool has_xsave) {
    if (!has_xsave) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

std::string processor_flags() {
    const Registers first = read_cpuid(1, 0), leaf7 = read_cpuid(7, 0), leaf7_1 = read_cpuid(7, 1);
    const uint64_t saved = saved_states(first.c >> 27 & 1);
    auto saves_states = [&](uint64_t states) { return (saved & states) == states; };
    const bool avx = saves_states(0x6) && (first.c >> 28 & 1), avx512 = avx && saves_states(0xe6), tiles = saves_states(0x60000);
    const struct {
        const char *name;
        bool is_supported;
    } all[] = {{"avx2", avx && (leaf7.b >> 5 & 1)},           {"fma", avx && (first.c >> 12 & 1)},
               {"f16c", avx && (first.c >> 29 & 1)},         {"avx_vnni", avx && (leaf7_1.a >> 4 & 1)},
               {"avx512f", avx512 && (leaf7.b >> 16 & 1)},    {"avx512dq", avx512 && (leaf7.b >> 17 & 1)},
               {"avx512bw", avx512 && (leaf7.b >> 30 & 1)},   {"avx512vl", avx512 && (leaf7.b >> 31 & 1)},
               {"avx512_vnni", avx512 && (leaf7.c >> 11 & 1)}, {"avx512_bf16", avx512 && (leaf7_1.a >> 5 & 1)},
               {"amx_bf16", tiles && (leaf7.d >> 22 & 1)},    {"amx_tile", tiles && (leaf7.d >> 24 & 1)},
               {"amx_int8", tiles && (leaf7.d >> 25 & 1)}};
    std::string names;
    for (const auto &flag : all)
        if (flag.is_supported) names += (names.empty() ? "" : " ") + std::string(flag.name);
    return names;
}

}  // namespace
#else
static std::string processor_flags() { return ""; }
#endif

int64_t dw_processor_flags(char *into, int64_t capacity) {
    try {
        const std::string names = processor_flags();
        const int64_t bytes = (int64_t)names.size() + 1;
        if (capacity > 0) memcpy(into, names.c_str(), (size_t)(bytes < capacity ? bytes : capacity));
        return bytes;
    } catch (...) {
        return 0;
    }
}
