// Squeeze-and-excitation on the CPU: the passes over the maps are channel_gate.h's, the two small layers are layers.h's.
#include "../squeeze_excite.h"

#include "channel_gate.h"
#include "dispatch.h"
#include "layers.h"

namespace convblocks::cpu {
namespace {

template <class T>
void forward(const Context& context, const SqueezeExciteArgs& a) {
  using A = Acc<T>;
  const Layers<A> layers(context, a.weights, a.c);
  A* hidden = static_cast<A*>(context.workspace(context, std::max<int64_t>(1, a.n * layers.r) * sizeof(A)));
  channel_gate<T>(context, a.n, a.c, a.hw, a.x, a.y, a.weights.add_maxpool,
                  [&](int64_t first, int64_t count, const A* pooled, A* gates, int64_t stride) {
                    A* h = hidden + first * layers.r;
                    layers.forward(count, pooled, h, h, gates, stride, gates, stride);
                  });
}

template <class T>
void backward(const Context& context, const SqueezeExciteBackwardArgs& a) {
  const LayersBackward<Acc<T>> layers(context, a.weights, a.n, a.c);
  channel_gate_backward<T>(context, a.n, a.c, a.hw, a.grad, a.x, a.grad_x, a.weights.add_maxpool, layers);
  layers.weights(a.grad_w1, a.grad_b1, a.grad_w2, a.grad_b2);
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_squeeze_excite(const convblocks::Context& context, const convblocks::SqueezeExciteArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_squeeze_excite_backward(const convblocks::Context& context,
                                               const convblocks::SqueezeExciteBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}
