// ECA on CUDA. Forward: a pass that pools, and a pass that applies the gates, which each block computes for its
// channels. Backward: a pass that sums x and grad * x, the gradients of gates and filter, and the pass that writes
// grad_x.
#include "../eca.h"

#include "squeeze.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256;

// The gates and the loss's slopes by their logits, and each block's share of the gradients of the taps and the bias:
// [tap][block].
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    eca_slopes_kernel(Linear<T> filter, Gate gate, Acc<T>* gates, Acc<T>* slopes, Acc<T>* shares) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Pooled<A>& pooled = filter.input;
  const int plane = blockIdx.x * kThreads + threadIdx.x;
  const auto [sample, channel] = divide(plane, filter.inputs);
  const bool valid = plane < pooled.planes;
  A slope = 0;
  if (valid) {
    const A logit = filter(sample, channel, 0, 1), gated = apply_gate(logit, gate);
    gates[plane] = gated;
    slope = slopes[plane] = gate_grad(pooled.total(pooled.dot, plane), logit, gated, gate);
  }
  for (int tap = 0; tap <= filter.taps; tap++) {
    A share[1] = {slope};
    if (valid && tap < filter.taps) share[0] *= filter.term(sample, channel, tap);
    team_reduce(share, 1, shared);
    if (threadIdx.x == 0) shares[int64_t{tap} * gridDim.x + blockIdx.x] = share[0];
  }
}

// One block for each tap and one for the bias.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    eca_weights_kernel(Parameter<T> grad_weight, Parameter<T> grad_bias, const Acc<T>* shares, int64_t blocks) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  A total[1] = {};
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) total[0] += shares[blockIdx.x * blocks + i];
  team_reduce(total, 1, shared);
  if (threadIdx.x != 0) return;
  if (blockIdx.x < gridDim.x - 1) {
    grad_weight.set(blockIdx.x, total[0]);
  } else if (grad_bias) {
    grad_bias.set(0, total[0]);
  }
}

template <class T>
Linear<T> filter_of(const EcaWeights& w, int64_t channels, const Pooled<Acc<T>>& input) {
  const auto inputs = static_cast<int>(channels), taps = static_cast<int>(w.kernel);
  return {{w.weight, w.dtype}, {w.bias, w.dtype}, input, inputs, taps, 1, w.circular};
}

template <class T>
const char* run(const Context& context, const EcaArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.x, args.y}, layout)) return error;
  const Tiling tiling = sum_tiling(layout);
  const int64_t planes = args.n * args.c;
  Workspace<A> workspace(context, Pooled<A>::size(planes, tiling.chunks, false, false));
  const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, false, false);
  pool<T>(context, layout, tiling, args.x, nullptr, pooled);
  Changes<T> changes;
  changes.linear = filter_of<T>(args.weights, args.c, pooled);
  changes.gate = args.weights.gate;
  apply<T>(context, layout, args.x, args.x, args.y, changes);
  return launch_error();
}

template <class T>
const char* run_backward(const Context& context, const EcaBackwardArgs& args) {
  using A = Acc<T>;
  Layout layout;
  if (const char* error = find_layout<T>(args.n, args.c, args.hw, {args.grad, args.x, args.grad_x}, layout))
    return error;
  const Tiling tiling = sum_tiling(layout);
  const EcaWeights& w = args.weights;
  const int64_t planes = args.n * args.c, blocks = ceil_div(planes, kThreads), shares = blocks * (w.kernel + 1);
  Workspace<A> workspace(context, Pooled<A>::size(planes, tiling.chunks, true, false) + 2 * planes + shares);
  const Pooled<A> pooled(workspace, planes, args.hw, tiling.chunks, true, false);
  A *gates = workspace.take(planes), *slopes = workspace.take(planes), *share = workspace.take(shares);
  pool<T>(context, layout, tiling, args.x, &args.grad, pooled);

  const size_t shared_bytes = kThreads / 32 * sizeof(A);
  CB_LAUNCH(eca_slopes_kernel<T>, blocks, kThreads, shared_bytes, stream_of(context), filter_of<T>(w, args.c, pooled),
            w.gate, gates, slopes, share);
  CB_LAUNCH(eca_weights_kernel<T>, w.kernel + 1, kThreads, shared_bytes, stream_of(context),
            Parameter<T>(args.grad_weight, w.dtype), Parameter<T>(args.grad_bias, w.dtype), share, blocks);

  Changes<T> changes;
  changes.gates = gates;
  changes.pooled = pooled;
  Pooled<A> slope;
  slope.sum = slopes;
  changes.linear = filter_of<T>(w, args.c, slope);
  changes.linear.slide = -1;
  changes.linear.bias = {};
  apply<T>(context, layout, args.grad, args.x, args.grad_x, changes);
  return launch_error();
}

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_eca(const Context& context, const EcaArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::run<T>(context, args); });
}

const char* convblocks_eca_backward(const Context& context, const EcaBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::run_backward<T>(context, args); });
}
