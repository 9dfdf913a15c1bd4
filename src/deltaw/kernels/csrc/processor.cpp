// What an x86 processor says of itself, where no file of the system does: asked by instructions, since what the compilers
// offer says nothing on some systems. No more is named than the variants need (variants.txt).
#include <cstring>
#include <string>

#include "kernels.h"

#ifdef __x86_64__
#include <cpuid.h>

namespace {

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers ask(unsigned leaf, unsigned part) {
    Registers r;
    __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
    return r;
}

// States of registers that the system saves for each thread, a bit each: without them the instructions must not be used.
uint64_t saved_states(bool says_so) {
    if (!says_so) return 0;
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

std::string words() {
    const Registers first = ask(1, 0), more = ask(7, 0), further = ask(7, 1);
    const uint64_t saved = saved_states(first.c >> 27 & 1);
    auto saves = [&](uint64_t states) { return (saved & states) == states; };
    const bool avx = saves(0x6) && (first.c >> 28 & 1), avx512 = avx && saves(0xe6), tiles = saves(0x60000);
    const struct {
        const char *word;
        bool has;
    } all[] = {{"avx2", avx && (more.b >> 5 & 1)},           {"fma", avx && (first.c >> 12 & 1)},
               {"f16c", avx && (first.c >> 29 & 1)},         {"avx_vnni", avx && (further.a >> 4 & 1)},
               {"avx512f", avx512 && (more.b >> 16 & 1)},    {"avx512dq", avx512 && (more.b >> 17 & 1)},
               {"avx512bw", avx512 && (more.b >> 30 & 1)},   {"avx512vl", avx512 && (more.b >> 31 & 1)},
               {"avx512_vnni", avx512 && (more.c >> 11 & 1)}, {"avx512_bf16", avx512 && (further.a >> 5 & 1)},
               {"amx_bf16", tiles && (more.d >> 22 & 1)},    {"amx_tile", tiles && (more.d >> 24 & 1)},
               {"amx_int8", tiles && (more.d >> 25 & 1)}};
    std::string found;
    for (const auto &one : all)
        if (one.has) found += (found.empty() ? "" : " ") + std::string(one.word);
    return found;
}

}  // namespace
#else
static std::string words() { return ""; }
#endif

int64_t dw_processor_words(char *into, int64_t capacity) {
    try {
        const std::string found = words();
        const int64_t bytes = (int64_t)found.size() + 1;
        if (capacity > 0) memcpy(into, found.c_str(), (size_t)(bytes < capacity ? bytes : capacity));
        return bytes;
    } catch (...) {
        return 0;
    }
}
