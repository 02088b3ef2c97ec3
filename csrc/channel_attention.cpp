#include "channel_attention.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sum.h>

#include "handing_on.h"
#include "layer_formula.h"

namespace convblocks {

struct ChannelAttention {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static constexpr const char* name = "channel_attention";
  static constexpr const char* schema =
      "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)";

  static void check(const Tensor& x, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
                    std::string_view activation, std::string_view gate) {
    check_feature_map(name, x);
    TORCH_CHECK_TYPE(w1.defined(), name, ": expected w1 to be a tensor, got None");
    TORCH_CHECK_TYPE(w2.defined(), name, ": expected w2 to be a tensor, got None");
    check_parameter(name, "w1", w1, x);
    check_parameter(name, "b1", b1, x);
    check_parameter(name, "w2", w2, x);
    check_parameter(name, "b2", b2, x);
    check_same_dtype(name, "b1", b1, "w1", w1);
    check_same_dtype(name, "w2", w2, "w1", w1);
    check_same_dtype(name, "b2", b2, "w1", w1);
    const auto c = x.sym_size(1), r = check_hidden_size(name, w1, c);
    check_vector(name, "b1", b1, r);
    check_matrix(name, "w2", w2, c, r);
    check_vector(name, "b2", b2, c);
    check_one_of(name, "activation", activation, kActivationNames);
    check_one_of(name, "gate", gate, kGateNames);
    TORCH_CHECK_VALUE(x.sym_size(2) * x.sym_size(3) > 0, name,
                      ": expected at least one pixel to take the maximum of, got an input of size ", size_of(x));
  }
  static std::vector<c10::SymInt> output_size(const Tensor& x, const Tensor&, const MaybeTensor&, const Tensor&,
                                              const MaybeTensor&, std::string_view, std::string_view) {
    return {x.sym_size(0), x.sym_size(1), 1, 1};
  }

  // Of one way to pool.
  struct Terms {
    Tensor pooled, hidden, active, logit;
    Terms(const Tensor& s, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
          Activation activation)
        : pooled(s), hidden(at::linear(s, layer_weight(w1, s), layer_bias(b1, s))),
          active(activate(hidden, activation)), logit(at::linear(active, layer_weight(w2, s), layer_bias(b2, s))) {}
  };

  static Tensor formula(const Tensor& x, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2,
                        const MaybeTensor& b2, std::string_view activation, std::string_view gate) {
    const Activation kind = activation_of(name, activation);
    const Terms mean(x.mean({2, 3}), w1, b1, w2, b2, kind), max(x.amax({2, 3}), w1, b1, w2, b2, kind);
    return apply_gate(mean.logit + max.logit, gate_of(name, gate)).to(x.scalar_type()).unsqueeze(-1).unsqueeze(-1);
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& w1, const MaybeTensor& b1,
                                    const Tensor& w2, const MaybeTensor& b2, std::string_view activation,
                                    std::string_view gate) {
    const Activation kind = activation_of(name, activation);
    const Terms mean(x.mean({2, 3}), w1, b1, w2, b2, kind), max(x.amax({2, 3}), w1, b1, w2, b2, kind);
    const Tensor none = at::empty({0}, x.options()), logit = mean.logit + max.logit;
    const Tensor dlogit =
        apply_gate_backward(grad.flatten(1), logit, apply_gate(logit, gate_of(name, gate)), gate_of(name, gate));
    const Tensor dactive = at::matmul(dlogit, layer_weight(w2, x));
    const Tensor by_mean = activate_backward(dactive, mean.hidden, kind),
                 by_max = activate_backward(dactive, max.hidden, kind);
    const Tensor is_max = at::eq(x, plane(max.pooled)).to(x.scalar_type());
    const Tensor dx = plane(at::matmul(by_mean, layer_weight(w1, x))) / at::Scalar(x.sym_size(2) * x.sym_size(3)) +
                      plane(at::matmul(by_max, layer_weight(w1, x))) * is_max / is_max.sum({2, 3}, true);
    return {dx, gradient_like(at::matmul(by_mean.t(), mean.pooled) + at::matmul(by_max.t(), max.pooled), w1),
            b1.has_value() ? gradient_like((by_mean + by_max).sum(0), *b1) : none,
            gradient_like(at::matmul(dlogit.t(), mean.active + max.active), w2),
            b2.has_value() ? gradient_like(2 * dlogit.sum(0), *b2) : none};
  }

  static int64_t memory_size(const Tensor& x, const Tensor& w1, const MaybeTensor&, const Tensor&, const MaybeTensor&,
                             std::string_view, std::string_view) {
    return memory_size(x, w1);
  }
  static int64_t memory_size(const Tensor& x, const Tensor& w1) {
    const bool fits = w1.dim() >= 2 && w1.size(1) == x.size(1);  // looked at before the inputs are checked
    return fits ? x.size(0) * (4 * x.size(1) + 3 * w1.size(0)) : 0;
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& w1, const MaybeTensor& b1,
                  const Tensor& w2, const MaybeTensor& b2, std::string_view activation, std::string_view gate) {
    const DenseLayers layers(dtype_of(w2), w1, b1, w2, b2, activation_of(name, activation), gate_of(name, gate));
    kernel(ChannelAttentionArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), layers.weights,
                                Walk(x, walk_format(x)).map, y.data_ptr(), Memory::keep(x, memory_size(x, w1))});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const Tensor& w1,
                           const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2, std::string_view activation,
                           std::string_view gate) {
    const DenseLayers layers(dtype_of(w2), w1, b1, w2, b2, activation_of(name, activation), gate_of(name, gate));
    const auto format = walk_format(x);
    const auto out = [&](size_t i) { return grads[i].numel() ? grads[i].data_ptr() : nullptr; };
    const Tensor gradient = grad.contiguous();
    kernel(ChannelAttentionBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), layers.weights,
                                        gradient.const_data_ptr(), Walk(x, format).map, Walk(grads[0], format).map,
                                        Memory::kept(x, memory_size(x, w1)), out(1), out(2), out(3), out(4)});
  }
};

CONVBLOCKS_REGISTER(ChannelAttention)
CONVBLOCKS_REGISTER_HANDING_ON(ChannelAttention)

}  // namespace convblocks
