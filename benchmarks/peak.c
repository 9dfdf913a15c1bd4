/* The most multiplications a core can do: loops of products whose operands never leave the registers.
 *
 * Compiled by products.py while it runs, each function for one instruction alone. A function runs its loop
 * `loops` times; twelve independent sums hide the latency of an instruction. products.py knows how many
 * operations a loop has. The numbers are zeros, which take no less time than others.
 */
#include <stdint.h>

#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)

#if defined(__x86_64__)

#define LOOP(NAME, TARGET, CLEAR, BODY, ...)                                   \
  __attribute__((target(TARGET))) void NAME(int64_t loops) {                   \
    asm volatile(CLEAR ::: __VA_ARGS__);                                       \
    for (int64_t n = 0; n < loops; ++n) asm volatile(BODY ::: __VA_ARGS__);    \
  }
#define CLEAR_XYZ "vzeroall\n"
#define USED "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
             "xmm12", "xmm13", "xmm14"

#define DOT512(n) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #n "\n"
#define DOT256(n) "%{vex%} vpdpbusd %%ymm12, %%ymm13, %%ymm" #n "\n"
#define PAIRS256(n)                              \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n"       \
  "vpmaddwd %%ymm12, %%ymm14, %%ymm14\n"         \
  "vpaddd %%ymm14, %%ymm" #n ", %%ymm" #n "\n"
#define BF16(n) "vdpbf16ps %%zmm12, %%zmm13, %%zmm" #n "\n"
#define FMA512(n) "vfmadd231ps %%zmm12, %%zmm13, %%zmm" #n "\n"
#define FMA256(n) "vfmadd231ps %%ymm12, %%ymm13, %%ymm" #n "\n"

LOOP(int8_vnni512, "avx512f,avx512vnni", CLEAR_XYZ, TWELVE(DOT512), USED)
LOOP(int8_vnni256, "avx2,avxvnni", CLEAR_XYZ, TWELVE(DOT256), USED)
LOOP(int8_pairs256, "avx2", CLEAR_XYZ, TWELVE(PAIRS256), USED)
LOOP(bf16_dot512, "avx512f,avx512bf16", CLEAR_XYZ, TWELVE(BF16), USED)
LOOP(fp32_fma512, "avx512f", CLEAR_XYZ, TWELVE(FMA512), USED)
LOOP(fp32_fma256, "avx2,fma", CLEAR_XYZ, TWELVE(FMA256), USED)

#elif defined(__aarch64__)

#define LOOP(NAME, BODY)                                                                             \
  void NAME(int64_t loops) {                                                                         \
    for (int64_t n = 0; n < loops; ++n)                                                              \
      asm volatile(BODY ::: "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11"); \
  }
#define DOT(n) "sdot v" #n ".4s, v12.16b, v13.16b\n"
#define SQUARE(n) "smmla v" #n ".4s, v12.16b, v13.16b\n"
#define BF16(n) "bfmmla v" #n ".4s, v12.8h, v13.8h\n"
#define FMA(n) "fmla v" #n ".4s, v12.4s, v13.4s\n"

LOOP(int8_sdot, ".arch armv8.2-a+dotprod\n" TWELVE(DOT))
LOOP(int8_smmla, ".arch armv8.2-a+i8mm\n" TWELVE(SQUARE))
LOOP(bf16_bfmmla, ".arch armv8.2-a+bf16\n" TWELVE(BF16))
LOOP(fp32_fmla, TWELVE(FMA))

#endif
