#include "channel_pool.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eq.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sum.h>

#include "handing_on.h"
#include "op.h"

namespace convblocks {

struct ChannelPool {
  using MaybeTensor = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor>;

  static constexpr const char* name = "channel_pool";
  static constexpr const char* schema = "(Tensor x, Tensor? channel) -> Tensor";
  static constexpr const char* backward_schema = "(Tensor grad, Tensor x, Tensor? channel) -> (Tensor, Tensor)";

  static void check(const Tensor& x, const MaybeTensor& channel) {
    check_feature_map(name, x);
    TORCH_CHECK_VALUE(x.sym_size(1) > 0, name, ": expected at least one channel, got an input of size ", size_of(x));
    const std::vector<c10::SymInt> size{x.sym_size(0), x.sym_size(1), 1, 1};
    check_parameter(name, "channel", channel, x, size);
  }
  static std::vector<c10::SymInt> output_size(const Tensor& x, const MaybeTensor&) {
    return {x.sym_size(0), 2, x.sym_size(2), x.sym_size(3)};
  }

  static Tensor gated(const Tensor& x, const MaybeTensor& channel) {
    return channel.has_value() ? x * channel->to(x.scalar_type()) : x;
  }
  static Tensor formula(const Tensor& x, const MaybeTensor& channel) {
    const Tensor v = gated(x, channel);
    return at::cat({v.mean({1}, true), v.amax({1}, true)}, 1);
  }
  static Gradients backward_formula(const Tensor& grad, const Tensor& x, const MaybeTensor& channel) {
    const Tensor v = gated(x, channel), is_max = at::eq(v, v.amax({1}, true)).to(x.scalar_type());
    const Tensor dv =
        grad.narrow(1, 0, 1) / at::Scalar(x.sym_size(1)) + grad.narrow(1, 1, 1) * is_max / is_max.sum({1}, true);
    if (!channel.has_value()) return {dv, at::empty({0}, x.options())};
    return {gated(dv, channel), (dv * x).sum({2, 3}, true).to(channel->scalar_type())};
  }

  static MaybeTensor dense(const MaybeTensor& channel) {
    return channel.has_value() ? MaybeTensor(channel->contiguous()) : channel;
  }

  static int64_t memory_size(const Tensor& x, const MaybeTensor&) { return 2 * x.size(0) * x.size(2) * x.size(3); }

  static void run(const Call& kernel, const Tensor& y, const Tensor& x, const MaybeTensor& channel) {
    const MaybeTensor gates = dense(channel);
    const auto format = memory_format(x);
    const Walk from(x, format), to(y, format);
    kernel(ChannelPoolArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3), dtype_of(gates.value_or(x)),
                           data_of(gates), from.map, to.map, Memory::keep(x, memory_size(x, channel))});
  }
  static void run_backward(const Call& kernel, Grads& grads, const Tensor& grad, const Tensor& x,
                           const MaybeTensor& channel) {
    const MaybeTensor gates = dense(channel);
    const auto format = memory_format(x);
    const Walk gradient(grad, format), from(x, format), to(grads[0], format);
    kernel(ChannelPoolBackwardArgs{dtype_of(x), x.size(0), x.size(1), x.size(2) * x.size(3),
                                   dtype_of(gates.value_or(x)), data_of(gates), gradient.map, from.map, to.map,
                                   Memory::kept(x, memory_size(x, channel)),
                                   channel.has_value() ? grads[1].data_ptr() : nullptr});
  }
};

CONVBLOCKS_REGISTER(ChannelPool)
CONVBLOCKS_REGISTER_HANDING_ON(ChannelPool)

}  // namespace convblocks
