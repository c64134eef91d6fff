// Gradients of the operators of bindings.cpp: each backward pass is one operator, called from C++.
//
// This uses the ordinary TORCH_LIBRARY interface: torch's stable ABI has no autograd functions.
#include <ATen/core/Tensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// Looks an operator up by name. Calls go through the dispatcher, so that tracing and compilation see all of them.
template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::tuple<Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                         const std::optional<Tensor>& dsum, bool hf_rounding) {
  static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                         const std::optional<Tensor>&, bool)>("neox::rms_norm_backward");
  return op.call(dy, x, weight, rstd, dsum, hf_rounding);
}

struct RmsNorm : Function<RmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double eps,
                               bool hf_rounding) {
    static const auto op =
        find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, double, bool)>("neox::rms_norm");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, rstd] = op.call(x, weight, eps, hf_rounding);
    context->save_for_backward({x, weight, rstd});
    context->saved_data["hf_rounding"] = hf_rounding;
    context->mark_non_differentiable({rstd});
    return {y, rstd};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    auto [dx, dweight] = norm_backward(gradients[0], saved[0], saved[1], saved[2], std::nullopt,
                                       context->saved_data["hf_rounding"].toBool());
    return {dx, dweight, Tensor(), Tensor()};
  }
};

struct AddRmsNorm : Function<AddRmsNorm> {
  static variable_list forward(AutogradContext* context, const Tensor& x, const Tensor& residual, const Tensor& weight,
                               double eps, bool hf_rounding) {
    static const auto op = find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, double,
                                                                   bool)>("neox::add_rms_norm");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [sum, y, rstd] = op.call(x, residual, weight, eps, hf_rounding);
    context->save_for_backward({sum, weight, rstd});
    context->saved_data["hf_rounding"] = hf_rounding;
    context->mark_non_differentiable({rstd});
    context->set_materialize_grads(false);
    return {sum, y, rstd};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const Tensor &dsum = gradients[0], &dy = gradients[1];
    if (!dy.defined()) return {dsum, dsum, Tensor(), Tensor(), Tensor()};  // y was not used
    const variable_list saved = context->get_saved_variables();
    auto [dx, dweight] =
        norm_backward(dy, saved[0], saved[1], saved[2], dsum.defined() ? std::optional<Tensor>(dsum) : std::nullopt,
                      context->saved_data["hf_rounding"].toBool());
    return {dx, dx, dweight, Tensor(), Tensor()};
  }
};

struct Rotary : Function<Rotary> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& cos,
                               const Tensor& sin, const std::optional<Tensor>& positions, bool conjugate) {
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({cos, sin, positions.value_or(Tensor())});
    context->saved_data["conjugate"] = conjugate;
    return turn(q, k, cos, sin, positions, conjugate);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const variable_list saved = context->get_saved_variables();
    const std::optional<Tensor> positions = saved[2].defined() ? std::optional<Tensor>(saved[2]) : std::nullopt;
    variable_list result = turn(gradients[0], gradients[1], saved[0], saved[1], positions,
                                !context->saved_data["conjugate"].toBool());
    result.resize(6);
    return result;
  }

  static variable_list turn(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                            const std::optional<Tensor>& positions, bool conjugate) {
    static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                           const std::optional<Tensor>&, bool)>("neox::rotary");
    auto [q_out, k_out] = op.call(q, k, cos, sin, positions, conjugate);
    return {q_out, k_out};
  }
};

struct SwiGlu : Function<SwiGlu> {
  static Tensor forward(AutogradContext* context, const Tensor& fused) {
    static const auto op = find<Tensor(const Tensor&)>("neox::swiglu");
    at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({fused});
    return op.call(fused);
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    static const auto op = find<Tensor(const Tensor&, const Tensor&)>("neox::swiglu_backward");
    return {op.call(gradients[0], context->get_saved_variables()[0])};
  }
};

struct CrossEntropy : Function<CrossEntropy> {
  static variable_list forward(AutogradContext* context, const Tensor& logits, const Tensor& stats, const Tensor& labels,
                               int64_t vocab_start, int64_t width, int64_t ignore_index, bool overwrite_logits) {
    static const auto op = find<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t,
                                                           int64_t, bool)>("neox::cross_entropy");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [loss, lse] = op.call(logits, stats, labels, vocab_start, width, ignore_index, overwrite_logits);
    context->save_for_backward({logits, labels, lse});
    context->saved_data["numbers"] = std::vector<int64_t>{vocab_start, width, ignore_index};
    context->saved_data["overwrite"] = overwrite_logits;
    context->mark_non_differentiable({lse});
    return {loss, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    using Gradient = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t);
    using Overwrite = void(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t);
    static const auto gradient = find<Gradient>("neox::cross_entropy_gradient");
    static const auto overwrite = find<Overwrite>("neox::cross_entropy_gradient_");
    const variable_list saved = context->get_saved_variables();
    const std::vector<int64_t> numbers = context->saved_data["numbers"].toIntVector();
    variable_list result(7);
    if (context->saved_data["overwrite"].toBool()) {
      // Autograd checks the version of saved tensors: another node that saved these logits, or a second backward
      // through this one, fails with torch's own message instead of reading gradients as logits.
      result[0] = saved[0].detach();
      overwrite.call(result[0], saved[1], saved[2], gradients[0], numbers[0], numbers[1], numbers[2]);
      torch::autograd::impl::bump_version(saved[0]);
    } else {
      result[0] = gradient.call(saved[0], saved[1], saved[2], gradients[0], numbers[0], numbers[1], numbers[2]);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, bool hf_rounding) {
  const variable_list results = RmsNorm::apply(x, weight, eps, hf_rounding);
  return {results[0], results[1]};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps,
                                                bool hf_rounding) {
  const variable_list results = AddRmsNorm::apply(x, residual, weight, eps, hf_rounding);
  return {results[0], results[1], results[2]};
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin,
                                  const std::optional<Tensor>& positions, bool conjugate) {
  const variable_list results = Rotary::apply(q, k, cos, sin, positions, conjugate);
  return {results[0], results[1]};
}

Tensor swiglu(const Tensor& fused) { return SwiGlu::apply(fused); }

std::tuple<Tensor, Tensor> cross_entropy(const Tensor& logits, const Tensor& stats, const Tensor& labels,
                                         int64_t vocab_start, int64_t width, int64_t ignore_index,
                                         bool overwrite_logits) {
  const variable_list results =
      CrossEntropy::apply(logits, stats, labels, vocab_start, width, ignore_index, overwrite_logits);
  return {results[0], results[1]};
}

#if defined(NEOX_HOST_EMULATOR)
#define NEOX_AUTOGRAD_KEY AutogradCPU
#else
#define NEOX_AUTOGRAD_KEY AutogradCUDA
#endif

TORCH_LIBRARY_IMPL(neox, NEOX_AUTOGRAD_KEY, library) {
  library.impl("rms_norm", rms_norm);
  library.impl("add_rms_norm", add_rms_norm);
  library.impl("rotary", rotary);
  library.impl("swiglu", swiglu);
  library.impl("cross_entropy", cross_entropy);
}

}  // namespace
