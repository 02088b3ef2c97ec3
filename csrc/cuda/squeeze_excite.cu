// Squeeze-and-excitation on CUDA. Forward: a pass that pools, the small matrix products, and a pass that applies the
// gates; where the last product is small the blocks of that pass do it. Backward: a pass that sums x and grad * x, the
// products and their gradients, and the pass that writes grad_x.
#include "../squeeze_excite.h"

#include "layers.h"

namespace convblocks::cuda {
namespace {

constexpr int kSamples = 4;  // of few planes

template <class T>
class SqueezeExcite {
 public:
  using A = Acc<T>;

  SqueezeExcite(const Context& context, int64_t n, int64_t c, int64_t hw, const SqueezeExciteWeights& w, bool backward)
      : context_(context), w_(w), layers_(context, n, c, w), n_(n), c_(c), hw_(hw), backward_(backward) {}

  template <size_t K>
  const char* prepare(const Map (&maps)[K]) {
    return find_layout<T>(n_, c_, hw_, maps, layout_);
  }

  void forward(const SqueezeExciteArgs& args) const {
    const Tiling tiling = sum_tiling(layout_);
    Workspace<A> workspace(context_, size(tiling));
    const Pooled<A> pooled(workspace, n_ * c_, hw_, tiling.chunks, false, w_.add_maxpool);
    pool<T>(context_, layout_, tiling, args.x, nullptr, pooled);
    const Pooled<A> input = layers_.hidden(workspace, pooled);
    Changes<T> changes;
    // The blocks that apply the gates read a row of w2 for each plane: less than the plane, or else few planes in all.
    if (w_.reduced && (w_.reduced <= hw_ || n_ <= kSamples)) {
      const Layer<T> last = layers_.second();
      changes.linear = {last.weight, last.bias, input, static_cast<int>(w_.reduced), static_cast<int>(w_.reduced)};
      changes.gate = w_.gate;
    } else {
      changes.values = layers_.gates(workspace, input);
    }
    apply<T>(context_, layout_, args.x, args.x, args.y, changes);
  }

  void backward(const SqueezeExciteBackwardArgs& args) const {
    const Tiling tiling = sum_tiling(layout_);
    Workspace<A> workspace(context_, size(tiling));
    const Pooled<A> pooled(workspace, n_ * c_, hw_, tiling.chunks, true, w_.add_maxpool);
    pool<T>(context_, layout_, tiling, args.x, &args.grad, pooled);
    const auto [gates, squeezed] =
        layers_.backward(workspace, pooled, pooled, {args.grad_w1, args.grad_b1, args.grad_w2, args.grad_b2});
    Changes<T> changes;
    changes.values = squeezed;
    changes.gates = gates;
    changes.pooled = pooled;
    apply<T>(context_, layout_, args.grad, args.x, args.grad_x, changes);
  }

 private:
  int64_t size(const Tiling& tiling) const {
    return Pooled<A>::size(n_ * c_, tiling.chunks, backward_, w_.add_maxpool) + layers_.size(backward_);
  }

  const Context& context_;
  const SqueezeExciteWeights& w_;
  Layers<T> layers_;
  int64_t n_, c_, hw_;
  bool backward_;
  Layout layout_;
};

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_squeeze_excite(const Context& context, const SqueezeExciteArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) {
    cuda::SqueezeExcite<T> op(context, args.n, args.c, args.hw, args.weights, false);
    if (const char* error = op.prepare({args.x, args.y})) return error;
    op.forward(args);
    return cuda::launch_error();
  });
}

const char* convblocks_squeeze_excite_backward(const Context& context, const SqueezeExciteBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) {
    cuda::SqueezeExcite<T> op(context, args.n, args.c, args.hw, args.weights, true);
    if (const char* error = op.prepare({args.grad, args.x, args.grad_x})) return error;
    op.backward(args);
    return cuda::launch_error();
  });
}
