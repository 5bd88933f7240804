// Every launcher of the extension: pointers, int64_t and double only (see ect_kernels/native.py), the stream last. n0: null for 0.
#pragma once
#include <cstdint>

extern "C" {
int group_norm_silu_fwd(const void* x, const float* gamma, const float* beta, const float* v, const float* scale,
    const float* shift, const int64_t* seed, const int64_t* n0, void* y, float* mean, float* rstd, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride, double eps, double inv_keep, void* stream);
int group_norm_silu_bwd(const void* dy, const void* x, const float* gamma, const float* beta, const float* v,
    const float* scale, const float* shift, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* dx, float* dv, float* dscale, float* dshift, float* partials, int64_t n, int64_t hw, int64_t c, int64_t groups,
    int64_t dtype, int64_t act, int64_t threshold, int64_t layer, int64_t v_stride, int64_t stride, double inv_keep, void* stream);
int residual_group_norm_silu_fwd(const void* a, const float* bias, const void* skip, const float* skip_bias,
    const void* other, const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, void* x, void* y, float* mean, float* rstd,
    int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype, int64_t groups, int64_t dtype_of_a, int64_t act,
    int64_t threshold, int64_t layer, double skip_scale, double eps, double inv_keep, void* stream);
int residual_group_norm_silu_bwd(const void* dy, const void* dx, const void* djoined, const void* x, const void* other,
    const float* gamma, const float* beta, const int64_t* seed, const int64_t* n0, const float* mean, const float* rstd, void* da, void* dother,
    float* partials, int64_t n, int64_t hw, int64_t c, int64_t c2, int64_t dtype,
    int64_t groups, int64_t dtype_of_a, int64_t act, int64_t threshold, int64_t layer, double skip_scale, double inv_keep, void* stream);
int perturb_fwd(const uint8_t* images, const float* t, const float* r, const int64_t* seed, const uint8_t* flip,
    const float* eps, const int64_t* n0, void* in_t, void* in_r, float* x_t, float* x_r, int64_t n, int64_t h, int64_t w, int64_t c, int64_t dtype,
    double sigma_data, void* stream);
int levels_fwd(const int64_t* seed, const int64_t* stage, const int64_t* n0, float* t, float* r, float* label_t, float* label_r, uint8_t* flip,
    int64_t n, double mean, double std, double q, double k, double b, void* stream);
int consistency_loss_fwd(const void* F_t, const void* F_r, const float* x_t, const float* x_r, const float* t, const float* r,
    const float* weight, float* loss, void* dF, int64_t n, int64_t m, int64_t dtype, double c, double sigma_data, void* stream);
int probe(void);   // cudaSuccess where the kernels can be loaded on the current device
int radam_ema_fwd(void* params, void* grads, void* exp_avg, void* exp_avg_sq, void* ema0, void* ema1, void* ema2, void* ema3,
    void* shadow, int64_t half, void* state_f64, void* state_i64, void* partials, int64_t blocks, void* coefficients,
    int64_t n, void* stream);
}

// One name a launcher; bindings.cpp and the tests walk this list.
#define LAUNCHERS(X) \
  X(group_norm_silu_fwd) X(group_norm_silu_bwd) X(residual_group_norm_silu_fwd) X(residual_group_norm_silu_bwd) \
  X(perturb_fwd) X(levels_fwd) X(consistency_loss_fwd) X(radam_ema_fwd)
