#include "scale_shift_act.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/variable.h>

#include "gate_formula.h"
#include "op.h"

namespace convblocks {

struct ScaleShiftAct {
  using MaybeTensor = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static constexpr const char* name = "scale_shift_act";
  static constexpr const char* schema =
      "(Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> "
      "(Tensor, Tensor, Tensor, Tensor)";
  static constexpr const char* inplace_name = "scale_shift_act_";
  static constexpr const char* inplace_schema =
      "(Tensor(a!) x, Tensor scale, Tensor shift, Tensor? residual, str activation) -> ()";

  static void check(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,
                    std::string_view activation) {
    check_feature_map(name, x);
    check_channels("scale", scale, x);
    check_channels("shift", shift, x);
    check_same_dtype(name, "shift", shift, "scale", scale);
    if (residual.has_value()) check_like(name, "residual", *residual, x, x.sym_sizes());
    check_one_of(name, "activation", activation, kActivationNames);
  }
  static void check_channels(const char* argument, const Tensor& t, const Tensor& x) {
    TORCH_CHECK_TYPE(t.defined(), name, ": expected ", argument, " to be a tensor, got None");
    check_parameter(name, argument, t, x);
    const auto c = x.sym_size(1);
    TORCH_CHECK_VALUE(t.dim() == 1 && t.sym_size(0) == c, name, ": expected ", argument, " of size [", c, "], got ",
                      size_of(t));
  }

  static Activation activation_of(std::string_view text) {
    return static_cast<Activation>(check_one_of(name, "activation", text, kActivationNames));
  }
  static Tensor plane(const Tensor& t) { return t.unsqueeze(-1).unsqueeze(-1); }

  // What the activation is given.
  static Tensor inner(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual) {
    const Tensor z = x * plane(scale) + plane(shift);
    return residual.has_value() ? z + *residual : z;
  }
  static Tensor formula(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,
                        std::string_view activation) {
    return activate(inner(x, scale, shift, residual), activation_of(activation)).to(x.scalar_type());
  }
  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
                                    const MaybeTensor& residual, std::string_view activation) {
    const Activation kind = activation_of(activation);
    Tensor g = grad.clone();  // a gradient is never an input
    if (kind != Activation::none) {
      const Tensor z = inner(x, scale, shift, residual);
      g = activate_backward(grad.to(z.scalar_type()), z, kind);
    }
    return {(g * plane(scale)).to(x.scalar_type()), (g * x).sum({0, 2, 3}).to(scale.scalar_type()),
            g.sum({0, 2, 3}).to(shift.scalar_type()),
            residual.has_value() ? g.to(x.scalar_type()) : at::empty({0}, x.options())};
  }

  static Grads empty_grads(const Tensor&, const Tensor& x, const Tensor& scale, const Tensor& shift,
                           const MaybeTensor& residual, std::string_view) {
    Grads grads;
    append_grad(grads, x);
    append_grad(grads, scale);
    append_grad(grads, shift);
    grads.push_back(residual.has_value() ? empty_map(x) : at::empty({0}, x.options()));
    return grads;
  }

  // What the maps of a call, and the few copies of those that cannot be walked, are to its kernels.
  struct Channels {
    Tensor scale, shift;
    Channels(const Tensor& scale_, const Tensor& shift_) : scale(scale_.contiguous()), shift(shift_.contiguous()) {}
    operator ScaleShift() const { return {dtype_of(scale), scale.const_data_ptr(), shift.const_data_ptr()}; }
  };

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& scale, const Tensor& shift,
                  const MaybeTensor& residual, std::string_view activation) {
    const auto format = walk_format(x);
    const Channels channels(scale, shift);
    const Walk from(x, format), other(residual.value_or(x), format), to(y, format);
    kernel(ScaleShiftActArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), channels,
                             activation_of(activation), from.map, residual.has_value() ? other.map : Map{}, to.map});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const Tensor& scale,
                           const Tensor& shift, const MaybeTensor& residual, std::string_view activation) {
    const auto format = walk_format(x);
    const Channels channels(scale, shift);
    const Walk gradient(grad, format), from(x, format), other(residual.value_or(x), format);
    const Walk to(grads[0], format), to_other(residual.has_value() ? grads[3] : grads[0], format);
    kernel(ScaleShiftActBackwardArgs{
        dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), channels, activation_of(activation), gradient.map,
        from.map, residual.has_value() ? other.map : Map{}, to.map, residual.has_value() ? to_other.map : Map{},
        grads[1].data_ptr(), grads[2].data_ptr()});
  }

  static void fallback_inplace(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,
                               std::string_view activation) {
    check(x, scale, shift, residual, activation);
    x.copy_(formula(x, scale, shift, residual, activation));
  }
  // What is read while x is written over: a copy if it may lie elsewhere in the memory of x.
  static Tensor apart(const Tensor& t, const Tensor& x) {
    const bool same = t.const_data_ptr() == x.const_data_ptr() && t.sizes() == x.sizes() && t.strides() == x.strides();
    return t.is_alias_of(x) && !same ? t.clone() : t;
  }
  static void run_inplace(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,
                          std::string_view activation) {
    const KernelSlot& slot = Operator<ScaleShiftAct>::forward_slot;
    if (is_empty(x) || !slot.on(x)) return fallback_inplace(x, scale, shift, residual, activation);
    check(x, scale, shift, residual, activation);
    c10::DeviceGuard guard(x.device());
    const Walk to(x, walk_format(x));
    const MaybeTensor other = residual.has_value() ? MaybeTensor(apart(*residual, x)) : residual;
    run(Call(name, slot, x), to.tensor, to.tensor, apart(scale, x), apart(shift, x), other, activation);
    if (!to.tensor.is_same(x)) x.copy_(to.tensor);
  }
  static void counted_inplace(const Tensor& x, const Tensor& scale, const Tensor& shift, const MaybeTensor& residual,
                              std::string_view activation) {
    static auto op = Operator<ScaleShiftAct>::handle<decltype(run_inplace)>(inplace_name);
    at::AutoDispatchBelowADInplaceOrView guard;
    op.call(x, scale, shift, residual, activation);
    torch::autograd::impl::bump_version(x);  // so that autograd notices
  }
};

CONVBLOCKS_REGISTER(ScaleShiftAct)

// The form that writes over x.
TORCH_LIBRARY_FRAGMENT(convblocks, m) {
  define_once(m, ScaleShiftAct::inplace_name, ScaleShiftAct::inplace_schema, {at::Tag::pt2_compliant_tag});
}
TORCH_LIBRARY_IMPL(convblocks, CPU, m) { m.impl(ScaleShiftAct::inplace_name, ScaleShiftAct::run_inplace); }
TORCH_LIBRARY_IMPL(convblocks, CUDA, m) { m.impl(ScaleShiftAct::inplace_name, ScaleShiftAct::run_inplace); }
TORCH_LIBRARY_IMPL(convblocks, CompositeExplicitAutograd, m) {
  m.impl(ScaleShiftAct::inplace_name, ScaleShiftAct::fallback_inplace);
}
TORCH_LIBRARY_IMPL(convblocks, ADInplaceOrView, m) {
  m.impl(ScaleShiftAct::inplace_name, ScaleShiftAct::counted_inplace);
}

}  // namespace convblocks
