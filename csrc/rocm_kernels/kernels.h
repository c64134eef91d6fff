/* The C interface of the kernels, free of torch and C++.
 *
 * Pointers are device pointers (host pointers for the emulator build). Strides count elements; the innermost dimension
 * is dense. `type` is one of NEOX_BF16, NEOX_FP16, NEOX_FP32: the element type of every void pointer. Functions with a
 * `stream` queue their kernels on it and return 0, or 1 with the reason in neox_last_error(). */
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { NEOX_BF16 = 0, NEOX_FP16 = 1, NEOX_FP32 = 2 };

const char* neox_last_error(void);
int neox_wave_size(void);            /* lanes per wave that the library was built for */
int neox_compute_units(void);        /* of the current device: compute units (AMD), multiprocessors (NVIDIA) */
const char* neox_architectures(void); /* "gfx90a+gfx942", "sm_90", or "host emulator" */

/* y = x rstd weight with rstd = rsqrt(mean(x^2) + eps), rows of `width`; y, rstd and sum are dense. With `residual`,
 * x + residual is rounded to the element type, written to `sum`, and normalized; otherwise both are null. */
int neox_rms_norm_forward(void* stream, int type, void* y, float* rstd, void* sum, const void* x, const void* residual,
                          const void* weight, int64_t rows, int64_t width, int64_t x_stride, int64_t residual_stride,
                          float eps, int hf_rounding);

/* dx = rstd (w dy - x c) [+ dsum], c = rstd^2 mean(x w dy). dweight [width] is summed in fp32 over `partial`
 * [partial_rows, width] in a fixed order and rounded once. neox_rms_norm_partial_rows() returns how many rows keep the
 * current device busy, from the shape and the device's compute units. Two launches. */
int64_t neox_rms_norm_partial_rows(int type, int64_t rows, int64_t width);
int neox_rms_norm_backward(void* stream, int type, void* dx, void* dweight, float* partial, const void* dy,
                           const void* x, const void* weight, const float* rstd, const void* dsum, int64_t rows,
                           int64_t width, int64_t partial_rows, int64_t dy_stride, int64_t x_stride,
                           int64_t dsum_stride, int hf_rounding);

/* Half-split rotation of q [s, b, q_heads, d] and k [s, b, k_heads, d], with strides {s, b, head}, into dense q_out and
 * k_out. cos and sin are fp32 [max_pos, d / 2]. positions are int64 [b, s] with strides {b, s}, or null for 0..s-1.
 * `conjugate` rotates back. */
int neox_rotary(void* stream, int type, void* q_out, void* k_out, const void* q, const void* k, const float* cos,
                const float* sin, const int64_t* positions, int64_t s, int64_t b, int64_t q_heads, int64_t k_heads,
                int64_t d, const int64_t q_strides[3], const int64_t k_strides[3], const int64_t position_strides[2],
                int conjugate);

/* out = up silu(gate), fused = [up | gate], each `width` wide. */
int neox_swiglu_forward(void* stream, int type, void* out, const void* fused, int64_t rows, int64_t width,
                        int64_t fused_stride);
int neox_swiglu_backward(void* stream, int type, void* dfused, const void* dout, const void* fused, int64_t rows,
                         int64_t width, int64_t dout_stride, int64_t fused_stride);

/* labels [rows] index the whole vocabulary, whose column `vocab_start` is the first of these logits; a label outside
 * [vocab_start, vocab_start + width) belongs to another rank.
 *
 * stats [3, rows]: maximum, sum of exp(logit - maximum), target logit (-inf on other ranks), over `width` columns. */
int neox_cross_entropy_stats(void* stream, int type, float* stats, const void* logits, const int64_t* labels,
                             int64_t vocab_start, int64_t rows, int64_t width, int64_t stride);

/* loss and log-sum-exp [rows] from the statistics [ranks, 3, rows] of all ranks; loss is 0 at ignore_index. */
int neox_cross_entropy_combine(void* stream, float* loss, float* lse, const float* stats, const int64_t* labels,
                               int64_t ignore_index, int64_t ranks, int64_t rows);

/* gradient = dloss (softmax - onehot), 0 at ignore_index and in columns width..columns; may be `logits` itself. */
int neox_cross_entropy_gradient(void* stream, int type, void* gradient, const void* logits, const int64_t* labels,
                                int64_t vocab_start, int64_t ignore_index, const float* lse, const float* dloss,
                                int64_t rows, int64_t width, int64_t columns, int64_t stride, int64_t gradient_stride);

#ifdef NEOX_HOST_EMULATOR
/* Memory that launches may access; wave size and compute units from now on; number of launches so far. */
void neox_emulator_allow(const void* begin, int64_t bytes, int writable);
void neox_emulator_forget(void);
int neox_emulator_set_wave(int wave);
int neox_emulator_set_compute_units(int units);
int64_t neox_emulator_launches(void);
#endif

#ifdef __cplusplus
}
#endif
