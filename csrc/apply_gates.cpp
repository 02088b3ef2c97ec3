#include "apply_gates.h"

#include <ATen/ops/sum.h>

#include "op.h"

namespace convblocks {

struct ApplyGates {
  using MaybeTensor = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor>;

  static constexpr const char* name = "apply_gates";
  static constexpr const char* schema = "(Tensor x, Tensor? channel, Tensor? spatial, bool residual) -> Tensor";
  static constexpr const char* backward_schema =
      "(Tensor grad, Tensor x, Tensor? channel, Tensor? spatial, bool residual) -> (Tensor, Tensor, Tensor)";

  static void check(const Tensor& x, const MaybeTensor& channel, const MaybeTensor& spatial, bool) {
    check_feature_map(name, x);
    TORCH_CHECK_TYPE(channel.has_value() || spatial.has_value(), name,
                     ": expected channel or spatial to be a tensor, got None for both");
    const std::vector<c10::SymInt> of_channels{x.sym_size(0), x.sym_size(1), 1, 1};
    const std::vector<c10::SymInt> of_pixels{x.sym_size(0), 1, x.sym_size(2), x.sym_size(3)};
    check_parameter(name, "channel", channel, x, of_channels);
    check_parameter(name, "spatial", spatial, x, of_pixels);
    if (channel.has_value()) check_same_dtype(name, "spatial", spatial, "channel", *channel);
  }
  static Tensor times(const Tensor& t, const MaybeTensor& gate) {
    return gate.has_value() ? t * gate->to(t.scalar_type()) : t;
  }
  static Tensor formula(const Tensor& x, const MaybeTensor& channel, const MaybeTensor& spatial, bool residual) {
    const Tensor y = times(times(x, channel), spatial);
    return residual ? y + x : y;
  }
  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const MaybeTensor& channel,
                                    const MaybeTensor& spatial, bool residual) {
    const Tensor none = at::empty({0}, x.options());
    const auto summed = [&](const MaybeTensor& gate, const MaybeTensor& other, at::IntArrayRef over) {
      return gate.has_value() ? times(grad * x, other).sum(over, true).to(gate->scalar_type()) : none;
    };
    return {formula(grad, channel, spatial, residual), summed(channel, spatial, {2, 3}), summed(spatial, channel, {1})};
  }

  // The gates as the kernels take them, and the copies of the rare ones that are not dense.
  struct Dense {
    MaybeTensor channel, spatial;
    bool residual;
    Dense(const MaybeTensor& c, const MaybeTensor& s, bool r) : channel(c), spatial(s), residual(r) {
      if (channel.has_value()) channel = channel->contiguous();
      if (spatial.has_value()) spatial = spatial->contiguous();
    }
    operator Gates() const {
      return {dtype_of(channel.has_value() ? *channel : *spatial), data_of(channel), data_of(spatial), residual};
    }
  };

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const MaybeTensor& channel,
                  const MaybeTensor& spatial, bool residual) {
    const Dense gates(channel, spatial, residual);
    const auto format = walk_format(x);
    const Walk from(x, format), to(y, format);
    kernel(ApplyGatesArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), gates, from.map, to.map});
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x,
                           const MaybeTensor& channel, const MaybeTensor& spatial, bool residual) {
    const Dense gates(channel, spatial, residual);
    const auto format = walk_format(x);
    const Walk gradient(grad, format), from(x, format), to(grads[0], format);
    kernel(ApplyGatesBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), gates, gradient.map,
                                  from.map, to.map, channel.has_value() ? grads[1].data_ptr() : nullptr,
                                  spatial.has_value() ? grads[2].data_ptr() : nullptr});
  }
};

CONVBLOCKS_REGISTER(ApplyGates)

}  // namespace convblocks
