// Global context on the CPU: the passes over the maps are context_pool.h's, the transforms are here. A sample is pooled
// and changed while it is in the cache.
#include "../global_context.h"

#include "channel_gate.h"
#include "context_gradient.h"
#include "context_pool.h"
#include "dispatch.h"
#include "gate.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

// A transform of the contexts of all samples, and what its gradients are made of.
template <class A>
struct Transform {
  int64_t c, r;
  const A *w1, *b1, *norm_weight, *norm_bias, *w2, *b2;
  Activation activation;
  double eps;
  // (n, r) each. unit: hidden with mean 0 and variance 1; of the three gradients, by_unit is multiplied by it.
  A *unit, *normed, *active, *grad_normed, *by_unit, *grad_hidden;
  A* rate;      // (n): 1 / the deviation of hidden
  A* grad_out;  // (n, c)

  Transform(const Context& context, const ContextWeights& w, const ContextTransform& t, int64_t n, int64_t channels)
      : c(channels), r(t.reduced), activation(w.activation), eps(w.eps) {
    if (!r) return;
    w1 = widened<A>(context, t.w1, w.dtype, r * c);
    b1 = widened<A>(context, t.b1, w.dtype, r);
    norm_weight = widened<A>(context, t.norm_weight, w.dtype, r);
    norm_bias = widened<A>(context, t.norm_bias, w.dtype, r);
    w2 = widened<A>(context, t.w2, w.dtype, c * r);
    b2 = widened<A>(context, t.b2, w.dtype, c);
    A* at = static_cast<A*>(context.workspace(context, n * (6 * r + c + 1) * sizeof(A)));
    for (A** array : {&unit, &normed, &active, &grad_normed, &by_unit, &grad_hidden}) {
      *array = at;
      at += n * r;
    }
    grad_out = at;
    rate = at + n * c;
  }

  // For `count` samples from `first` on: the transforms of their contexts, into `out`; both `stride` apart.
  void forward(int64_t first, int64_t count, const A* contexts, A* out, int64_t stride, int64_t out_stride) const {
    A* const hidden = normed + first * r;
    linear(count, r, c, w1, b1, contexts, stride, hidden, r);
    for (int64_t s = 0; s < count; s++) normalize(first + s, hidden + s * r);
    for_lanes<A>(count * r,
                 [=, to = active + first * r, activation = activation](int64_t i, auto lanes)
                     CONVBLOCKS_LOOP { store(to + i, activate(load(hidden + i, lanes), activation), lanes); });
    linear(count, c, r, w2, b2, active + first * r, r, out, out_stride);
  }

  // From grad_out to the gradient of the contexts, which is added to `grad_contexts`.
  void backward(int64_t first, int64_t count, A* grad_contexts, int64_t stride) const {
    by_groups(count, [&]<int G>(int64_t offset, std::integral_constant<int, G>) {
      const int64_t begin = first + offset;
      sum_rows<G, A>(
          c, r, w2, [&](int64_t i, int g) { return grad_out[(begin + g) * c + i]; },
          [&](int g, int64_t j, auto lanes, Vec<A> sum) {
            const int64_t at = (begin + g) * r + j;
            const Vec<A> grad = activation_backward(sum, load(normed + at, lanes), activation);
            store(grad_normed + at, grad, lanes);
            store(by_unit + at, grad * load(unit + at, lanes), lanes);
          });
      for (int g = 0; g < G; g++) normalize_backward(begin + g);
      sum_rows<G, A>(
          r, c, w1, [&](int64_t i, int g) { return grad_hidden[(begin + g) * r + i]; },
          [&](int g, int64_t j, auto lanes, Vec<A> sum) {
            A* const to = grad_contexts + (offset + g) * stride + j;
            store(to, load(to, lanes) + sum, lanes);
          });
    });
  }

  void gradients(const Context& context, int64_t n, const A* contexts, const ContextTransform& grads,
                 Dtype dtype) const {
    const auto to = [&](void* data, int64_t count) { return Narrowed<A>(context, data, dtype, count); };
    sum_of_products(context, n, c, r, grad_out, active, to(grads.w2, c * r), to(grads.b2, c));
    sum_of_products(context, n, r, c, grad_hidden, contexts, to(grads.w1, r * c), to(grads.b1, r));
    const auto norm_weight = to(grads.norm_weight, r), norm_bias = to(grads.norm_bias, r);
    for (int64_t i = 0; i < r; i++) {
      A weight = 0, bias = 0;
      for (int64_t s = 0; s < n; s++) {
        weight += by_unit[s * r + i];
        bias += grad_normed[s * r + i];
      }
      norm_weight[i] = weight;
      norm_bias[i] = bias;
    }
  }

 private:
  // In double: few numbers, of which little may be left when the mean and what goes along with them is taken away.
  void normalize(int64_t sample, A* hidden) const {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < r; i++) mean += hidden[i];
    mean /= double(r);
    for (int64_t i = 0; i < r; i++) square += (hidden[i] - mean) * (hidden[i] - mean);
    const double scale = 1 / std::sqrt(square / double(r) + eps);
    rate[sample] = static_cast<A>(scale);
    for (int64_t i = 0; i < r; i++) {
      const double value = (hidden[i] - mean) * scale;
      unit[sample * r + i] = static_cast<A>(value);
      hidden[i] = static_cast<A>(value * norm_weight[i] + norm_bias[i]);
    }
  }
  void normalize_backward(int64_t sample) const {
    const A *const u = unit + sample * r, *const grad = grad_normed + sample * r;
    const Scratch<double> scratch(
        r);  // so that what is rounded once is so in both loops, and a norm of one number has none
    double *const d = scratch.data(), mean = 0, product = 0;
    for (int64_t i = 0; i < r; i++) {
      d[i] = double(grad[i]) * norm_weight[i];
      mean += d[i];
      product += d[i] * u[i];
    }
    mean /= double(r);
    product /= double(r);
    for (int64_t i = 0; i < r; i++) {
      grad_hidden[sample * r + i] = static_cast<A>(rate[sample] * (d[i] - mean - u[i] * product));
    }
  }
};

template <class A>
A bias_of(const Context& context, const ContextWeights& w) {
  const A* bias = widened<A>(context, w.attn_bias, w.dtype, 1);
  return bias ? 0 * *bias : A(0);
}

template <class T>
void forward(const Context& context, const GlobalContextArgs& a) {
  using A = Acc<T>;
  const int64_t n = a.n, c = a.c;
  const ContextWeights& w = a.weights;
  const Transform<A> scale(context, w, w.transforms[kScale], n, c), add(context, w, w.transforms[kAdd], n, c);
  const ContextPool<T> pool(context, n, c, a.hw, a.x, widened<A>(context, w.attn_weight, w.dtype, c),
                            bias_of<A>(context, w), static_cast<A*>(a.memory), a.memory);
  A *const scales = static_cast<A*>(context.workspace(context, 2 * n * c * sizeof(A))), *const shifts = scales + n * c;
  const bool far = exceeds_caches(n * c * a.hw * sizeof(T));
  for_each_group(context, n, group_size<T>(c * a.hw, 2 * c * (scale.r + add.r)), c * a.hw,
                 [&](int64_t first, int64_t count, const Team& team) __attribute__((noinline)) {
                   A *const gates = scales + first * c, *const added = shifts + first * c,
                            *const pooled = pool.contexts + first * c;
                   for (int64_t i = 0; i < count; i++) pool.run(first + i, team);
                   if (scale.r) {
                     scale.forward(first, count, pooled, gates, c, c);
                     for_lanes<A>(count * c, [=, gate = w.gate](int64_t i, auto lanes) CONVBLOCKS_LOOP {
                       store(gates + i, apply_gate(load(gates + i, lanes), gate), lanes);
                     });
                   } else {
                     std::fill_n(gates, count * c, A(1));
                   }
                   if (add.r)
                     add.forward(first, count, pooled, added, c, c);
                   else
                     std::fill_n(added, count * c, A(0));
                   for (int64_t i = 0; i < count; i++) {
                     scale_and_shift<T>(team, a.x, a.y, first + i, c, a.hw, far, gates + i * c, added + i * c);
                   }
                 });
}

template <class T>
void backward(const Context& context, const GlobalContextBackwardArgs& a) {
  using A = Acc<T>;
  const int64_t n = a.n, c = a.c, hw = a.hw;
  const ContextWeights& w = a.weights;
  const Transform<A> scale(context, w, w.transforms[kScale], n, c), add(context, w, w.transforms[kAdd], n, c);
  const A* const weight = widened<A>(context, w.attn_weight, w.dtype, c);
  const ContextPool<T> pool(context, n, c, hw, a.x, weight, bias_of<A>(context, w),
                            static_cast<A*>(const_cast<void*>(a.memory)), true);
  const Chunks<T>& chunks = pool.chunks;
  const ContextSums<T> sums(context, chunks, n, c, a.x, a.grad, scale.r, add.r);
  const int64_t shares = chunks.count * (c + 1);  // in the gradient of the attention, of a sample
  A* const scales = static_cast<A*>(context.workspace(context, n * (2 * c + shares) * sizeof(A)));
  A *const grad_contexts = scales + n * c, *const attention = grad_contexts + n * c;
  const bool far = exceeds_caches(n * c * hw * sizeof(T));
  const bool fetch = leaves_second_caches(3 * n * c * hw * sizeof(T), context.threads);
  for_each_group(
      context, n, group_size<T>(2 * c * hw, 2 * c * (scale.r + add.r)), 2 * c * hw,
      [&](int64_t first, int64_t count, const Team& team) __attribute__((noinline)) {
        A *const gates = scales + first * c, *const by_context = grad_contexts + first * c,
                 *const pooled = pool.contexts + first * c;
        for (int64_t i = first; i < first + count; i++) {
          chunks.each(team, 3 * c, [&](int64_t chunk, int64_t some) {
            if (!a.memory) pool.pool(i, chunk, some);
            sums.sum(i, chunk, some);
          });
          if (!a.memory) pool.merge(i);
          sums.merge(i);
        }
        std::fill_n(by_context, count * c, A(0));
        if (scale.r) {
          A* const logits = scale.grad_out + first * c;
          scale.forward(first, count, pooled, logits, c, c);
          for (int64_t i = 0; i < count; i++) {
            const A* const products = sums.products(first + i);
            for_lanes<A>(c, [=, gate = w.gate](int64_t j, auto lanes) CONVBLOCKS_LOOP {
              const Vec<A> logit = load(logits + i * c + j, lanes), gated = apply_gate(logit, gate);
              store(gates + i * c + j, gated, lanes);
              store(logits + i * c + j, gate_backward(load(products + j, lanes), logit, gated, gate), lanes);
            });
          }
          scale.backward(first, count, by_context, c);
        } else {
          std::fill_n(gates, count * c, A(1));
        }
        if (add.r) {
          A* const grad_out = add.grad_out + first * c;
          add.forward(first, count, pooled, grad_out, c, c);
          for (int64_t i = 0; i < count; i++) std::copy_n(sums.grads(first + i), c, grad_out + i * c);
          add.backward(first, count, by_context, c);
        }
        for (int64_t i = 0; i < count; i++) {
          A *const gc = by_context + i * c, *const by_x = gates + i * c;
          if (weight) {
            const auto sample = pool.sample(first + i);
            context_gradient<T>(team, chunks,
                                {a.x, a.grad, a.grad_x, first + i, c, far, fetch, by_x, sample.context, gc, weight},
                                sample.attention, attention + (first + i) * shares);
          } else {
            for_lanes<A>(c, [=](int64_t j, auto lanes) { store(gc + j, load(gc + j, lanes) / A(hw), lanes); });
            scale_and_shift<T>(team, a.grad, a.grad_x, first + i, c, hw, far, by_x, gc);
          }
        }
      });
  if (scale.r) scale.gradients(context, n, pool.contexts, a.grads.transforms[kScale], w.dtype);
  if (add.r) add.gradients(context, n, pool.contexts, a.grads.transforms[kAdd], w.dtype);
  if (!weight) return;
  const auto total = [=, count = n * chunks.count](int64_t i, auto lanes) {
    Vec<A> sum = load(attention + i, lanes);
    for (int64_t share = 1; share < count; share++) sum += load(attention + share * (c + 1) + i, lanes);
    return sum;
  };
  const Narrowed<A> attn_weight(context, a.grads.attn_weight, w.dtype, c),
      attn_bias(context, a.grads.attn_bias, w.dtype, 1);
  for_lanes<A>(c, [&](int64_t i, auto lanes) { store(attn_weight + i, total(i, lanes), lanes); });
  // Attention does not change with its bias: the sum is 0, or not a number.
  if (attn_bias) *attn_bias = 0 * total(c, 1)[0];
}

}  // namespace
}  // namespace convblocks::cpu

const bool convblocks_global_context_remembers = true;

const char* convblocks_global_context(const convblocks::Context& context, const convblocks::GlobalContextArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_global_context_backward(const convblocks::Context& context,
                                               const convblocks::GlobalContextBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}
