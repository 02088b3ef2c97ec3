#include "partial_conv2d.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>

#include "convolves.h"
#include "op.h"
#include "shuffle_call.h"

namespace convblocks {

struct PartialConv2d {
  using Gradients = std::tuple<Tensor, Tensor>;

  static constexpr const char* name = "partial_conv2d";
  static constexpr const char* schema = "(Tensor x, Tensor weight) -> Tensor";
  static constexpr const char* backward_schema = "(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)";
  static constexpr bool autocasts = true;

  static void check(const Tensor& x, const Tensor& weight) {
    check_feature_map(name, x);
    TORCH_CHECK_TYPE(weight.defined(), name, ": expected weight to be a tensor, got None");
    check_parameter(name, "weight", weight, x);
    TORCH_CHECK_VALUE(x.sym_size(2) * x.sym_size(3) > 0, name, ": expected at least one pixel, got an input of size ",
                      size_of(x));
    const auto c = x.sym_size(1);
    const bool partial = weight.dim() == 4 && weight.sym_size(0) == weight.sym_size(1) && weight.sym_size(0) > 0 &&
                         weight.sym_size(0) <= c && weight.sym_size(2) == weight.sym_size(3) &&
                         weight.sym_size(2) % 2 == 1;
    TORCH_CHECK_VALUE(partial, name, ": expected weight of size [p, p, k, k] with p at most ", c, " and an odd k, got ",
                      size_of(weight));
  }

  static Tensor first(const Tensor& t, const Tensor& weight) { return t.narrow_symint(1, 0, weight.sym_size(0)); }
  static Tensor rest(const Tensor& t, const Tensor& weight) {
    return t.narrow_symint(1, weight.sym_size(0), t.sym_size(1) - weight.sym_size(0));
  }
  static Tensor convolved(const Tensor& x, const Tensor& weight) {
    const auto padding = weight.sym_size(2) / 2;
    return at::convolution_symint(first(x, weight), weight.to(x.scalar_type()), {}, {1, 1}, {padding, padding}, {1, 1},
                                  false, {0, 0}, 1);
  }
  // The gradients of the first channels and of the weight.
  static Gradients convolved_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, bool real) {
    const std::vector<c10::SymInt> one{1, 1}, padding(2, weight.sym_size(2) / 2);
    return convolution_gradients(first(grad, weight), first(x, weight), weight, one, padding, one, 1, real);
  }

  // In the layout in which torch's convolution on the CPU was measured to be faster: few channels lie together, many in
  // planes.
  static Tensor arranged(const Tensor& t, const Tensor& weight) {
    const auto channels = weight.size(0);
    if (!t.is_cpu() || t.scalar_type() == at::kDouble || (channels >= 64 && channels < 256)) return t;
    const auto format = channels < 64 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
    return first(t, weight).contiguous(format);
  }

  static Tensor formula(const Tensor& x, const Tensor& weight) {
    return at::cat({convolved(x, weight), rest(x, weight)}, 1);
  }
  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const Tensor& weight) {
    const auto [grad_first, grad_weight] = convolved_backward(grad, x, weight, false);
    return {at::cat({grad_first, rest(grad, weight)}, 1), grad_weight};
  }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const Tensor& weight) {
    const auto call = [&](const DenseConv2dArgs* conv) {
      return [&kernel, conv](const ShuffleArgs& pieces) { kernel(PartialConv2dArgs{conv, pieces}); };
    };
    if (!kernels_convolve(x)) {
      return call_shuffle(call(nullptr), y, {convolved(arranged(x, weight), weight), rest(x, weight)}, 1, false);
    }
    const auto format = walk_format(x);
    // From a slice of x into a slice of y; a single channel that is left would be walked as a plane.
    const bool direct = x.size(1) - weight.size(0) != 1;
    const Tensor w = weight.contiguous(), from = first(x, weight);
    const Tensor to = direct ? first(y, weight) : at::empty_like(from, from.options(), format);
    const Walk input(from, format), output(to, format);
    const int64_t p = w.size(0), k = w.size(2);
    DenseConv2dArgs conv{};
    conv.dtype = dtype_of(x);
    conv.n = x.size(0), conv.c = conv.out_c = p;
    conv.h = conv.out_h = x.size(2), conv.w = conv.out_w = x.size(3);
    conv.kernel_h = conv.kernel_w = k, conv.top = conv.left = k / 2;
    conv.stride_h = conv.stride_w = conv.dilation_h = conv.dilation_w = 1;
    conv.weight = w.const_data_ptr();
    conv.activation = Activation::none;
    conv.planes = format != at::MemoryFormat::ChannelsLast;
    conv.x = input.map, conv.y = output.map;
    if (direct) {
      call_shuffle(call(&conv), rest(y, weight), {rest(x, weight)}, 1, false);
    } else {
      kernel(PartialConv2dArgs{&conv, {}});
      call_shuffle(call(nullptr), y, {output.tensor, rest(x, weight)}, 1, false);
    }
    if (direct && !output.tensor.is_same(to)) to.copy_(output.tensor);
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x,
                           const Tensor& weight) {
    const auto [grad_first, grad_weight] =
        convolved_backward(arranged(grad, weight), arranged(x, weight), weight, true);
    take_grad(grads[1], grad_weight);
    call_shuffle(kernel, grads[0], {grad_first, rest(grad, weight)}, 1, false);
  }
};

CONVBLOCKS_REGISTER(PartialConv2d)

}  // namespace convblocks
