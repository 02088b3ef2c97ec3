#include "global_context.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/sum.h>

#include <array>
#include <utility>

#include "layer_formula.h"
#include "memory.h"

namespace convblocks {

// The parameters in the order of the schema; those of the transform t begin at kFirst + t * kSize.
enum { kAttnWeight, kAttnBias, kFirst };
enum { kW1, kB1, kNormWeight, kNormBias, kW2, kB2 };
inline constexpr int kSize = kB2 + 1;
inline constexpr int kParameters = kFirst + 2 * kSize;
inline constexpr std::array<const char*, kParameters> kParameterNames{
    "attn_weight", "attn_bias", "scale_w1", "scale_b1",        "scale_norm_weight", "scale_norm_bias", "scale_w2",
    "scale_b2",    "add_w1",    "add_b1",   "add_norm_weight", "add_norm_bias",     "add_w2",          "add_b2"};

using Parameters = std::array<MaybeTensor, kParameters>;

// How many tensors there are is said once, by an index for each.
template <class Indices>
struct GlobalContextOf;

template <size_t... I>
struct GlobalContextOf<std::index_sequence<I...>> {
  template <size_t>
  using Given = const MaybeTensor&;
  template <size_t>
  using Gradient = Tensor;
  using Gradients = std::tuple<Tensor, Gradient<I>...>;

  static constexpr const char* name = "global_context";
  static constexpr const char* schema =
      "(Tensor x, Tensor? attn_weight, Tensor? attn_bias, Tensor? scale_w1, Tensor? scale_b1, "
      "Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? scale_b2, Tensor? add_w1, "
      "Tensor? add_b1, Tensor? add_norm_weight, Tensor? add_norm_bias, Tensor? add_w2, Tensor? add_b2, float eps, "
      "str activation, str gate) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor? attn_weight, Tensor? attn_bias, Tensor? scale_w1, Tensor? scale_b1, "
      "Tensor? scale_norm_weight, Tensor? scale_norm_bias, Tensor? scale_w2, Tensor? scale_b2, Tensor? add_w1, "
      "Tensor? add_b1, Tensor? add_norm_weight, Tensor? add_norm_bias, Tensor? add_w2, Tensor? add_b2, float eps, "
      "str activation, str gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)";

  static void check_transform(const Parameters& p, int first, const c10::SymInt& c) {
    const char* const* names = &kParameterNames[first];
    const MaybeTensor* t = &p[first];
    int given = 0;
    while (!t[given].has_value()) given++;
    for (int i = 0; i < kSize; i++) {
      TORCH_CHECK_VALUE(t[i].has_value(), name, ": expected ", names[i], " with ", names[given], ", got None");
    }
    const c10::SymInt r = check_hidden_size(name, *t[kW1], c, names[kW1]);
    check_vector(name, names[kB1], t[kB1], r);
    for (int i : {kNormWeight, kNormBias}) {
      const auto size = t[i]->sym_sizes();
      const bool ones = size.size() == 1 || (size.size() == 3 && size[1] == 1 && size[2] == 1);
      TORCH_CHECK_VALUE(ones && size[0] == r, name, ": expected ", names[i], " of size [", r, "] or [", r,
                        ", 1, 1], got ", size_of(*t[i]));
    }
    check_matrix(name, names[kW2], *t[kW2], c, r);
    check_vector(name, names[kB2], t[kB2], c);
  }

  static void check(const Tensor& x, Given<I>... tensors, double, std::string_view activation, std::string_view gate) {
    const Parameters p{tensors...};
    check_feature_map(name, x);
    for (int i = 0; i < kParameters; i++) check_parameter(name, kParameterNames[i], p[i], x);
    int first = 0;
    while (first < kParameters && !p[first].has_value()) first++;
    for (int i = first + 1; i < kParameters; i++) {
      check_same_dtype(name, kParameterNames[i], p[i], kParameterNames[first], *p[first]);
    }
    const auto c = x.sym_size(1);
    const MaybeTensor &weight = p[kAttnWeight], &bias = p[kAttnBias];
    if (weight.has_value()) check_matrix(name, kParameterNames[kAttnWeight], *weight, 1, c);
    TORCH_CHECK_VALUE(weight.has_value() || !bias.has_value(), name,
                      ": expected attn_bias only with attn_weight, got attn_bias of size ", size_of(*bias));
    check_vector(name, kParameterNames[kAttnBias], bias, 1);
    bool given = false;
    for (int at = kFirst; at < kParameters; at += kSize) {
      if (std::none_of(&p[at], &p[at] + kSize, [](const MaybeTensor& t) { return t.has_value(); })) continue;
      check_transform(p, at, c);
      given = true;
    }
    TORCH_CHECK_VALUE(given, name, ": expected the tensors of scale, of add or of both, got neither");
    check_one_of(name, "activation", activation, kActivationNames);
    check_one_of(name, "gate", gate, kGateNames);
  }

  static Tensor vector(const MaybeTensor& t, const Tensor& x) { return t->flatten().to(x.scalar_type()); }

  // The context: of the flat map (N, C, HW) by the attention (N, 1, HW), or the mean.
  struct Pooled {
    Tensor flat, weight, attention, context;
    Pooled(const Tensor& x, const Parameters& p) {
      if (!p[kAttnWeight].has_value()) {
        context = x.mean({2, 3});
        return;
      }
      flat = x.flatten(2);
      weight = vector(p[kAttnWeight], x);
      Tensor logits = at::matmul(flat.transpose(1, 2), weight).unsqueeze(1);
      if (p[kAttnBias].has_value()) logits = logits + 0 * vector(p[kAttnBias], x);
      // Not at::softmax (nor, below, at::layer_norm): the reverse derivative of the forward one is refused, or wrong.
      attention = at::exp(logits - at::logsumexp(logits.detach(), {-1}, true));
      attention = attention / attention.sum(-1, true);
      context = at::bmm(flat, attention.transpose(1, 2)).squeeze(2);
    }
  };
  struct Transformed {
    Tensor rate, unit, normed, active, out;  // unit: of mean 0 and variance 1; rate: 1 / the deviation
    Transformed(const Tensor& c, const MaybeTensor* p, double eps, Activation activation) {
      const Tensor hidden = at::linear(c, layer_weight(*p[kW1], c), vector(p[kB1], c));
      const Tensor d = hidden - hidden.mean(1, true);
      rate = at::rsqrt((d * d).mean(1, true) + eps);
      unit = d * rate;
      normed = unit * vector(p[kNormWeight], c) + vector(p[kNormBias], c);
      active = activate(normed, activation);
      out = at::linear(active, layer_weight(*p[kW2], c), vector(p[kB2], c));
    }
  };

  static Tensor formula(const Tensor& x, Given<I>... tensors, double eps, std::string_view activation,
                        std::string_view gate) {
    const Parameters p{tensors...};
    const Tensor c = Pooled(x, p).context;
    const auto transform = [&](int t) {
      return Transformed(c, &p[kFirst + t * kSize], eps, activation_of(name, activation)).out;
    };
    Tensor y = x;
    if (p[kFirst].has_value()) y = y * plane(apply_gate(transform(kScale), gate_of(name, gate)));
    if (p[kFirst + kSize].has_value()) y = y + plane(transform(kAdd));
    return y;
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, Given<I>... tensors, double eps,
                                    std::string_view activation, std::string_view gate) {
    const Parameters p{tensors...};
    const Pooled pooled(x, p);
    const Tensor& c = pooled.context;
    Grads grads(kParameters, at::empty({0}, x.options()));
    const auto put = [&](int i, const Tensor& g) { grads[i] = gradient_like(g, *p[i]); };
    Tensor grad_x = grad, grad_c;
    for (int t : {kScale, kAdd}) {
      const int first = kFirst + t * kSize;
      if (!p[first].has_value()) continue;
      const Transformed s(c, &p[first], eps, activation_of(name, activation));
      Tensor slope;
      if (t == kScale) {
        const Tensor gated = apply_gate(s.out, gate_of(name, gate));
        grad_x = grad * plane(gated);
        slope = apply_gate_backward((grad * x).sum({2, 3}), s.out, gated, gate_of(name, gate));
      } else {
        slope = grad.sum({2, 3});
      }
      put(first + kW2, at::matmul(slope.t(), s.active));
      put(first + kB2, slope.sum(0));
      const Tensor normed = activate_backward(at::matmul(slope, layer_weight(*p[first + kW2], x)), s.normed,
                                              activation_of(name, activation));
      put(first + kNormWeight, (normed * s.unit).sum(0));
      put(first + kNormBias, normed.sum(0));
      const Tensor unit = normed * vector(p[first + kNormWeight], x);
      const Tensor hidden = s.rate * (unit - unit.mean(1, true) - s.unit * (unit * s.unit).mean(1, true));
      put(first + kW1, at::matmul(hidden.t(), c));
      put(first + kB1, hidden.sum(0));
      const Tensor by_c = at::matmul(hidden, layer_weight(*p[first + kW1], x));
      grad_c = grad_c.defined() ? grad_c + by_c : by_c;
    }
    if (pooled.attention.defined()) {
      const Tensor r = at::bmm(grad_c.unsqueeze(1), pooled.flat);
      const Tensor dz = pooled.attention * (r - (r * pooled.attention).sum(-1, true));
      const Tensor shift = grad_c.unsqueeze(2) * pooled.attention + pooled.weight.unsqueeze(1) * dz;
      grad_x = grad_x + shift.reshape_symint(x.sym_sizes());
      put(kAttnWeight, at::bmm(pooled.flat, dz.transpose(1, 2)).sum(0));
      if (p[kAttnBias].has_value()) put(kAttnBias, 0 * dz.sum());
    } else {
      grad_x = grad_x + plane(grad_c) / at::Scalar(x.sym_size(2) * x.sym_size(3));
    }
    return {grad_x, grads[I]...};
  }

  static ContextParameters pointers(const Parameters& p, const std::array<void*, kParameters>& data) {
    ContextParameters result{data[kAttnWeight], data[kAttnBias], {}};
    for (int t : {kScale, kAdd}) {
      const int first = kFirst + t * kSize;
      const auto* d = &data[first];
      result.transforms[t] = {
          p[first].has_value() ? p[first]->size(0) : 0, d[kW1], d[kB1], d[kNormWeight], d[kNormBias], d[kW2], d[kB2]};
    }
    return result;
  }
  // The parameters as the kernels take them; `dense` keeps copies of the rare ones that are not contiguous alive.
  static ContextWeights weights(Parameters& dense, double eps, std::string_view activation, std::string_view gate) {
    std::array<void*, kParameters> data{};
    std::optional<Dtype> dtype;
    for (int i = 0; i < kParameters; i++) {
      if (!dense[i].has_value()) continue;
      dense[i] = dense[i]->contiguous();
      data[i] = const_cast<void*>(data_of(dense[i]));
      dtype = dtype_of(*dense[i]);
    }
    return {pointers(dense, data), *dtype, eps, activation_of(name, activation), gate_of(name, gate)};
  }

  static int64_t memory_size(const Tensor& x, Given<I>... tensors, double, std::string_view, std::string_view) {
    return memory_size(x, std::get<kAttnWeight>(std::tie(tensors...)));
  }
  static int64_t memory_size(const Tensor& x, const MaybeTensor& attn_weight) {
    return x.size(0) * (x.size(1) + (attn_weight.has_value() ? x.size(2) * x.size(3) : 0));
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, Given<I>... tensors, double eps,
                  std::string_view activation, std::string_view gate) {
    Parameters dense{tensors...};
    const auto w = weights(dense, eps, activation, gate);
    const auto format = walk_format(x);
    kernel(GlobalContextArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), w, Walk(x, format).map,
                             Walk(y, format).map, Memory::keep(x, memory_size(x, dense[kAttnWeight]))});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, Given<I>... tensors,
                           double eps, std::string_view activation, std::string_view gate) {
    Parameters dense{tensors...};
    const auto w = weights(dense, eps, activation, gate);
    std::array<void*, kParameters> data{};
    for (int i = 0; i < kParameters; i++) data[i] = grads[1 + i].numel() ? grads[1 + i].data_ptr() : nullptr;
    const auto format = walk_format(x);
    kernel(GlobalContextBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), w,
                                     Walk(grad, format).map, Walk(x, format).map, Walk(grads[0], format).map,
                                     Memory::kept(x, memory_size(x, dense[kAttnWeight])), pointers(dense, data)});
  }
};

struct GlobalContext : GlobalContextOf<std::make_index_sequence<kParameters>> {};
CONVBLOCKS_REGISTER(GlobalContext)

}  // namespace convblocks
