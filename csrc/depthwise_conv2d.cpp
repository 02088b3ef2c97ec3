#include "depthwise_conv2d.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/sum.h>

#include "convolves.h"
#include "gate_formula.h"
#include "op.h"

namespace convblocks {

struct DepthwiseConv2d {
  using MaybeTensor = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;
  using Sizes = c10::SymIntArrayRef;

  static constexpr const char* name = "depthwise_conv2d";
  static constexpr const char* schema =
      "(Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
      "str activation) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, SymInt[2] stride, SymInt[4] padding, SymInt[2] dilation, "
      "str activation) -> (Tensor, Tensor, Tensor)";
  static constexpr bool autocasts = true;

  static constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // so that no size overflows

  static void check_numbers(const char* argument, Sizes values, size_t count, int64_t least) {
    bool ok = values.size() == count;
    for (const auto& value : values) ok = ok && value >= least && value <= kMost;
    TORCH_CHECK_VALUE(ok, name, ": expected ", argument, " of ", count, " numbers from ", least, " to ", kMost,
                      ", got ", values);
  }

  static void check(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, Sizes stride, Sizes padding,
                    Sizes dilation, std::string_view activation) {
    check_feature_map(name, x);
    TORCH_CHECK_TYPE(weight.defined(), name, ": expected weight to be a tensor, got None");
    check_parameter(name, "weight", weight, x);
    check_parameter(name, "bias", bias, x);
    check_same_dtype(name, "bias", bias, "weight", weight);
    const auto c = x.sym_size(1);
    const bool depthwise = weight.dim() == 4 && weight.sym_size(1) == 1 && c > 0 && weight.sym_size(0) > 0 &&
                           weight.sym_size(0) % c == 0 && weight.sym_size(2) > 0 && weight.sym_size(3) > 0;
    TORCH_CHECK_VALUE(depthwise, name, ": expected weight of size [", c, " * m, 1, kh, kw], got ", size_of(weight));
    TORCH_CHECK_VALUE(!bias.has_value() || (bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)), name,
                      ": expected bias of size [", weight.sym_size(0), "], got ", size_of(*bias));
    check_numbers("stride", stride, 2, 1);
    check_numbers("padding", padding, 4, 0);
    check_numbers("dilation", dilation, 2, 1);
    check_one_of(name, "activation", activation, kActivationNames);
    const auto padded_h = x.sym_size(2) + padding[2] + padding[3], padded_w = x.sym_size(3) + padding[0] + padding[1];
    const auto kernel_h = dilation[0] * (weight.sym_size(2) - 1) + 1,
               kernel_w = dilation[1] * (weight.sym_size(3) - 1) + 1;
    TORCH_CHECK_VALUE(kernel_h <= padded_h && kernel_w <= padded_w, name, ": expected a padded input of at least ",
                      kernel_h, " x ", kernel_w, ", the size of the dilated kernel, got ", padded_h, " x ", padded_w);
  }

  static std::vector<c10::SymInt> output_size(const Tensor& x, const Tensor& weight, const MaybeTensor&, Sizes stride,
                                              Sizes padding, Sizes dilation, std::string_view) {
    const auto side = [&](int i, const c10::SymInt& pad) {
      return (x.sym_size(2 + i) + pad - dilation[i] * (weight.sym_size(2 + i) - 1) - 1) / stride[i] + 1;
    };
    return {x.sym_size(0), weight.sym_size(0), side(0, padding[2] + padding[3]), side(1, padding[0] + padding[1])};
  }

  static Activation activation_of(std::string_view text) {
    return static_cast<Activation>(check_one_of(name, "activation", text, kActivationNames));
  }

  // The arguments of torch's convolution, which pads alike on both sides and nothing not at all: else x is padded before.
  struct Convolution {
    Tensor x, weight;
    MaybeTensor bias;
    std::vector<c10::SymInt> stride, padding, dilation;
    bool padded;

    Convolution(const Tensor& x_, const Tensor& weight_, const MaybeTensor& bias_, Sizes stride_, Sizes padding_,
                Sizes dilation_)
        : x(x_), weight(weight_.to(x_.scalar_type())), bias(bias_), stride(stride_.vec()),
          padding{padding_[2], padding_[0]}, dilation(dilation_.vec()),
          padded(padding_[0] != padding_[1] || padding_[2] != padding_[3] || x_.sym_numel() == 0) {
      if (bias.has_value()) bias = bias->to(x.scalar_type());
      if (!padded) return;
      x = at::constant_pad_nd_symint(x, padding_);
      padding = {0, 0};
    }
    Tensor operator()() const {
      return at::convolution_symint(x, weight, bias, stride, padding, dilation, false, {0, 0}, x.sym_size(1));
    }
  };

  static Tensor formula(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, Sizes stride, Sizes padding,
                        Sizes dilation, std::string_view activation) {
    return activate(Convolution(x, weight, bias, stride, padding, dilation)(), activation_of(activation));
  }

  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                    Sizes stride, Sizes padding, Sizes dilation, std::string_view activation) {
    const Convolution convolution(x, weight, bias, stride, padding, dilation);
    const Activation kind = activation_of(activation);
    const Tensor inner = kind == Activation::none ? grad : activate_backward(grad, convolution(), kind);
    auto [grad_x, grad_weight] = convolution_gradients(inner, convolution.x, weight, convolution.stride,
                                                       convolution.padding, convolution.dilation, x.sym_size(1), false);
    if (convolution.padded) {
      grad_x = grad_x.narrow_symint(2, padding[2], x.sym_size(2)).narrow_symint(3, padding[0], x.sym_size(3));
    }
    const Tensor none = at::empty({0}, x.options());
    return {grad_x, grad_weight, bias.has_value() ? inner.sum({0, 2, 3}).to(bias->scalar_type()) : none};
  }

  static DepthwiseConv2dShape shape(const Tensor& x, const Tensor& weight, const Tensor& y, Sizes stride, Sizes padding,
                                    Sizes dilation) {
    const auto number = [](const c10::SymInt& value) { return value.expect_int(); };
    return {x.size(0),           x.size(1),          weight.size(0) / x.size(1),
            x.size(2),           x.size(3),          y.size(2),
            y.size(3),           weight.size(2),     weight.size(3),
            number(stride[0]),   number(stride[1]),  number(dilation[0]),
            number(dilation[1]), number(padding[2]), number(padding[0])};
  }

  // One format for all maps of a call: with a single channel a map is a plane only if the other is one, too.
  static at::MemoryFormat common_format(const Tensor& x, const Tensor& y) {
    return x.size(1) == 1 && y.size(1) == 1 ? at::MemoryFormat::Contiguous : memory_format(x);
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                  Sizes stride, Sizes padding, Sizes dilation, std::string_view activation) {
    run_with_sums(kernel, y, nullptr, x, weight, bias, stride, padding, dilation, activation);
  }
  static void run_with_sums(const Call& kernel, const Tensor& y, void* sums, const Tensor& x, const Tensor& weight,
                            const MaybeTensor& bias, Sizes stride, Sizes padding, Sizes dilation,
                            std::string_view activation) {
    const Tensor w = weight.contiguous();
    const MaybeTensor b = bias.has_value() ? MaybeTensor(bias->contiguous()) : bias;
    const auto format = common_format(x, y);
    const Walk from(x, format), to(y, format);
    kernel(DepthwiseConv2dArgs{dtype_of(x),
                               shape(x, weight, y, stride, padding, dilation),
                               {dtype_of(w), w.const_data_ptr(), data_of(b), activation_of(activation)},
                               from.map,
                               to.map,
                               sums});
  }

  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x, const Tensor& weight,
                           const MaybeTensor& bias, Sizes stride, Sizes padding, Sizes dilation,
                           std::string_view activation) {
    const Tensor w = weight.contiguous();
    const MaybeTensor b = bias.has_value() ? MaybeTensor(bias->contiguous()) : bias;
    const auto format = common_format(x, grad);
    const Walk gradient(grad, format), from(x, format), to(grads[0], format);
    kernel(DepthwiseConv2dBackwardArgs{dtype_of(x),
                                       shape(x, weight, grad, stride, padding, dilation),
                                       {dtype_of(w), w.const_data_ptr(), data_of(b), activation_of(activation)},
                                       gradient.map,
                                       from.map,
                                       to.map,
                                       grads[1].data_ptr(),
                                       bias.has_value() ? grads[2].data_ptr() : nullptr});
  }
};

CONVBLOCKS_REGISTER(DepthwiseConv2d)

// The same with a second output, the sum of each plane of the first one, (N, C): what a squeeze-and-excitation behind it
// asks for, without another pass. The gradient of a sum is the same in all its pixels: it adds to that of the output.
template <class Formula = decltype(&DepthwiseConv2d::formula)>
struct WithSums;

template <class... Args>
struct WithSums<Tensor (*)(Args...)> {
  using Plain = Operator<DepthwiseConv2d>;
  using Outputs = std::tuple<Tensor, Tensor>;
  static constexpr const char* name = "depthwise_conv2d_sums";

  static Outputs call(Args... args) {
    static auto op = c10::Dispatcher::singleton()
                         .findSchemaOrThrow("convblocks::depthwise_conv2d_sums", "")
                         .typed<Outputs(Args...)>();
    return op.call(args...);
  }
  static auto dtype(const Tensor& y) { return at::toOpMathType(y.scalar_type()); }
  static Outputs formula(Args... args) {
    const Tensor y = Plain::call(args...);
    return {y, at::sum(y, {2, 3}, false, dtype(y))};
  }
  static Tensor empty_sums(const Tensor& y) {
    return at::empty_symint({y.sym_size(0), y.sym_size(1)}, y.options().dtype(dtype(y)));
  }
  static Outputs forward(Args... args) {
    const Tensor& x = Plain::first(args...);
    if (is_empty(x) || !Plain::forward_slot.on(x)) return formula(args...);
    DepthwiseConv2d::check(args...);
    c10::DeviceGuard guard(x.device());
    const Tensor y = Plain::empty_output(args...), sums = empty_sums(y);
    DepthwiseConv2d::run_with_sums(Call(name, Plain::forward_slot, x), y, sums.data_ptr(), args...);
    return {y, sums};
  }
  static Outputs meta(Args... args) {
    const Tensor y = Plain::meta(args...);
    return {y, empty_sums(y)};
  }

  struct Sum : torch::autograd::Function<Sum> {
    static Tensor forward(AutogradContext* ctx, const Tensor& y, const Tensor* sums) {
      ctx->saved_data["size"] = c10::IValue(y.sym_sizes());
      ctx->saved_data["dtype"] = y.scalar_type();
      return *sums;
    }
    static variable_list backward(AutogradContext* ctx, variable_list grad) {
      const auto size = ctx->saved_data["size"].toSymIntVector();
      return {grad[0].to(ctx->saved_data["dtype"].toScalarType()).unsqueeze(-1).unsqueeze(-1).expand_symint(size),
              Tensor()};
    }
  };
  static Outputs autograd(Args... args) {
    if (under_transform() || (has_tangent(args) || ...)) return formula(args...);
    const auto compute = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call(args...);
    };
    const auto [y, sums] = compute();
    if (!(at::GradMode::is_enabled() && (wants_grad(args) || ...))) return {y, sums};
    const Tensor output = Node<DepthwiseConv2d>::apply(&y, args...);
    return {output, Sum::apply(output, &sums)};
  }
  template <at::DeviceType kDevice>
  static Outputs autocast(Args... args) {
    c10::impl::ExcludeDispatchKeyGuard guard(autocast_key(kDevice));
    return call(in_autocast_dtype(args, kDevice)...);
  }
};
using Sums = WithSums<>;

TORCH_LIBRARY_FRAGMENT(convblocks, m) {
  const std::string schema(DepthwiseConv2d::schema);
  const std::string outputs = schema.substr(0, schema.rfind("->")) + "-> (Tensor, Tensor)";
  define_once(m, Sums::name, outputs.c_str(), {at::Tag::pt2_compliant_tag, at::Tag::flexible_layout});
}
TORCH_LIBRARY_IMPL(convblocks, CPU, m) { m.impl(Sums::name, Sums::forward); }
TORCH_LIBRARY_IMPL(convblocks, CUDA, m) { m.impl(Sums::name, Sums::forward); }
TORCH_LIBRARY_IMPL(convblocks, CompositeExplicitAutograd, m) { m.impl(Sums::name, Sums::formula); }
TORCH_LIBRARY_IMPL(convblocks, Meta, m) { m.impl(Sums::name, Sums::meta); }
TORCH_LIBRARY_IMPL(convblocks, Autograd, m) { m.impl(Sums::name, Sums::autograd); }
TORCH_LIBRARY_IMPL(convblocks, AutocastCPU, m) { m.impl(Sums::name, Sums::autocast<at::kCPU>); }
TORCH_LIBRARY_IMPL(convblocks, AutocastCUDA, m) { m.impl(Sums::name, Sums::autocast<at::kCUDA>); }
TORCH_LIBRARY_IMPL(convblocks, FuncTorchBatched, m) { m.impl(Sums::name, Sums::formula); }

}  // namespace convblocks
