// The kernels that others here are made of, as they are called from outside too; each is said where it is defined.
#pragma once
#include <cstdint>

extern "C" {
void dw_linear(int type, int64_t M, int64_t out, int64_t in, const void *x, int weight_type, const void *weight, int by_column,
               const float *scale, const float *columns, const void *bias, int bias_f32, const float *A, const float *B, int64_t rank, float scaling,
               const void *added, uint8_t *steps, float *steps_scale, int make_steps, void *y, void *h);
void dw_linear_backward(int type, int64_t M, int64_t out, int64_t in, const void *grad, const void *weight, int by_column,
                        const float *scale, const float *columns, const float *A, const float *B, int64_t rank, float scaling,
                        const void *added, uint8_t *steps, float *steps_scale, void *dx, void *narrow);
void dw_factors_backward(int type, int64_t M, int64_t in, int64_t out, int64_t rank, const void *x, const void *h, const void *grad,
                         const void *narrow, float scaling, float *of_A, float *of_B);
void dw_norm(int type, int64_t M, int64_t D, const void *x, int64_t ld, const void *weight, const void *bias, float offset,
             float eps, int centred, void *y, float *stats);
void dw_norm_backward(int type, int64_t M, int64_t D, const void *dy, const void *x, int64_t ld, const void *weight,
                      float offset, int centred, const float *stats, const void *added, void *dx);
void dw_activation(int type, int kind, int64_t M, int64_t D, const void *gate, const void *up, void *y);
void dw_activation_backward(int type, int kind, int64_t M, int64_t D, const void *dy, const void *gate, const void *up,
                            void *d_gate, void *d_up, void *y);
void dw_rotate(int type, int64_t M, int64_t heads, int64_t d, int64_t turned, const void *x, int64_t ld, const float *cosine,
               const float *sine, int backward, void *out, int64_t out_ld);
void dw_attention(int type, const int64_t *forest, int64_t segments, int64_t length, int64_t window, int causal, int64_t heads,
                  int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked, int64_t picks, void *q, void *k,
                  void *v, void *out, const int64_t *strides, float *logs);
void dw_attention_backward(int type, const int64_t *forest, int64_t segments, int64_t length, int64_t window, int causal,
                           int64_t heads, int64_t key_heads, int64_t d, int64_t dv, float scaling, float cap, const int64_t *picked,
                           int64_t picks, void *q, void *k, void *v, void *out, void *grad, void *dq, void *dk, void *dv_out, const int64_t *strides,
                           const float *logs);
}

const int64_t BYTES_AT_ONCE = 128;  // numbers of a gradient, or classes, that are rounded to bytes with one scale

// The gradients of a layer's factors; see dw_factors_backward.
struct FactorsBackward {
    int64_t M, in, out, rank;
    const void *x, *h, *grad, *narrow;
    float scaling;
    float *of_A, *of_B;
};
// Of several layers at once.
void factors_backward(int type, const FactorsBackward *of, int count);
