// Channel attention on CUDA: a pass that pools, and the products. Backward: the same, their gradients, and the pass that
// writes grad_x.
#include "../channel_attention.h"

#include "layers.h"

namespace convblocks::cuda {
namespace {

template <class T>
const char* forward(const Context& context, const ChannelAttentionArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x}, layout)) return error;
  const Tiling tiling = sum_tiling(layout);
  const Layers<T> layers(context, args.n, args.c, args.weights, 2);
  const int64_t planes = args.n * args.c;
  Workspace<A> workspace(context, Pooled<A>::size(planes, tiling.chunks, false, true, true) + layers.size(false));
  const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, false, true, true);
  pool<T>(context, layout, tiling, args.x, nullptr, pooled);
  layers.write_gates(layers.hidden(workspace, pooled), args.y);
  return launch_error();
}

template <class T>
const char* backward(const Context& context, const ChannelAttentionBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.grad_x}, layout)) return error;
  const Tiling tiling = sum_tiling(layout);
  const Layers<T> layers(context, args.n, args.c, args.weights, 2);
  const int64_t planes = args.n * args.c;
  Workspace<A> workspace(context, Pooled<A>::size(planes, tiling.chunks, true, true, true) + layers.size(true));
  const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, true, true, true);
  pool<T>(context, layout, tiling, args.x, nullptr, pooled);
  Changes<T> changes;
  changes.values =
      layers.backward(workspace, pooled, pooled, {args.grad_w1, args.grad_b1, args.grad_w2, args.grad_b2}, args.grad)
          .squeezed;
  changes.pooled = pooled;
  apply<T>(context, layout, Map{}, args.x, args.grad_x, changes);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_channel_attention(const Context& context, const ChannelAttentionArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::forward<T>(context, args); });
}

const char* convblocks_channel_attention_backward(const Context& context, const ChannelAttentionBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::backward<T>(context, args); });
}
