// The exported functions, as C sees them. Each says what it computes where it is defined.
//
// All return a Status (status.h) unless said otherwise. Types are numbered by Type (numbers.h). Matrices have their rows
// one after another in memory unless an argument gives the distance of rows.
#pragma once
#include <cstdint>

// To be raised whenever a function's arguments, the types that it takes or a struct of block.h, blocks.h or decode.h change; the caller compares it with its own.
const int DW_ABI = 9;

#ifdef _WIN32
#define DW_EXPORT __declspec(dllexport)
#else
#define DW_EXPORT __attribute__((visibility("default")))
#endif

struct BlockData;
struct BlockParts;
struct DecodeModel;
struct DecodeStep;

extern "C" {
// Returns DW_ABI.
DW_EXPORT int dw_abi();
DW_EXPORT int64_t dw_layout_of(int which, int64_t *into, int64_t capacity);

DW_EXPORT int dw_threads(void *parallel, void *thread_number, void *team_size, void *most_threads);
// Words that Linux has for what an x86 processor and the system offer, with a space between; "" on other processors. Of
// the bytes, with the 0 at the end, the first `capacity` are written. Returns how many there are.
DW_EXPORT int64_t dw_processor_words(char *into, int64_t capacity);
// Gives back the memory that the threads' arenas keep between calls.
DW_EXPORT int dw_release();
// Returns the bytes that all arenas hold now, or with `most` held at most since that was asked last.
DW_EXPORT int64_t dw_scratch_held(int most);

// Whether this variant's instructions may be used; to be called before anything that multiplies. One with tiles asks the
// system for them, and they become its arithmetic.
DW_EXPORT int dw_ready();
// Bit a of the result says whether numbers of a type can be multiplied by Arithmetic a (arithmetic.h).
DW_EXPORT int64_t dw_arithmetics(int type);
// Sets how numbers of a type are multiplied from now on.
DW_EXPORT int dw_set_arithmetic(int type, int which);
// Bytes of a core's second-level cache, which products are cut to.
DW_EXPORT int dw_set_cache(int64_t bytes);

// Bytes that all threads' arenas together hold at the peak of a kernel's call, for plans of memory.
DW_EXPORT int64_t dw_linear_room(int type, int64_t M, int64_t out, int64_t in, int weight_type, int by_column, int scaled, int in_blocks,
                                 int64_t rank, int backward, int dx);
DW_EXPORT int64_t dw_factors_room(int type, int64_t M, int64_t rank);
DW_EXPORT int64_t dw_class_gradient_room(int64_t M, int64_t V, int64_t D);
DW_EXPORT int64_t dw_head_gradient_room(int64_t M, int64_t D);
DW_EXPORT int64_t dw_attention_room(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv);
DW_EXPORT int64_t dw_attention_backward_room(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv);

DW_EXPORT int dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column,
                        const float *scale, const float *smooth, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank,
                        float scaling, const void *added, uint8_t *x_int8, float *x_scales, int in_blocks, int quantize, void *y,
                        void *h);
DW_EXPORT int dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, int weight_type, const void *weight,
                                 int by_column, const float *scale, const float *smooth, const float *A, const float *B, int64_t rank, float scaling,
                                 const void *added, uint8_t *grad_int8, float *grad_scales, void *dx, void *narrow);
DW_EXPORT int dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                                  const void *narrow, float scaling, float *of_A, float *of_B);
DW_EXPORT int dw_class_gradient(int64_t M, int64_t V, int64_t D, void *grad, const int64_t *targets, const void *weight, const float *scales,
                                float *block_scales, void *dh);
DW_EXPORT int dw_head_gradient(int64_t M, int64_t V, int64_t D, void *logits, const int64_t *targets, const void *hidden, const void *weight,
                               const void *bias, float scale, float cap, int64_t together, float *losses, void *slopes,
                               float *shares, void *unlikely);
DW_EXPORT int dw_dequantize(int type, int weight_type, const BlockData *weight, int64_t height, int64_t columns, int64_t first, const int64_t *places,
                            int64_t M, void *out);
DW_EXPORT int dw_quantize(int type, int64_t M, int64_t K, const void *x, const float *smooth, int in_blocks, uint8_t *out, float *scales);

DW_EXPORT int dw_norm(int type, int64_t M, int64_t D, const void *x, int64_t ld, const void *weight, const void *bias, float offset, float eps,
                      int centered, void *y, float *stats);
// dx may be dy.
DW_EXPORT int dw_norm_backward(int type, int64_t M, int64_t D, const void *dy, const void *x, int64_t ld, const void *weight, float offset,
                               int centered, const float *stats, const void *added, void *dx);
DW_EXPORT int dw_add(int type, int64_t count, const void *a, const void *b, void *out);
DW_EXPORT int dw_activation(int type, int kind, int64_t M, int64_t D, const void *gate, const void *up, void *y);
DW_EXPORT int dw_activation_backward(int type, int kind, int64_t M, int64_t D, const void *dy, const void *gate, const void *up, void *d_gate,
                                     void *d_up, void *y);
DW_EXPORT int dw_rotate(int type, int64_t M, int64_t heads, int64_t d, int64_t turned, const void *x, int64_t ld, const float *cosine,
                        const float *sine, int backward, void *out, int64_t out_ld);
DW_EXPORT int dw_cross_entropy(int type, int64_t M, int64_t V, void *logits, const int64_t *targets, const float *weights, float scale,
                               float cap, int grad, float *losses);

DW_EXPORT int dw_attention(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal, int64_t heads,
                           int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked, int64_t picks,
                           const void *q, const void *k, const void *v, void *out, const int64_t *strides, float *logs);
DW_EXPORT int dw_attention_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal,
                                    int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked,
                                    int64_t picks, const void *q, const void *k, const void *v, const void *out, const void *grad, void *dq,
                                    void *dk, void *dv_out, const int64_t *strides, const float *logs);

DW_EXPORT int dw_block_sizes(const BlockParts *block, int64_t T, int64_t picks, int64_t *sizes);
DW_EXPORT int dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *picked,
                       int64_t picks, const float *cosine, const float *sine, void *kept_memory, void *scratch_memory, void *out);
DW_EXPORT int dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *picked,
                                int64_t picks, const float *cosine, const float *sine, void *kept_memory, void *scratch_memory,
                                void *grad_memory, void *dx_memory, float *const *factors);

DW_EXPORT int dw_decode(const DecodeModel *model, const DecodeStep *step);
}
