// torch operators on top of the C interface of kernels.h. Plain C++: compiled by the host compiler on every platform.
//
// The schemas are next to the references in megatron/ops/*.py; this file implements them for one dispatch key,
// autograd.cpp has their gradients.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>

#include "kernels.h"

#if !defined(NEOX_HOST_EMULATOR)
// From torch's C shim (torch/csrc/inductor/aoti_torch/c/shim.h); the same name on CUDA and ROCm.
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using at::Tensor;

void check(int code) { TORCH_CHECK(code == 0, "neox kernels: ", neox_last_error()); }

int type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kBFloat16: return NEOX_BF16;
    case at::kHalf: return NEOX_FP16;
    case at::kFloat: return NEOX_FP32;
    default: TORCH_CHECK(false, "neox kernels: ", t.scalar_type(), " tensors have no kernel; give bf16, fp16 or fp32");
  }
}

// Scope of one launch: makes the tensors' device current and holds its current stream. in() and out() return data
// pointers, and register the tensors with the emulator, which rejects any other access.
class Launch {
 public:
  explicit Launch(const Tensor& t) : guard_(t.device()) {
#if !defined(NEOX_HOST_EMULATOR)
    TORCH_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream_) == 0, "neox kernels: no current stream");
#endif
  }
  ~Launch() {
#if defined(NEOX_HOST_EMULATOR)
    neox_emulator_forget();
#endif
  }
  void* stream() const { return stream_; }

  template <class T = void>
  const T* in(const Tensor& t) {
    return static_cast<const T*>(allow(t, false));
  }
  template <class T = void>
  T* out(const Tensor& t) {
    return static_cast<T*>(allow(t, true));
  }

 private:
  void* allow(const Tensor& t, [[maybe_unused]] bool writable) {
    void* data = t.numel() == 0 ? nullptr : const_cast<void*>(t.const_data_ptr());
#if defined(NEOX_HOST_EMULATOR)
    if (data != nullptr) {
      int64_t last = 0;
      for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
      neox_emulator_allow(data, (last + 1) * t.element_size(), writable);
    }
#endif
    return data;
  }

  c10::OptionalDeviceGuard guard_;
  void* stream_ = nullptr;
};

// `t` as a matrix with dense rows; a view where the strides allow it.
Tensor as_rows(const Tensor& t) {
  TORCH_CHECK(t.dim() > 0, "neox kernels: a scalar has no rows");
  const Tensor rows = t.reshape({-1, t.size(-1)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

int64_t row_stride(const Tensor& rows) { return rows.size(0) <= 1 ? rows.size(1) : rows.stride(0); }

Tensor dense_like(const Tensor& t) { return at::empty_like(t, at::MemoryFormat::Contiguous); }

Tensor new_floats(const Tensor& t, at::IntArrayRef sizes) { return at::empty(sizes, t.options().dtype(at::kFloat)); }

void check_same(const Tensor& a, const Tensor& b, const char* what) {
  TORCH_CHECK(a.scalar_type() == b.scalar_type() && a.device() == b.device(), "neox kernels: ", what, " is ",
              b.scalar_type(), " on ", b.device(), ", the input is ", a.scalar_type(), " on ", a.device());
}

std::tuple<Tensor, Tensor, Tensor> norm_forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps,
                                                bool hf_rounding) {
  check_same(x, weight, "the weight");
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1), "neox kernels: one weight per column is needed");
  const Tensor rows = as_rows(x), w = weight.contiguous();
  Tensor y = dense_like(x), rstd = new_floats(x, {rows.size(0)}), sum, added;
  if (residual != nullptr) {
    check_same(x, *residual, "the residual");
    TORCH_CHECK(residual->sizes() == x.sizes(), "neox kernels: x and residual differ in shape");
    added = as_rows(*residual);
    sum = dense_like(x);
  }
  if (x.numel() > 0) {
    Launch launch(x);
    check(neox_rms_norm_forward(launch.stream(), type_of(x), launch.out(y), launch.out<float>(rstd),
                                residual ? launch.out(sum) : nullptr, launch.in(rows),
                                residual ? launch.in(added) : nullptr, launch.in(w), rows.size(0), rows.size(1),
                                row_stride(rows), residual ? row_stride(added) : 0, static_cast<float>(eps),
                                hf_rounding));
  }
  return {sum, y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool hf_rounding) {
  auto [sum, y, rstd] = norm_forward(x, nullptr, weight, eps, hf_rounding);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                                bool hf_rounding) {
  return norm_forward(x, &residual, weight, eps, hf_rounding);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             const std::optional<Tensor>& dsum, bool hf_rounding) {
  check_same(x, dy, "the gradient");
  check_same(x, weight, "the weight");
  TORCH_CHECK(dy.sizes() == x.sizes() && (!dsum || dsum->sizes() == x.sizes()),
              "neox kernels: gradients and input differ in shape");
  const Tensor rows = as_rows(x), grads = as_rows(dy), w = weight.contiguous();
  Tensor dx = dense_like(x), dweight = dense_like(w), extra;
  if (x.numel() == 0) return {dx, dweight.zero_()};
  if (dsum) {
    check_same(x, *dsum, "the gradient of the sum");
    extra = as_rows(*dsum);
  }
  const int type = type_of(x);
  Launch launch(x);  // first: the number of partial rows depends on the current device
  Tensor partial = new_floats(x, {neox_rms_norm_partial_rows(type, rows.size(0), rows.size(1)), rows.size(1)});
  check(neox_rms_norm_backward(launch.stream(), type, launch.out(dx), launch.out(dweight), launch.out<float>(partial),
                               launch.in(grads), launch.in(rows), launch.in(w), launch.in<float>(rstd),
                               dsum ? launch.in(extra) : nullptr, rows.size(0), rows.size(1), partial.size(0),
                               row_stride(grads), row_stride(rows), dsum ? row_stride(extra) : 0, hf_rounding));
  return {dx, dweight};
}

Tensor dense_heads(const Tensor& t) { return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous(); }

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool conjugate) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "neox kernels: q and k are [s, b, heads, d]");
  TORCH_CHECK(cos.scalar_type() == at::kFloat && sin.scalar_type() == at::kFloat && cos.sizes() == sin.sizes() &&
                  2 * cos.size(1) == q.size(3),
              "neox kernels: cos and sin are fp32 tables of one shape, half a head wide");
  check_same(q, k, "k");
  Tensor q_out = dense_like(q), k_out = dense_like(k);
  if (q.numel() == 0) return {q_out, k_out};
  const Tensor from_q = dense_heads(q), from_k = dense_heads(k), c = cos.contiguous(), s = sin.contiguous();
  Tensor where;
  int64_t position_strides[2] = {0, 0};
  if (positions) {
    where = positions->to(at::kLong);
    position_strides[0] = where.stride(0);
    position_strides[1] = where.stride(1);
  }
  Launch launch(q);
  check(neox_rotary(launch.stream(), type_of(q), launch.out(q_out), launch.out(k_out), launch.in(from_q),
                    launch.in(from_k), launch.in<float>(c), launch.in<float>(s),
                    positions ? launch.in<int64_t>(where) : nullptr, q.size(0), q.size(1), q.size(2), k.size(2),
                    q.size(3), from_q.strides().data(), from_k.strides().data(), position_strides, conjugate));
  return {q_out, k_out};
}

Tensor swiglu(const Tensor& fused) {
  TORCH_CHECK(fused.dim() > 0 && fused.size(-1) % 2 == 0, "neox kernels: the last dimension holds up and gate");
  const Tensor rows = as_rows(fused);
  std::vector<int64_t> sizes = fused.sizes().vec();
  sizes.back() /= 2;
  Tensor out = at::empty(sizes, fused.options());
  if (out.numel() > 0) {
    Launch launch(fused);
    check(neox_swiglu_forward(launch.stream(), type_of(fused), launch.out(out), launch.in(rows), rows.size(0),
                              rows.size(1) / 2, row_stride(rows)));
  }
  return out;
}

Tensor swiglu_backward(const Tensor& dout, const Tensor& fused) {
  check_same(fused, dout, "the gradient");
  const Tensor rows = as_rows(fused), grads = as_rows(dout);
  TORCH_CHECK(grads.size(0) == rows.size(0) && 2 * grads.size(1) == rows.size(1),
              "neox kernels: the gradient is half as wide as the input");
  Tensor dfused = dense_like(fused);
  if (fused.numel() > 0) {
    Launch launch(fused);
    check(neox_swiglu_backward(launch.stream(), type_of(fused), launch.out(dfused), launch.in(grads), launch.in(rows),
                               rows.size(0), grads.size(1), row_stride(grads), row_stride(rows)));
  }
  return dfused;
}

void check_labels(const Tensor& logits, const Tensor& labels, int64_t width) {
  TORCH_CHECK(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0) &&
                  labels.scalar_type() == at::kLong && width >= 0 && width <= logits.size(1),
              "neox kernels: logits are [rows, columns], labels int64 [rows], 0 <= width <= columns");
}

Tensor cross_entropy_stats(const Tensor& logits, const Tensor& labels, int64_t vocab_start, int64_t width) {
  check_labels(logits, labels, width);
  const Tensor rows = as_rows(logits), where = labels.contiguous();
  Tensor stats = new_floats(logits, {3, rows.size(0)});
  if (rows.size(0) > 0) {
    Launch launch(logits);
    check(neox_cross_entropy_stats(launch.stream(), type_of(logits), launch.out<float>(stats), launch.in(rows),
                                   launch.in<int64_t>(where), vocab_start, rows.size(0), width, row_stride(rows)));
  }
  return stats;
}

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& stats, const Tensor& labels,
                                         int64_t vocab_start, int64_t width, int64_t ignore_index, bool overwrite_logits) {
  check_labels(logits, labels, width);
  TORCH_CHECK(stats.dim() == 3 && stats.size(1) == 3 && labels.size(0) == stats.size(2) &&
                  stats.scalar_type() == at::kFloat,
              "neox kernels: statistics are fp32 [ranks, 3, rows]");
  TORCH_CHECK(!overwrite_logits || logits.is_contiguous(), "neox kernels: logits must be dense to be overwritten");
  const Tensor all = stats.contiguous(), where = labels.contiguous();
  Tensor loss = new_floats(stats, {stats.size(2)}), lse = dense_like(loss);
  if (loss.numel() > 0) {
    Launch launch(stats);
    check(neox_cross_entropy_combine(launch.stream(), launch.out<float>(loss), launch.out<float>(lse),
                                     launch.in<float>(all), launch.in<int64_t>(where), ignore_index, stats.size(0),
                                     stats.size(2)));
  }
  return {loss, lse};
}

void gradient_into(const Tensor& gradient, const Tensor& logits, const Tensor& labels, const Tensor& lse,
                   const Tensor& dloss, int64_t vocab_start, int64_t width, int64_t ignore_index) {
  check_labels(logits, labels, width);
  TORCH_CHECK(lse.scalar_type() == at::kFloat && dloss.scalar_type() == at::kFloat &&
                  lse.numel() == logits.size(0) && dloss.numel() == logits.size(0),
              "neox kernels: lse and dloss are fp32 [rows]");
  if (logits.numel() == 0) return;
  const Tensor where = labels.contiguous(), total = lse.contiguous(), scale = dloss.contiguous();
  Launch launch(logits);
  void* const out = launch.out(gradient);
  check(neox_cross_entropy_gradient(launch.stream(), type_of(logits), out, launch.in(logits), launch.in<int64_t>(where),
                                    vocab_start, ignore_index, launch.in<float>(total), launch.in<float>(scale),
                                    logits.size(0), width, logits.size(1), row_stride(logits), row_stride(gradient)));
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& dloss,
                              int64_t vocab_start, int64_t width, int64_t ignore_index) {
  const Tensor rows = as_rows(logits);
  Tensor gradient = dense_like(logits);
  gradient_into(gradient, rows, labels, lse, dloss, vocab_start, width, ignore_index);
  return gradient;
}

void cross_entropy_gradient_(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& dloss,
                             int64_t vocab_start, int64_t width, int64_t ignore_index) {
  TORCH_CHECK(logits.stride(1) == 1, "neox kernels: rows must be dense to be overwritten");
  gradient_into(logits, logits, labels, lse, dloss, vocab_start, width, ignore_index);
}

#if defined(NEOX_HOST_EMULATOR)
#define NEOX_DISPATCH_KEY CPU
#else
#define NEOX_DISPATCH_KEY CUDA  // also the key of ROCm tensors
#endif

TORCH_LIBRARY_IMPL(neox, NEOX_DISPATCH_KEY, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("add_rms_norm", add_rms_norm);
  library.impl("rms_norm_backward", rms_norm_backward);
  library.impl("rotary", rotary);
  library.impl("swiglu", swiglu);
  library.impl("swiglu_backward", swiglu_backward);
  library.impl("cross_entropy_stats", cross_entropy_stats);
  library.impl("cross_entropy", cross_entropy);
  library.impl("cross_entropy_gradient", cross_entropy_gradient);
  library.impl("cross_entropy_gradient_", cross_entropy_gradient_);
}

}  // namespace
