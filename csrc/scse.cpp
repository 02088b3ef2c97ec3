#include "scse.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>

#include "layer_formula.h"

namespace convblocks {

struct Scse {
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static constexpr const char* name = "scse";
  static constexpr const char* schema =
      "(Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor w, Tensor? b, str mode) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor w, Tensor? b, str mode) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
  static constexpr std::array<std::string_view, 4> kModes{"add", "max", "mul", "concat"};

  static void check(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2,
                    const MaybeTensor& b2, const Tensor& w, const MaybeTensor& b, std::string_view mode) {
    check_feature_map(name, x);
    TORCH_CHECK_TYPE(w.defined(), name, ": expected w to be a tensor, got None");
    const std::pair<const char*, const MaybeTensor&> channel[]{{"w1", w1}, {"b1", b1}, {"w2", w2}, {"b2", b2}};
    for (const auto& [label, t] : channel) check_parameter(name, label, t, x);
    check_parameter(name, "w", w, x);
    check_parameter(name, "b", b, x);
    for (const auto& [label, t] : channel) check_same_dtype(name, label, t, "w", w);
    check_same_dtype(name, "b", b, "w", w);
    const auto c = x.sym_size(1);
    if (w1.has_value() && w2.has_value()) {
      const auto r = check_hidden_size(name, *w1, c);
      check_matrix(name, "w2", *w2, c, r);
      check_vector(name, "b1", b1, r);
      check_vector(name, "b2", b2, c);
    } else {
      check_alone("w1", w1, "w2");
      check_alone("w2", w2, "w1");
      check_alone("b1", b1, "w1");
      check_alone("b2", b2, "w2");
    }
    const bool ones = w.dim() == 4 && w.sym_size(2) == 1 && w.sym_size(3) == 1;
    const bool row = (w.dim() == 2 || ones) && w.sym_size(0) == 1 && w.sym_size(1) == c;
    TORCH_CHECK_VALUE(row || (w.dim() == 1 && w.sym_size(0) == c), name, ": expected w of size [", c, "], [1, ", c,
                      "] or [1, ", c, ", 1, 1], got ", size_of(w));
    check_vector(name, "b", b, 1);
    check_one_of(name, "mode", mode, kModes);
  }
  static void check_alone(const char* label, const MaybeTensor& t, const char* other) {
    TORCH_CHECK_VALUE(!t.has_value(), name, ": expected ", label, " only with ", other, ", got ", label, " of size ",
                      size_of(*t));
  }

  static Combine combine_of(const MaybeTensor& w1, std::string_view mode) {
    return w1.has_value() ? static_cast<Combine>(check_one_of(name, "mode", mode, kModes)) : Combine::spatial;
  }
  static std::vector<c10::SymInt> output_size(const Tensor& x, const MaybeTensor& w1, const MaybeTensor&,
                                              const MaybeTensor&, const MaybeTensor&, const Tensor&, const MaybeTensor&,
                                              std::string_view mode) {
    auto size = x.sym_sizes().vec();
    if (combine_of(w1, mode) == Combine::concat) size[1] = 2 * size[1];
    return size;
  }

  static Tensor filter(const Tensor& w, const Tensor& x) { return w.reshape({1, -1, 1, 1}).to(x.scalar_type()); }

  // The logits of the pixels' gates. torch's convolution refuses maps without pixels.
  static Tensor dot(const Tensor& x, const Tensor& w, const MaybeTensor& b) {
    if (x.sym_size(2) * x.sym_size(3) != 0) return at::conv2d(x, filter(w, x), layer_bias(b, x));
    const Tensor z = (x * filter(w, x)).sum(1, true);
    return b.has_value() ? z + layer_bias(b, x)->view({1, 1, 1, 1}) : z;
  }

  struct Terms {
    Tensor pooled, hidden, active, s;  // only with channel gates
    Tensor q;
    Tensor channel, spatial;  // x s, and x q
  };
  static Terms terms(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2,
                     const MaybeTensor& b2, const Tensor& w, const MaybeTensor& b) {
    Terms t;
    t.q = at::sigmoid(dot(x, w, b));
    t.spatial = x * t.q;
    if (w1.has_value()) {
      t.pooled = x.mean({2, 3});
      t.hidden = at::linear(t.pooled, layer_weight(*w1, x), layer_bias(b1, x));
      t.active = at::relu(t.hidden);
      t.s = at::sigmoid(at::linear(t.active, layer_weight(*w2, x), layer_bias(b2, x)));
      t.channel = x * plane(t.s);
    }
    return t;
  }

  static Tensor formula(const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2,
                        const MaybeTensor& b2, const Tensor& w, const MaybeTensor& b, std::string_view mode) {
    const Terms t = terms(x, w1, b1, w2, b2, w, b);
    switch (combine_of(w1, mode)) {
      case Combine::add: return t.channel + t.spatial;
      case Combine::max: return at::maximum(t.channel, t.spatial);
      case Combine::mul: return t.channel * t.spatial;
      case Combine::concat: return at::cat({t.channel, t.spatial}, 1);
      case Combine::spatial: return t.spatial;
    }
    TORCH_INTERNAL_ASSERT(false);
  }

  // The gradients of x s and of x q.
  static std::pair<Tensor, Tensor> split(const Tensor& grad, const Terms& t, Combine combine) {
    const auto larger = [&](const Tensor& one, const Tensor& other) {
      return at::where(one == other, grad / 2, grad).masked_fill(one < other, 0);
    };
    if (combine == Combine::mul) return {grad * t.spatial, grad * t.channel};
    if (combine == Combine::max) return {larger(t.channel, t.spatial), larger(t.spatial, t.channel)};
    if (combine == Combine::concat) {
      const auto c = t.spatial.sym_size(1);
      return {grad.narrow_symint(1, 0, c), grad.narrow_symint(1, c, c)};
    }
    return {grad, grad};
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1,
                                    const MaybeTensor& w2, const MaybeTensor& b2, const Tensor& w, const MaybeTensor& b,
                                    std::string_view mode) {
    const Terms t = terms(x, w1, b1, w2, b2, w, b);
    const auto [by_channel, by_spatial] = split(grad, t, combine_of(w1, mode));
    const Tensor none = at::empty({0}, x.options());

    const Tensor dz = (by_spatial * x).sum(1, true) * t.q * (1 - t.q);
    const Tensor dw = gradient_like((dz * x).sum({0, 2, 3}), w),
                 db = b.has_value() ? gradient_like(dz.sum(), *b) : none;
    Tensor dx = by_spatial * t.q + dz * filter(w, x);
    if (!w1.has_value()) return {dx, none, none, none, none, dw, db};

    const Tensor dlogit = (by_channel * x).sum({2, 3}) * t.s * (1 - t.s);
    const Tensor dhidden = at::threshold_backward(at::matmul(dlogit, layer_weight(*w2, x)), t.hidden, 0);
    const Tensor dpooled = at::matmul(dhidden, layer_weight(*w1, x));
    dx = by_channel * plane(t.s) + dx + plane(dpooled) / at::Scalar(x.sym_size(2) * x.sym_size(3));
    return {dx,
            gradient_like(at::matmul(dhidden.t(), t.pooled), *w1),
            b1.has_value() ? gradient_like(dhidden.sum(0), *b1) : none,
            gradient_like(at::matmul(dlogit.t(), t.active), *w2),
            b2.has_value() ? gradient_like(dlogit.sum(0), *b2) : none,
            dw,
            db};
  }

  // The parameters as the kernels take them, dense: copies of the rare ones that are not stay alive with this.
  struct Parameters {
    DenseLayers layers;
    MaybeTensor w, b;
    Parameters(const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2, const MaybeTensor& b2,
               const Tensor& filter, const MaybeTensor& bias)
        : layers(dtype_of(filter), w1, b1, w2, b2, Activation::relu, Gate::sigmoid), w(filter.contiguous()), b(bias) {
      if (b.has_value()) b = b->contiguous();
    }
  };

  // Of a map of twice the channels.
  static Map second_half(const Map& map, const Tensor& x) {
    return {static_cast<char*>(map.data) + x.size(1) * map.channel * x.element_size(), map.batch, map.channel,
            map.pixel};
  }
  // With one channel in and two out, the pixels of the output need not be neighbours where those of the input are.
  static at::MemoryFormat format_of(const Tensor& x, Combine combine) {
    return combine == Combine::concat ? memory_format(x) : walk_format(x);
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const MaybeTensor& w1, const MaybeTensor& b1,
                  const MaybeTensor& w2, const MaybeTensor& b2, const Tensor& w, const MaybeTensor& b,
                  std::string_view mode) {
    const Combine combine = combine_of(w1, mode);
    const Parameters p(w1, b1, w2, b2, w, b);
    const auto format = format_of(x, combine);
    const Walk from(x, format), to(y, format);
    kernel(ScseArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), combine, p.layers.weights, data_of(p.w),
                    data_of(p.b), from.map, to.map, combine == Combine::concat ? second_half(to.map, x) : to.map});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const MaybeTensor& w1,
                           const MaybeTensor& b1, const MaybeTensor& w2, const MaybeTensor& b2, const Tensor& w,
                           const MaybeTensor& b, std::string_view mode) {
    const Combine combine = combine_of(w1, mode);
    const Parameters p(w1, b1, w2, b2, w, b);
    const auto format = format_of(x, combine);
    const Walk gradient(grad, format), from(x, format), to(grads[0], format);
    const auto out = [&](size_t i) { return grads[i].numel() ? grads[i].data_ptr() : nullptr; };
    kernel(ScseBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), combine, p.layers.weights,
                            data_of(p.w), data_of(p.b), gradient.map,
                            combine == Combine::concat ? second_half(gradient.map, x) : gradient.map, from.map, to.map,
                            out(1), out(2), out(3), out(4), out(5), out(6)});
  }
};

CONVBLOCKS_REGISTER(Scse)

}  // namespace convblocks
