// Exported C functions. Each is documented at its definition.
//
// Functions return a Status (status.h) unless documented otherwise. Type codes are those of enum Type (vector.h). Rows
// of matrices are contiguous unless an argument specifies their stride.
#pragma once
#include <cstdint>

// Increment if a function's arguments, its supported types, or a struct in block.h, blocks.h or decode.h changes. The
// loader compares it with its expected value.
const int DW_ABI = 14;

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
DW_EXPORT int64_t dw_struct_layout(int arithmetic, int64_t *into, int64_t capacity);
// Write the digest of the sources (variants.py), or "unknown", and the compiler's version, separated by a space. At most
// `capacity` bytes are written, including the terminating 0. Returns the number of bytes.
DW_EXPORT int64_t dw_build_info(char *into, int64_t capacity);

DW_EXPORT int dw_threads(void *parallel, void *thread_number, void *num_threads, void *max_threads);
// Return the number of threads that run the parts of a kernel at the same time. Takes up to a second per missing thread.
DW_EXPORT int64_t dw_count_threads();
// Write the names of features that an x86 processor and the system support, as in Linux's /proc/cpuinfo, separated by
// spaces. Empty on other processors. At most `capacity` bytes are written, including the terminating 0. Returns the
// number of bytes.
DW_EXPORT int64_t dw_processor_flags(char *into, int64_t capacity);
// Free the memory that the threads' arenas cache between calls.
DW_EXPORT int dw_release();
// Return the current size of all arenas in bytes. With `max`, return the maximum since the last call with `max`.
DW_EXPORT int64_t dw_scratch_bytes(int max);

// Return OK if this variant's instructions can be used. Must be called before any product. A variant with tiles
// requests them from the operating system and selects them as its arithmetic.
DW_EXPORT int dw_ready();
// Return a bit mask of the Arithmetic values (arithmetic.h) that are supported for a number type.
DW_EXPORT int64_t dw_arithmetics(int type);
// Set the arithmetic of products of a number type.
DW_EXPORT int dw_set_arithmetic(int type, int arithmetic);
// Set the size of a core's second-level cache in bytes, which determines the block sizes of products.
DW_EXPORT int dw_set_cache(int64_t bytes);

// Peak size of all threads' arenas in bytes during a call, for memory plans.
DW_EXPORT int64_t dw_linear_scratch_size(int type, int64_t M, int64_t out, int64_t in, int weight_type, int by_column, int scaled, int in_blocks,
                                 int64_t rank, int backward, int dx);
DW_EXPORT int64_t dw_factors_scratch_size(int type, int64_t M, int64_t rank);
DW_EXPORT int64_t dw_class_gradient_scratch_size(int64_t M, int64_t V, int64_t D);
DW_EXPORT int64_t dw_head_gradient_scratch_size(int64_t M, int64_t D);
DW_EXPORT int64_t dw_attention_scratch_size(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv);
DW_EXPORT int64_t dw_recurrence_scratch_size(int backward, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads,
                                             int64_t d, int64_t dv);
DW_EXPORT int64_t dw_attention_backward_scratch_size(int type, int64_t length, int64_t heads, int64_t key_heads, int64_t d, int64_t dv);

DW_EXPORT int dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column,
                        const float *scale, const float *smooth, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank,
                        float scaling, const void *addend, uint8_t *x_int8, float *x_scales, int in_blocks, int quantize, void *y,
                        void *h);
DW_EXPORT int dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, int weight_type, const void *weight,
                                 int by_column, const float *scale, const float *smooth, const float *A, const float *B, int64_t rank, float scaling,
                                 const void *addend, uint8_t *grad_int8, float *grad_scales, void *dx, void *narrow);
DW_EXPORT int dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                                  const void *narrow, float scaling, float *grad_A, float *grad_B);
DW_EXPORT int dw_class_gradient(int64_t M, int64_t V, int64_t D, void *grad, const int64_t *targets, const void *weight, const float *scales,
                                float *block_scales, void *dh);
DW_EXPORT int dw_head_gradient(int64_t M, int64_t V, int64_t D, void *logits, const int64_t *targets, const void *hidden, const void *weight,
                               const void *bias, float scale, float cap, int64_t group_rows, float *losses, void *slopes,
                               float *shares, void *unlikely);
DW_EXPORT int dw_dequantize(int type, int weight_type, const BlockData *weight, int64_t height, int64_t columns, int64_t first,
                            const int64_t *indices,
                            int64_t M, void *out);
DW_EXPORT int dw_quantize(int type, int64_t M, int64_t K, const void *x, const float *smooth, int in_blocks, uint8_t *out, float *scales);
DW_EXPORT int dw_quantize_nf4(int type, int64_t rows, int64_t row_blocks, const void *x, const float *bounds, uint8_t *codes, float *maxima);

DW_EXPORT int dw_norm(int type, int64_t M, int64_t D, const void *x, int64_t ld, const void *weight, const void *bias, float offset, float eps,
                      int centered, void *y, float *stats);
// dx may be dy.
DW_EXPORT int dw_norm_backward(int type, int64_t M, int64_t D, const void *dy, const void *x, int64_t ld, const void *weight, float offset,
                               int centered, const float *stats, const void *addend, void *dx);
DW_EXPORT int dw_add(int type, int64_t count, const void *a, const void *b, void *out);
DW_EXPORT int dw_dropout(int type, int64_t count, const void *x, int64_t seed, float dropped, float scale, void *out);
DW_EXPORT int dw_activation(int type, int kind, int64_t M, int64_t D, const void *gate, const void *up, void *y);
DW_EXPORT int dw_activation_backward(int type, int kind, int64_t M, int64_t D, const void *dy, const void *gate, const void *up, void *d_gate,
                                     void *d_up, void *y);
DW_EXPORT int dw_rotate(int type, int64_t M, int64_t heads, int64_t d, int64_t rotary_dims, const void *x, int64_t ld, const float *cosine,
                        const float *sine, int backward, void *out, int64_t out_ld);
DW_EXPORT int dw_cross_entropy(int type, int64_t M, int64_t V, void *logits, const int64_t *targets, const float *weights, float scale,
                               float cap, int grad, float *losses);

DW_EXPORT int dw_attention(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal, int64_t heads,
                           int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *output_rows, int64_t output_count,
                           const void *q, const void *k, const void *v, void *out, const int64_t *strides, float *logs);
DW_EXPORT int dw_attention_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t window, int causal,
                                    int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *output_rows,
                                    int64_t output_count, const void *q, const void *k, const void *v, const void *out, const void *grad, void *dq,
                                    void *dk, void *dv_out, const int64_t *strides, const float *logs);

DW_EXPORT int dw_recurrence(int type, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads, int64_t d,
                            int64_t dv, float scaling, int unit_vectors, const void *query, const void *key, const void *value, const float *decay,
                            const float *rate, float *const *states, void *out);
DW_EXPORT int dw_recurrence_backward(int type, const int64_t *segments, int64_t count, int64_t length, int64_t heads, int64_t key_heads, int64_t d,
                                     int64_t dv, float scaling, int unit_vectors, const void *query, const void *key, const void *value,
                                     const float *decay, const float *rate, const void *grad, void *d_query, void *d_key, void *d_value,
                                     float *d_decay, float *d_rate);
DW_EXPORT int dw_convolution(int type, int64_t length, int64_t channels, int64_t width, int silu, const void *x, const float *weight,
                             const float *bias, const int64_t *before, void *y);
DW_EXPORT int dw_convolution_backward(int type, int64_t length, int64_t channels, int64_t width, int silu, const void *grad, const void *x,
                                      const float *weight, const float *bias, const int64_t *before, void *d_x, float *d_weight, float *d_bias);

DW_EXPORT int dw_block_sizes(const BlockParts *block, int64_t T, int64_t output_count, int64_t *sizes);
DW_EXPORT int dw_block(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *output_rows,
                       int64_t output_count, const float *cosine, const float *sine, void *saved_memory, void *scratch_memory, void *out);
DW_EXPORT int dw_block_backward(const BlockParts *block, int64_t T, void *in, const int64_t *segments, int64_t count, const int64_t *output_rows,
                                int64_t output_count, const float *cosine, const float *sine, void *saved_memory, void *scratch_memory,
                                void *grad_memory, void *dx_memory, float *const *factors);

DW_EXPORT int dw_decode(const DecodeModel *model, const DecodeStep *step);
DW_EXPORT int dw_decode_attention(const DecodeModel *model, const DecodeStep *step, const float *query, const float *key, const float *value,
                                  float *out);
}
