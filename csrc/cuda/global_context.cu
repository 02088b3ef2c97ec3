// Global context on CUDA. Forward: the pass that pools, the transforms, the pass that applies them. Backward: the pass
// that pools and sums grad * x and grad, the transforms and their gradients, and the pass that writes grad_x.
#include "../global_context.h"

#include "context_pool.h"
#include "squeeze.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = kContextThreads;

// A transform of the contexts of all samples, and what its gradients are made of.
template <class T>
struct Transform {
  using A = Acc<T>;
  int64_t samples, c, r;
  Parameter<T> w1, b1, norm_weight, norm_bias, w2, b2;
  double eps;
  Activation activation;
  A *hidden, *unit, *normed, *active, *grad_normed, *grad_hidden;  // [sample][r]
  A* rate;                                                         // [sample]: 1 / the deviation of hidden
  A* slope;                                                        // [sample][c]: the gradient of what it gives

  Transform(const ContextWeights& w, const ContextTransform& t, int64_t n, int64_t channels, Workspace<A>& workspace)
      : samples(n), c(channels), r(t.reduced), eps(w.eps), activation(w.activation) {
    set(t, w.dtype);
    for (A** array : {&hidden, &unit, &normed, &active, &grad_normed, &grad_hidden}) *array = workspace.take(n * r);
    rate = workspace.take(r ? n : 0);
    slope = workspace.take(r ? n * c : 0);
  }
  void set(const ContextTransform& t, Dtype dtype) {
    w1 = {t.w1, dtype};
    b1 = {t.b1, dtype};
    norm_weight = {t.norm_weight, dtype};
    norm_bias = {t.norm_bias, dtype};
    w2 = {t.w2, dtype};
    b2 = {t.b2, dtype};
  }
  static int64_t size(const ContextTransform& t, int64_t n, int64_t c) {
    return t.reduced ? n * (6 * t.reduced + c + 1) : 0;
  }
};

// For each row of a matrix and each sample a warp: the row times the sample's input.
template <class T>
__device__ Acc<T> product(const Parameter<T>& w, int64_t row, int64_t columns, const Acc<T>* input) {
  Acc<T> sum = 0;
  for (int64_t i = threadIdx.x; i < columns; i += 32) sum += w[row * columns + i] * input[i];
  return warp_reduce(sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) hidden_kernel(Transform<T> t, const Acc<T>* contexts) {
  const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, sample = item / t.r, row = item % t.r;
  if (sample >= t.samples) return;
  const Acc<T> sum = product(t.w1, row, t.c, contexts + sample * t.c);
  if (threadIdx.x == 0) t.hidden[item] = sum + t.b1[row];
}

// A block for each sample. In double: few numbers, of which little may be left when the mean and what goes along with them
// is taken away.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) norm_kernel(Transform<T> t) {
  using A = Acc<T>;
  CB_DYN_SHARED(double, shared);
  const int64_t first = blockIdx.x * t.r;
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < t.r; i += kThreads) sum[0] += t.hidden[first + i];
  team_reduce(sum, 1, shared);
  const double mean = sum[0] / double(t.r);
  double square[1] = {};
  for (int64_t i = threadIdx.x; i < t.r; i += kThreads) {
    const double d = t.hidden[first + i] - mean;
    square[0] += d * d;
  }
  team_reduce(square, 1, shared);
  const double rate = 1 / std::sqrt(square[0] / double(t.r) + t.eps);
  for (int64_t i = threadIdx.x; i < t.r; i += kThreads) {
    const double value = (t.hidden[first + i] - mean) * rate;
    const A unit = static_cast<A>(value), normed = static_cast<A>(value * t.norm_weight[i] + t.norm_bias[i]);
    t.unit[first + i] = unit;
    t.normed[first + i] = normed;
    t.active[first + i] = activate(normed, t.activation);
  }
  if (threadIdx.x == 0) t.rate[blockIdx.x] = static_cast<A>(rate);
}

// What becomes of the transforms' numbers: the gate, or the shift; with `dot`, which is the gradient of the gate, the
// slope of the logit.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    output_kernel(Transform<T> t, bool gated, Gate gate, const Acc<T>* dot, Acc<T>* out) {
  using A = Acc<T>;
  const int64_t item = int64_t{blockIdx.x} * blockDim.y + threadIdx.y, sample = item / t.c, channel = item % t.c;
  if (sample >= t.samples) return;
  const A logit = product(t.w2, channel, t.r, t.active + sample * t.r) + t.b2[channel];
  if (threadIdx.x != 0) return;
  const A value = gated ? apply_gate(logit, gate) : logit;
  out[item] = value;
  if (dot) t.slope[item] = gate_grad(dot[item], logit, value, gate);
}

// The gradient of the normed numbers: a block for each sample and 32 of them.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) normed_grad_kernel(Transform<T> t) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const int64_t groups = ceil_div(t.r, 32), sample = blockIdx.x / groups;
  const int64_t i = blockIdx.x % groups * 32 + threadIdx.x % 32;
  A sum[1] = {};
  if (i < t.r) {
    for (int64_t c = threadIdx.x / 32; c < t.c; c += kThreads / 32)
      sum[0] += t.w2[c * t.r + i] * t.slope[sample * t.c + c];
  }
  team_reduce(sum, 32, shared);
  if (threadIdx.x < 32 && i < t.r) {
    t.grad_normed[sample * t.r + i] = activation_grad(sum[0], t.normed[sample * t.r + i], t.activation);
  }
}

// Back through the norm: a block for each sample.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) norm_grad_kernel(Transform<T> t) {
  CB_DYN_SHARED(double, shared);
  const int64_t first = blockIdx.x * t.r;
  double sums[2] = {};
  for (int64_t i = threadIdx.x; i < t.r; i += kThreads) {
    const double d = double(t.grad_normed[first + i]) * double(t.norm_weight[i]);
    sums[0] += d;
    sums[1] += d * t.unit[first + i];
  }
  team_reduce(sums, 1, shared);
  const double mean = sums[0] / double(t.r), along = sums[1] / double(t.r), rate = t.rate[blockIdx.x];
  for (int64_t i = threadIdx.x; i < t.r; i += kThreads) {
    const double d = double(t.grad_normed[first + i]) * double(t.norm_weight[i]);
    const double left = t.r == 1 ? 0 * d : d - mean - t.unit[first + i] * along;  // a norm of one number has none
    t.grad_hidden[first + i] = static_cast<Acc<T>>(rate * left);
  }
}

// The gradients of the contexts, which are added to where `add` says so, and of the transform's parameters: a thread
// for each number. `grads` has the parameters' gradients in their place.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(Transform<T> t, Transform<T> grads, const Acc<T>* contexts, Acc<T>* grad_contexts, bool add) {
  using A = Acc<T>;
  int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const auto over_samples = [&](auto f) {
    A sum = 0;
    for (int64_t s = 0; s < t.samples; s++) sum += f(s);
    return sum;
  };
  if (i < t.samples * t.c) {
    const int64_t sample = i / t.c, c = i % t.c;
    A sum = add ? grad_contexts[i] : A(0);
    for (int64_t k = 0; k < t.r; k++) sum += t.grad_hidden[sample * t.r + k] * t.w1[k * t.c + c];
    grad_contexts[i] = sum;
    return;
  }
  i -= t.samples * t.c;
  if (i < t.r * t.c) {
    const int64_t row = i / t.c, c = i % t.c;
    return grads.w1.set(i,
                        over_samples([&](int64_t s) { return t.grad_hidden[s * t.r + row] * contexts[s * t.c + c]; }));
  }
  i -= t.r * t.c;
  if (i < t.c * t.r) {
    const int64_t c = i / t.r, column = i % t.r;
    return grads.w2.set(i, over_samples([&](int64_t s) { return t.slope[s * t.c + c] * t.active[s * t.r + column]; }));
  }
  i -= t.c * t.r;
  if (i < t.c) return grads.b2.set(i, over_samples([&](int64_t s) { return t.slope[s * t.c + i]; }));
  i -= t.c;
  if (i >= t.r) return;
  grads.b1.set(i, over_samples([&](int64_t s) { return t.grad_hidden[s * t.r + i]; }));
  grads.norm_bias.set(i, over_samples([&](int64_t s) { return t.grad_normed[s * t.r + i]; }));
  grads.norm_weight.set(i, over_samples([&](int64_t s) { return t.grad_normed[s * t.r + i] * t.unit[s * t.r + i]; }));
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2) fill_kernel(A* out, int64_t n, A value) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < n) out[i] = value;
}

// Adds up the shares in the gradients of the attention's weight and bias. Attention does not change with its bias: its
// gradient is 0, or not a number.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    attention_grad_kernel(const Acc<T>* shares, int64_t count, int channels, Parameter<T> weight, Parameter<T> bias) {
  const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (i > channels) return;
  Acc<T> sum = 0;
  for (int64_t s = 0; s < count; s++) sum += shares[s * (channels + 1) + i];
  if (i < channels)
    weight.set(i, sum);
  else if (bias)
    bias.set(0, 0 * sum);
}

template <class T>
class GlobalContext {
 public:
  using A = Acc<T>;

  GlobalContext(const Context& context, int64_t n, int64_t c, int64_t hw, const ContextWeights& w)
      : context_(context), w_(w), n_(n), c_(c), hw_(hw), weight_(w.attn_weight, w.dtype), bias_(w.attn_bias, w.dtype) {}

  template <size_t K>
  const char* prepare(const Map (&maps)[K]) {
    return find_layout<T>(n_, c_, hw_, maps, layout_);
  }

  void forward(const GlobalContextArgs& args) {
    const ContextTiling tiling = ContextTiling::make<T>(layout_, c_, hw_, 1, 1);
    Workspace<A> workspace(context_, size(tiling, 1));
    Transform<T> scale = transform(kScale, workspace), add = transform(kAdd, workspace);
    A *const contexts = workspace.take(n_ * c_), *const scales = workspace.take(n_ * c_);
    A *const shifts = workspace.take(n_ * c_), *const numbers = workspace.take(2 * n_);
    pool<false>(tiling, args.x, args.x, workspace, contexts, nullptr, nullptr, numbers);
    if (scale.r)
      run(scale, contexts, true, nullptr, scales);
    else
      fill(scales, A(1));
    if (add.r)
      run(add, contexts, false, nullptr, shifts);
    else
      fill(shifts, A(0));
    change(args.x, args.y, scales, shifts, A(1));
  }

  void backward(const GlobalContextBackwardArgs& args) {
    const ContextTiling tiling = ContextTiling::make<T>(layout_, c_, hw_, 2, 3);
    Workspace<A> workspace(context_, size(tiling, 3) + int64_t{tiling.blocks()} * (c_ + 1));
    Transform<T> scale = transform(kScale, workspace), add = transform(kAdd, workspace);
    A *const contexts = workspace.take(n_ * c_), *const scales = workspace.take(n_ * c_);
    A *const grad_contexts = workspace.take(n_ * c_), *const numbers = workspace.take(2 * n_);
    A *const dot = workspace.take(n_ * c_), *const sum = add.r ? add.slope : workspace.take(n_ * c_);
    pool<true>(tiling, args.x, args.grad, workspace, contexts, dot, sum, numbers);
    if (scale.r) {
      run(scale, contexts, true, dot, scales);
      run_backward(scale, args.grads.transforms[kScale], contexts, grad_contexts, false);
    } else {
      fill(scales, A(1));
    }
    if (add.r) {
      run(add, contexts, false, nullptr, nullptr);
      run_backward(add, args.grads.transforms[kAdd], contexts, grad_contexts, scale.r != 0);
    }
    if (!weight_) return change(args.grad, args.grad_x, scales, grad_contexts, A(1) / A(hw_));
    A* const shares = workspace.take(int64_t{tiling.blocks()} * (c_ + 1));
    launch(context_gradient_kernel<T>, tiling.blocks(), dim3(kThreads), tiling.bytes, args.x, args.grad, args.grad_x,
           weight_, bias_, tiling, static_cast<const A*>(scales), static_cast<const A*>(contexts),
           static_cast<const A*>(grad_contexts), static_cast<const A*>(numbers), shares);
    launch(attention_grad_kernel<T>, ceil_div(c_ + 1, kThreads), dim3(kThreads), 0, static_cast<const A*>(shares),
           int64_t{tiling.blocks()}, static_cast<int>(c_), Parameter<T>(args.grads.attn_weight, w_.dtype),
           Parameter<T>(args.grads.attn_bias, w_.dtype));
  }

 private:
  int64_t size(const ContextTiling& tiling, int kinds) const {
    return Transform<T>::size(w_.transforms[kScale], n_, c_) + Transform<T>::size(w_.transforms[kAdd], n_, c_) +
           5 * n_ * c_ + 2 * n_ + int64_t{tiling.blocks()} * (kinds * c_ + 2);
  }
  Transform<T> transform(int kind, Workspace<A>& workspace) const {
    return {w_, w_.transforms[kind], n_, c_, workspace};
  }
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, dim3 threads, int64_t bytes,
              const Arguments&... arguments) const {
    if (bytes > 48 << 10) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    }
    CB_LAUNCH(kernel, static_cast<unsigned>(blocks), threads, bytes, stream_of(context_), arguments...);
  }

  template <bool kBackward>
  void pool(const ContextTiling& tiling, const Map& x, const Map& grad, Workspace<A>& workspace, A* contexts, A* dot,
            A* sum, A* numbers) const {
    constexpr int K = kBackward ? 3 : 1;
    const int64_t blocks = tiling.blocks();
    const ContextShares<A> shares{workspace.take(blocks), workspace.take(blocks), workspace.take(blocks * K * c_)};
    launch(context_pool_kernel<T, kBackward>, blocks, dim3(kThreads), tiling.bytes, x, grad, weight_, bias_, tiling,
           shares);
    launch(context_merge_kernel<A>, n_, dim3(kThreads), 0, shares, tiling.splits, K, static_cast<int>(c_), contexts,
           dot, sum, numbers);
  }
  // `out` null: as far as the gradients of what follows need it.
  void run(const Transform<T>& t, const A* contexts, bool gated, const A* dot, A* out) const {
    const dim3 warps(32, kThreads / 32);
    launch(hidden_kernel<T>, ceil_div(n_ * t.r, kThreads / 32), warps, 0, t, contexts);
    launch(norm_kernel<T>, n_, dim3(kThreads), kThreads / 32 * sizeof(double), t);
    if (out) launch(output_kernel<T>, ceil_div(n_ * c_, kThreads / 32), warps, 0, t, gated, w_.gate, dot, out);
  }
  void run_backward(const Transform<T>& t, const ContextTransform& grads, const A* contexts, A* grad_contexts,
                    bool add) const {
    launch(normed_grad_kernel<T>, n_ * ceil_div(t.r, 32), dim3(kThreads), kThreads * sizeof(A), t);
    launch(norm_grad_kernel<T>, n_, dim3(kThreads), kThreads / 32 * 2 * sizeof(double), t);
    Transform<T> g = t;
    g.set(grads, w_.dtype);
    launch(gradients_kernel<T>, ceil_div(n_ * c_ + 2 * t.r * c_ + c_ + t.r, kThreads), dim3(kThreads), 0, t, g,
           contexts, grad_contexts, add);
  }
  void fill(A* out, A value) const {
    launch(fill_kernel<A>, ceil_div(n_ * c_, kThreads), dim3(kThreads), 0, out, n_ * c_, value);
  }
  // out = in * scale + shift * factor
  void change(const Map& in, const Map& out, const A* scales, const A* shifts, A factor) const {
    Changes<T> changes;
    changes.values = shifts;
    changes.gates = scales;
    changes.pooled.mean_scale = factor;
    apply<T>(context_, layout_, in, in, out, changes);
  }

  const Context& context_;
  const ContextWeights& w_;
  int64_t n_, c_, hw_;
  Parameter<T> weight_, bias_;
  Layout layout_;
};

}  // namespace
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_global_context(const Context& context, const GlobalContextArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) {
    cuda::GlobalContext<T> op(context, args.n, args.c, args.hw, args.weights);
    if (const char* error = op.prepare({args.x, args.y})) return error;
    op.forward(args);
    return cuda::launch_error();
  });
}

const char* convblocks_global_context_backward(const Context& context, const GlobalContextBackwardArgs& args) {
  if (args.n * args.c * args.hw == 0) return nullptr;
  return cuda::dispatch(args.dtype, [&]<class T>(T) {
    cuda::GlobalContext<T> op(context, args.n, args.c, args.hw, args.weights);
    if (const char* error = op.prepare({args.grad, args.x, args.grad_x})) return error;
    op.backward(args);
    return cuda::launch_error();
  });
}
