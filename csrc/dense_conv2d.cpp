#include "dense_conv2d.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include "convolves.h"
#include "gate_formula.h"
#include "norm_factors.h"
#include "op.h"

namespace convblocks {

struct DenseConv2d {
  using MaybeTensor = std::optional<Tensor>;
  using Sizes = c10::SymIntArrayRef;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static constexpr const char* name = "dense_conv2d";
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[2] stride, SymInt[2] padding, "
      "SymInt[2] dilation, str activation) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor weight, Tensor? scale, Tensor? shift, Tensor? residual, SymInt[2] stride, "
      "SymInt[2] padding, SymInt[2] dilation, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";
  static constexpr bool autocasts = true;
  static constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // so that no size overflows

  static void check_numbers(const char* argument, Sizes values, int64_t least) {
    bool ok = values.size() == 2;
    for (const auto& value : values) ok = ok && value >= least && value <= kMost;
    TORCH_CHECK_VALUE(ok, name, ": expected ", argument, " of 2 numbers from ", least, " to ", kMost, ", got ", values);
  }
  static void check_channels(const char* argument, const MaybeTensor& t, const Tensor& x, const Tensor& weight) {
    check_parameter(name, argument, t, x);
    const auto out = weight.sym_size(0);
    TORCH_CHECK_VALUE(!t.has_value() || (t->dim() == 1 && t->sym_size(0) == out), name, ": expected ", argument,
                      " of size [", out, "], got ", size_of(*t));
  }
  static void check(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                    const MaybeTensor& residual, Sizes stride, Sizes padding, Sizes dilation,
                    std::string_view activation) {
    check_feature_map(name, x);
    TORCH_CHECK_VALUE(x.sym_size(2) * x.sym_size(3) > 0, name, ": expected at least one pixel, got an input of size ",
                      size_of(x));
    TORCH_CHECK_TYPE(weight.defined(), name, ": expected weight to be a tensor, got None");
    check_parameter(name, "weight", weight, x);
    const auto c = x.sym_size(1);
    const bool dense = weight.dim() == 4 && c > 0 && weight.sym_size(0) > 0 && weight.sym_size(1) == c &&
                       weight.sym_size(2) > 0 && weight.sym_size(3) > 0;
    TORCH_CHECK_VALUE(dense, name, ": expected weight of size [o, ", c, ", kh, kw], got ", size_of(weight));
    check_channels("scale", scale, x, weight);
    check_channels("shift", shift, x, weight);
    if (scale.has_value()) check_same_dtype(name, "shift", shift, "scale", *scale);
    check_numbers("stride", stride, 1);
    check_numbers("padding", padding, 0);
    check_numbers("dilation", dilation, 1);
    check_one_of(name, "activation", activation, kActivationNames);
    const auto padded_h = x.sym_size(2) + 2 * padding[0], padded_w = x.sym_size(3) + 2 * padding[1];
    const auto kernel_h = dilation[0] * (weight.sym_size(2) - 1) + 1,
               kernel_w = dilation[1] * (weight.sym_size(3) - 1) + 1;
    TORCH_CHECK_VALUE(kernel_h <= padded_h && kernel_w <= padded_w, name, ": expected a padded input of at least ",
                      kernel_h, " x ", kernel_w, ", the size of the dilated kernel, got ", padded_h, " x ", padded_w);
    if (!residual.has_value()) return;
    check_like(name, "residual", *residual, x,
               output_size(x, weight, scale, shift, residual, stride, padding, dilation, activation));
  }

  static std::vector<c10::SymInt> output_size(const Tensor& x, const Tensor& weight, const MaybeTensor&,
                                              const MaybeTensor&, const MaybeTensor&, Sizes stride, Sizes padding,
                                              Sizes dilation, std::string_view) {
    const auto side = [&](int i) {
      return (x.sym_size(2 + i) + 2 * padding[i] - dilation[i] * (weight.sym_size(2 + i) - 1) - 1) / stride[i] + 1;
    };
    return {x.sym_size(0), weight.sym_size(0), side(0), side(1)};
  }

  static Tensor convolved(const Tensor& x, const Tensor& weight, Sizes stride, Sizes padding, Sizes dilation) {
    return at::convolution_symint(x, weight.to(x.scalar_type()), {}, stride, padding, dilation, false, {0, 0}, 1);
  }
  // The arguments of scale_shift_act: 1 and 0 where there is none.
  struct Channels {
    Tensor scale, shift;
    Channels(const Tensor& z, const MaybeTensor& scale_, const MaybeTensor& shift_) {
      const auto options = scale_.has_value()   ? scale_->options()
                           : shift_.has_value() ? shift_->options()
                                                : z.options();
      scale = scale_.has_value() ? scale_->contiguous() : at::ones_symint({z.sym_size(1)}, options);
      shift = shift_.has_value() ? shift_->contiguous() : at::zeros_symint({z.sym_size(1)}, options);
    }
    operator ScaleShift() const { return {dtype_of(scale), scale.const_data_ptr(), shift.const_data_ptr()}; }
  };

  static Tensor formula(const Tensor& x, const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift,
                        const MaybeTensor& residual, Sizes stride, Sizes padding, Sizes dilation,
                        std::string_view activation) {
    static auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("convblocks::scale_shift_act", "")
            .typed<Tensor(const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&, std::string_view)>();
    const Tensor z = convolved(x, weight, stride, padding, dilation);
    const Channels channels(z, scale, shift);
    return op.call(z, channels.scale, channels.shift, residual, activation);
  }
  // From the gradients of the convolution's output and of what follows it.
  static Gradients gradients(const std::tuple<Tensor, Tensor, Tensor, Tensor>& after, const Tensor& x,
                             const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& shift, Sizes stride,
                             Sizes padding, Sizes dilation, bool real) {
    const auto& [grad_z, grad_scale, grad_shift, grad_residual] = after;
    const auto [grad_x, grad_weight] = convolution_gradients(grad_z, x, weight, stride, padding, dilation, 1, real);
    const Tensor absent = at::empty({0}, x.options());
    return {grad_x, grad_weight, scale.has_value() ? grad_scale : absent, shift.has_value() ? grad_shift : absent,
            grad_residual};
  }
  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& scale,
                                    const MaybeTensor& shift, const MaybeTensor& residual, Sizes stride, Sizes padding,
                                    Sizes dilation, std::string_view activation) {
    using After = std::tuple<Tensor, Tensor, Tensor, Tensor>;
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("convblocks::scale_shift_act_backward", "")
                         .typed<After(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const MaybeTensor&,
                                      std::string_view)>();
    const Tensor z = convolved(x, weight, stride, padding, dilation);
    const Channels channels(z, scale, shift);
    return gradients(op.call(grad, z, channels.scale, channels.shift, residual, activation), x, weight, scale, shift,
                     stride, padding, dilation, false);
  }

  static Grads empty_grads(const Tensor&, const Tensor& x, const Tensor& weight, const MaybeTensor& scale,
                           const MaybeTensor& shift, const MaybeTensor& residual, Sizes, Sizes, Sizes,
                           std::string_view) {
    Grads grads;
    append_grad(grads, x);
    append_grad(grads, weight);
    append_grad(grads, scale);
    append_grad(grads, shift);
    grads.push_back(residual.has_value() ? empty_map(x, residual->sym_sizes()) : at::empty({0}, x.options()));
    return grads;
  }

  static Activation activation_of(std::string_view text) {
    return static_cast<Activation>(check_one_of(name, "activation", text, kActivationNames));
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& scale,
                  const MaybeTensor& shift, const MaybeTensor& residual, Sizes stride, Sizes padding, Sizes dilation,
                  std::string_view activation) {
    const auto number = [](const c10::SymInt& value) { return value.expect_int(); };
    DenseConv2dArgs args{};
    const auto format = memory_format(y);
    const bool planes = format != at::MemoryFormat::ChannelsLast;
    const bool unsuited = planes && (x.size(1) < 8 || number(dilation[1]) != 1);
    if (!kernels_convolve(x) || unsuited) {
      const Tensor z = convolved(x, weight, stride, padding, dilation);
      const Channels channels(z, scale, shift);
      const auto walk = walk_format(y);
      const Walk from(z, walk), other(residual.value_or(z), walk), to(y, walk);
      const ScaleShiftActArgs after{dtype_of(x), y.size(0),
                                    y.size(1),   y.size(2) * y.size(3),
                                    channels,    activation_of(activation),
                                    from.map,    residual.has_value() ? other.map : Map{},
                                    to.map};
      args.after = &after;
      kernel(args);
      if (!to.tensor.is_same(y)) y.copy_(to.tensor);
      return;
    }
    const bool channels_last = weight.is_contiguous(at::MemoryFormat::ChannelsLast) && !weight.is_contiguous();
    const Tensor w = channels_last ? weight : weight.contiguous();
    const auto dense = [](const MaybeTensor& t) { return t.has_value() ? MaybeTensor(t->contiguous()) : t; };
    const MaybeTensor factor = dense(scale), offset = dense(shift);
    const Walk from(x, format), other(residual.value_or(y), format), to(y, format);
    args = {nullptr,
            dtype_of(x),
            x.size(0),
            x.size(1),
            x.size(2),
            x.size(3),
            y.size(1),
            y.size(2),
            y.size(3),
            w.size(2),
            w.size(3),
            number(stride[0]),
            number(stride[1]),
            number(dilation[0]),
            number(dilation[1]),
            number(padding[0]),
            number(padding[1]),
            w.const_data_ptr(),
            channels_last,
            data_of(factor),
            data_of(offset),
            activation_of(activation),
            planes,
            from.map,
            residual.has_value() ? other.map : Map{},
            to.map};
    kernel(args);
    if (!to.tensor.is_same(y)) y.copy_(to.tensor);
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const Tensor& weight,
                           const MaybeTensor& scale, const MaybeTensor& shift, const MaybeTensor& residual,
                           Sizes stride, Sizes padding, Sizes dilation, std::string_view activation) {
    const Tensor z = convolved(x, weight, stride, padding, dilation);
    const Channels channels(z, scale, shift);
    const Tensor grad_z = empty_map(z), grad_scale = at::empty_like(channels.scale),
                 grad_shift = at::empty_like(channels.shift);
    const auto format = walk_format(z);
    const Walk gradient(grad, format), from(z, format), other(residual.value_or(z), format);
    const Walk to(grad_z, format), to_other(residual.has_value() ? grads[4] : grad_z, format);
    kernel(ScaleShiftActBackwardArgs{
        dtype_of(x), z.size(0), z.size(1), z.size(2) * z.size(3), channels, activation_of(activation), gradient.map,
        from.map, residual.has_value() ? other.map : Map{}, to.map, residual.has_value() ? to_other.map : Map{},
        grad_scale.data_ptr(), grad_shift.data_ptr()});
    if (residual.has_value() && !to_other.tensor.is_same(grads[4])) grads[4].copy_(to_other.tensor);
    const auto all =
        gradients({grad_z, grad_scale, grad_shift, grads[4]}, x, weight, scale, shift, stride, padding, dilation, true);
    take_grad(grads[0], std::get<0>(all));
    take_grad(grads[1], std::get<1>(all));
    if (scale.has_value()) grads[2] = grad_scale;
    if (shift.has_value()) grads[3] = grad_shift;
  }
};

CONVBLOCKS_REGISTER(DenseConv2d)

// A convolution of a module and the norm after it, at inference on the CPU.
struct ConvNorm {
  using MaybeTensor = std::optional<Tensor>;

  static constexpr const char* name = "_conv_norm";
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
      "Tensor? residual, Tensor(a!)? out, int[2] stride, int[] padding, int[2] dilation, str activation) -> Tensor?";

  // Into `out` if it is dense and `out` is of its size. With four numbers of padding (left, right, top, bottom) it is
  // depthwise. Nothing where the tensors are not of one dtype on the CPU, or do not fit together: the modules themselves
  // say why.
  static MaybeTensor run(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
                         const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                         const MaybeTensor& residual, const MaybeTensor& out, at::IntArrayRef stride,
                         at::IntArrayRef padding, at::IntArrayRef dilation, std::string_view activation) {
    const bool depthwise = padding.size() == 4;
    const auto alike = [&](const Tensor& t) { return t.is_cpu() && t.scalar_type() == x.scalar_type(); };
    const auto fits = [&](const MaybeTensor& t) {
      return !t.has_value() || (alike(*t) && t->is_contiguous() && t->numel() == weight.size(0));
    };
    const bool floats = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    if (!floats || is_empty(x) || !alike(weight) || weight.size(1) != (depthwise ? 1 : x.size(1)) || !fits(bias) ||
        mean.has_value() != var.has_value() || !fits(mean) || !fits(var) || !fits(gamma) || !fits(beta)) {
      return std::nullopt;
    }
    const NormFactors norm(bias, mean, var, gamma, beta, eps);
    const MaybeTensor &scale = norm.scale, &shift = norm.shift;
    const auto numbers = [](at::IntArrayRef values) { return c10::fromIntArrayRefSlow(values); };
    if (depthwise) {
      static auto op = c10::Dispatcher::singleton()
                           .findSchemaOrThrow("convblocks::depthwise_conv2d", "")
                           .typed<Tensor(const Tensor&, const Tensor&, const MaybeTensor&, c10::SymIntArrayRef,
                                         c10::SymIntArrayRef, c10::SymIntArrayRef, std::string_view)>();
      const Tensor factor = scale.has_value() ? weight * scale->view({-1, 1, 1, 1}) : weight;
      const Tensor y = op.call(x, factor, shift, numbers(stride), numbers(padding), numbers(dilation), activation);
      return y;
    }
    const auto call = [&](auto f) {
      return f(x, weight, scale, shift, residual, numbers(stride), numbers(padding), numbers(dilation), activation);
    };
    const KernelSlot& slot = Operator<DenseConv2d>::forward_slot;
    if (!slot.on(x)) return std::nullopt;
    call(DenseConv2d::check);
    const auto size = call(DenseConv2d::output_size);
    const bool into = out.has_value() && out->sym_sizes() == c10::SymIntArrayRef(size) && alike(*out);
    const Tensor y = into ? *out : empty_map(x, size);
    call([&](const auto&... args) { DenseConv2d::run(Call(DenseConv2d::name, slot, x), y, args...); });
    return y;
  }
};

TORCH_LIBRARY_FRAGMENT(convblocks, m) { define_once(m, ConvNorm::name, ConvNorm::schema); }
TORCH_LIBRARY_IMPL(convblocks, CPU, m) { m.impl(ConvNorm::name, ConvNorm::run); }

}  // namespace convblocks
