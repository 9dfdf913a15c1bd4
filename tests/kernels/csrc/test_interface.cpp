// Tests of interface checks, failing allocations and released memory.
#include <fstream>

#include "block.h"
#include "blocks.h"
#include "check.h"
#include "kernels.h"
#include "tests.h"

// CPU flags on x86: include those that this program was compiled for, and equal those reported by Linux.
static void test_processor_words() {
    char found[512] = "unchanged";
    expect(dw_processor_flags(found, 0) > 0 && found[0] == 'u', "room for no words");
    const int64_t bytes = dw_processor_flags(found, sizeof(found));
    expect(bytes == (int64_t)strlen(found) + 1, "how many bytes the words have");
    const std::string words = " " + std::string(found) + " ";
    auto has = [&](const std::string &word) { return words.find(" " + word + " ") != std::string::npos; };
#ifdef __AVX2__
    expect(has("avx2") && has("fma") && has("f16c"), "the words of AVX2");
#endif
#ifdef __AVXVNNI__
    expect(has("avx_vnni"), "the word of AVX-VNNI");
#endif
#ifdef __AVX512BW__
    expect(has("avx512f") && has("avx512bw") && has("avx512vl") && has("avx512dq"), "the words of AVX-512");
#endif
#ifdef __AVX512VNNI__
    expect(has("avx512_vnni"), "the word of AVX-512 VNNI");
#endif
#ifdef __AVX512BF16__
    expect(has("avx512_bf16"), "the word of AVX-512 BF16");
#endif
#if defined(__linux__) && defined(__x86_64__)
    std::ifstream file("/proc/cpuinfo");
    std::string line;
    while (std::getline(file, line) && line.compare(0, 5, "flags")) {}
    for (const char *word : {"avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16",
                             "amx_tile", "amx_bf16", "amx_int8"})
        expect(has(word) == ((line + " ").find(" " + std::string(word) + " ") != std::string::npos), std::string("as Linux says, ") + word);
#endif
}

void test_interface() {
    test_processor_words();
    expect(dw_abi() == DW_ABI, "the ABI's number");
    int64_t found[64] = {};
    expect(dw_struct_layout(0, found, 64) == 15 && found[0] == sizeof(Layer), "a layer's layout");
    expect(dw_struct_layout(1, found, 64) == 7 && found[0] == sizeof(RowNorm), "a norm's layout");
    expect(dw_struct_layout(2, found, 64) == 4 && found[0] == sizeof(HalfNorms), "the layout of a half's norms");
    expect(dw_struct_layout(3, found, 64) == 26 && found[0] == sizeof(BlockParts), "a block's layout");
    found[1] = 77;
    expect(dw_struct_layout(3, found, 1) == 26 && found[1] == 77, "no more than there is room for");
    expect(dw_struct_layout(4, found, 64) == 9, "the layout of a linear layer of a decoding step");
    expect(dw_struct_layout(9, found, 64) == 6 && found[0] == sizeof(BlockData), "the layout of a weight in blocks");
    expect(dw_struct_layout(10, found, 64) == 0, "no such struct");

    // Allocation failures are reported in the calling thread and in pool threads, before anything is read.
    const int64_t huge = (int64_t)1 << 40;
    int64_t target = 0;
    float number = 0;
    expect(dw_class_gradient(1, 4, huge, &number, &target, nullptr, nullptr, nullptr, nullptr) == 1, "no memory for a class gradient");
    expect(dw_factors_backward(0, 1, 1, 1, huge, &number, nullptr, &number, nullptr, 1.0f, nullptr, nullptr) == 1, "no memory for factors");

    // A call leaves its scratch memory allocated for the next call. After a release, it is allocated again on demand.
    auto attend = [] {
        const int64_t T = 64, table[4] = {0, T, -1, 0}, strides[8] = {8, 8, 8, 8, 8, 8, 8, 8};
        Buffer<float> q(T * 8), out(T * 8), logs(T);
        seed = 5;
        q.fill();
        expect(dw_attention(0, table, 1, T, 0, 1, 1, 1, 8, 8, 0.3f, 0.0f, nullptr, T, q.data(), q.data(), q.data(), out.data(), strides,
                            logs.data()) == 0,
               "attention after memory was given back");
        return out.numbers();
    };
    dw_release();
    attend();  // the first call measures the size, the second allocates it at once
    const Numbers before = attend();
    expect(dw_scratch_bytes(0) > 0, "scratch memory is kept");
    expect(dw_release() == 0 && dw_scratch_bytes(0) == 0, "scratch memory is given back");
    expect_close(attend(), before, 0, "the same numbers after memory was given back");
    expect(dw_scratch_bytes(1) >= dw_scratch_bytes(0), "the most that was held");
    dw_release();
}
