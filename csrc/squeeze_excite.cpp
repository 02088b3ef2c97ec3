#include "squeeze_excite.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sum.h>

#include "layer_formula.h"

namespace convblocks {

struct SqueezeExcite {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static constexpr const char* name = "squeeze_excite";
  static constexpr const char* schema =
      "(Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate, bool add_maxpool) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor? w1, Tensor? b1, Tensor w2, Tensor? b2, str activation, str gate, "
      "bool add_maxpool) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";

  static void check(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const Tensor& w2,
                    const MaybeTensor& b2, std::string_view activation, std::string_view gate, bool add_maxpool) {
    check_feature_map(name, x);
    check_parameter(name, "w1", w1, x);
    check_parameter(name, "b1", b1, x);
    TORCH_CHECK_TYPE(w2.defined(), name, ": expected w2 to be a tensor, got None");
    check_parameter(name, "w2", w2, x);
    check_parameter(name, "b2", b2, x);
    check_same_dtype(name, "w1", w1, "w2", w2);
    check_same_dtype(name, "b1", b1, "w2", w2);
    check_same_dtype(name, "b2", b2, "w2", w2);
    const auto c = x.sym_size(1);
    auto r = c;
    if (w1.has_value()) {
      r = check_hidden_size(name, *w1, c);
    } else {
      TORCH_CHECK_VALUE(!b1.has_value(), name, ": expected b1 only with w1, got b1 of size ", size_of(*b1));
    }
    check_vector(name, "b1", b1, r);
    check_matrix(name, "w2", w2, c, r);
    check_vector(name, "b2", b2, c);
    check_one_of(name, "activation", activation, kActivationNames);
    check_one_of(name, "gate", gate, kGateNames);
    TORCH_CHECK_VALUE(!add_maxpool || x.sym_size(2) * x.sym_size(3) > 0, name,
                      ": expected at least one pixel to take the maximum of, got an input of size ", size_of(x));
  }

  struct Terms {
    Tensor max, pooled, hidden, active, logit, gate;  // max and hidden only where there are such
  };
  static Terms terms(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const Tensor& w2,
                     const MaybeTensor& b2, std::string_view activation, std::string_view gate, bool add_maxpool) {
    Terms s;
    s.pooled = x.mean({2, 3});
    if (add_maxpool) {
      s.max = x.amax({2, 3}, true);
      s.pooled = 0.5 * s.pooled + 0.5 * s.max.flatten(1);
    }
    s.active = s.pooled;
    if (w1.has_value()) {
      s.hidden = at::linear(s.pooled, layer_weight(*w1, x), layer_bias(b1, x));
      s.active = activate(s.hidden, activation_of(name, activation));
    }
    s.logit = at::linear(s.active, layer_weight(w2, x), layer_bias(b2, x));
    s.gate = apply_gate(s.logit, gate_of(name, gate));
    return s;
  }

  static Tensor formula(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const Tensor& w2,
                        const MaybeTensor& b2, std::string_view activation, std::string_view gate, bool add_maxpool) {
    return x * terms(x, w1, b1, w2, b2, activation, gate, add_maxpool).gate.unsqueeze(-1).unsqueeze(-1);
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1,
                                    const Tensor& w2, const MaybeTensor& b2, std::string_view activation,
                                    std::string_view gate, bool add_maxpool) {
    const Terms s = terms(x, w1, b1, w2, b2, activation, gate, add_maxpool);
    const Tensor none = at::empty({0}, x.options());

    const Tensor dlogit = apply_gate_backward((grad * x).sum({2, 3}), s.logit, s.gate, gate_of(name, gate));
    const Tensor dw2 = gradient_like(at::matmul(dlogit.t(), s.active), w2);
    const Tensor db2 = b2.has_value() ? gradient_like(dlogit.sum(0), *b2) : none;
    Tensor dpooled = at::matmul(dlogit, layer_weight(w2, x)), dw1 = none, db1 = none;
    if (w1.has_value()) {
      const Tensor dhidden = activate_backward(dpooled, s.hidden, activation_of(name, activation));
      dw1 = gradient_like(at::matmul(dhidden.t(), s.pooled), *w1);
      if (b1.has_value()) db1 = gradient_like(dhidden.sum(0), *b1);
      dpooled = at::matmul(dhidden, layer_weight(*w1, x));
    }
    Tensor dx = grad * plane(s.gate);
    Tensor share = plane(dpooled) / at::Scalar(x.sym_size(2) * x.sym_size(3));
    if (add_maxpool) {
      const Tensor is_max = at::eq(x, s.max).to(x.scalar_type());
      share = 0.5 * share + 0.5 * plane(dpooled) * is_max / is_max.sum({2, 3}, true);
    }
    return {dx + share, dw1, db1, dw2, db2};
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1,
                  const Tensor& w2, const MaybeTensor& b2, std::string_view activation, std::string_view gate,
                  bool add_maxpool) {
    const DenseLayers layers(dtype_of(w2), w1, b1, w2, b2, activation_of(name, activation), gate_of(name, gate),
                             add_maxpool);
    const auto format = walk_format(x);
    kernel(SqueezeExciteArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), layers.weights,
                             Walk(x, format).map, Walk(y, format).map});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const MaybeTensor& w1,
                           const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2, std::string_view activation,
                           std::string_view gate, bool add_maxpool) {
    const DenseLayers layers(dtype_of(w2), w1, b1, w2, b2, activation_of(name, activation), gate_of(name, gate),
                             add_maxpool);
    const auto format = walk_format(x);
    const auto out = [&](size_t i) { return grads[i].numel() ? grads[i].data_ptr() : nullptr; };
    kernel(SqueezeExciteBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), layers.weights,
                                     Walk(grad, format).map, Walk(x, format).map, Walk(grads[0], format).map, out(1),
                                     out(2), out(3), out(4)});
  }
};

CONVBLOCKS_REGISTER(SqueezeExcite)

}  // namespace convblocks
