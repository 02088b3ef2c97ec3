#include "eca.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/conv1d.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sum.h>

#include "gate_formula.h"
#include "op.h"

namespace convblocks {

struct Eca {
  using MaybeTensor = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;

  static constexpr const char* name = "eca";
  static constexpr const char* schema = "(Tensor x, Tensor weight, Tensor? bias, str gate, str padding) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, str gate, str padding) -> (Tensor, Tensor, Tensor)";
  static constexpr std::array<std::string_view, 2> kPaddings{"zeros", "circular"};

  static c10::SymInt taps(const Tensor& weight) { return weight.sym_size(-1); }

  static void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string_view gate,
                    std::string_view padding) {
    check_feature_map(name, x);
    check_parameter(name, "weight", weight, x);
    check_parameter(name, "bias", bias, x);
    check_same_dtype(name, "bias", bias, "weight", weight);
    TORCH_CHECK_VALUE(
        (weight.dim() == 1 || weight.dim() == 3) && weight.sym_numel() == taps(weight) && taps(weight) % 2 == 1, name,
        ": expected weight of size [1, 1, k] or [k] with an odd k, got ", size_of(weight));
    TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == 1), name,
                      ": expected bias of size [1], got ", size_of(*bias));
    check_one_of(name, "gate", gate, kGateNames);
    const bool circular = check_one_of(name, "padding", padding, kPaddings) == 1;
    TORCH_CHECK_VALUE(!circular || taps(weight) / 2 <= x.sym_size(1), name, ": expected at least ", taps(weight) / 2,
                      " channels for circular padding of a ", taps(weight), "-tap weight, got ", x.sym_size(1));
  }

  static Gate gate_of(std::string_view text) { return static_cast<Gate>(check_one_of(name, "gate", text, kGateNames)); }

  struct Terms {
    Tensor padded, logit, gate;  // (N, 1, C + k - 1); (N, C); (N, C)
  };
  static Terms terms(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string_view gate,
                     std::string_view padding) {
    Terms s;
    Tensor pooled = x.mean({2, 3}).unsqueeze(1);
    const auto c = x.sym_size(1), pad = taps(weight) / 2;
    const bool circular = padding == "circular";
    if (pad > 0) {
      Tensor left, right;
      if (circular) {
        left = pooled.narrow_symint(2, c - pad, pad);
        right = pooled.narrow_symint(2, 0, pad);
      } else {
        left = right = pooled.new_zeros_symint({x.sym_size(0), c10::SymInt(1), pad});
      }
      pooled = at::cat({left, pooled, right}, 2);
    }
    s.padded = pooled;
    const auto b = bias.has_value() ? MaybeTensor(bias->to(x.scalar_type())) : bias;
    s.logit = at::conv1d(s.padded, filter(weight, x), b).squeeze(1);
    s.gate = apply_gate(s.logit, gate_of(gate));
    return s;
  }
  static Tensor filter(const Tensor& weight, const Tensor& x) {
    return weight.reshape_symint({1, 1, taps(weight)}).to(x.scalar_type());
  }

  static Tensor formula(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, std::string_view gate,
                        std::string_view padding) {
    return x * terms(x, weight, bias, gate, padding).gate.unsqueeze(-1).unsqueeze(-1);
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                    std::string_view gate, std::string_view padding) {
    const Terms s = terms(x, weight, bias, gate, padding);
    const auto c = x.sym_size(1), k = taps(weight), pad = k / 2;
    const Tensor dlogit = apply_gate_backward((grad * x).sum({2, 3}), s.logit, s.gate, gate_of(gate));
    // Tap j of the filter meets channel i at padded place i + j, in the filter's gradient as in that of the squeeze.
    const Tensor windows = s.padded.squeeze(1).unfold(1, k.guard_int(__FILE__, __LINE__), 1);
    const Tensor dweight = (dlogit.unsqueeze(-1) * windows).sum(c10::IntArrayRef{0, 1});
    const Tensor dbias =
        bias.has_value() ? dlogit.sum().reshape({1}).to(bias->scalar_type()) : at::empty({0}, x.options());
    const Tensor zeros = dlogit.new_zeros_symint({x.sym_size(0), c10::SymInt(1), k - 1});
    const Tensor wide = at::cat({zeros, dlogit.unsqueeze(1), zeros}, 2);
    const Tensor dpadded = at::conv1d(wide, filter(weight, x).flip(2)).squeeze(1);
    Tensor dpooled = dpadded.narrow_symint(1, pad, c);
    if (padding == "circular" && pad > 0) {
      // The padding's gradients go back to the channels at the other end.
      const Tensor gap = dlogit.new_zeros_symint({x.sym_size(0), c - pad});
      dpooled = dpooled + at::cat({gap, dpadded.narrow_symint(1, 0, pad)}, 1) +
                at::cat({dpadded.narrow_symint(1, pad + c, pad), gap}, 1);
    }
    const auto plane = [](const Tensor& t) { return t.unsqueeze(-1).unsqueeze(-1); };
    const Tensor dx = grad * plane(s.gate) + plane(dpooled) / at::Scalar(x.sym_size(2) * x.sym_size(3));
    return {dx, dweight.reshape_symint(weight.sym_sizes()).to(weight.scalar_type()), dbias};
  }

  static EcaWeights weights(const Tensor& weight, const MaybeTensor& bias, std::string_view gate,
                            std::string_view padding) {
    return {dtype_of(weight), weight.numel(), weight.const_data_ptr(),
            data_of(bias),    gate_of(gate),  padding == "circular"};
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                  std::string_view gate, std::string_view padding) {
    const auto format = walk_format(x);
    const Tensor w = weight.contiguous();
    kernel(EcaArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), weights(w, bias, gate, padding),
                   Walk(x, format).map, Walk(y, format).map});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const Tensor& weight,
                           const MaybeTensor& bias, std::string_view gate, std::string_view padding) {
    const auto format = walk_format(x);
    const Tensor w = weight.contiguous();
    kernel(EcaBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), weights(w, bias, gate, padding),
                           Walk(grad, format).map, Walk(x, format).map, Walk(grads[0], format).map, grads[1].data_ptr(),
                           bias.has_value() ? grads[2].data_ptr() : nullptr});
  }
};

CONVBLOCKS_REGISTER(Eca)

}  // namespace convblocks
