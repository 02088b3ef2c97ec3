// Squeeze-and-excitation on the CPU: the passes over the maps are channel_gate.h's, the two small layers are here.
#include "../squeeze_excite.h"

#include "channel_gate.h"
#include "dispatch.h"
#include "gate.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

template <class A>
struct Layers {
  int64_t c, r;  // r == 0: one layer, from the squeeze to the gate
  const A *w1, *b1, *w2, *b2;
  Activation activation;
  Gate gate;

  Layers(const Context& context, const SqueezeExciteWeights& w, int64_t channels)
      : c(channels), r(w.reduced), activation(w.activation), gate(w.gate) {
    w1 = widened<A>(context, w.w1, w.dtype, r * c);
    b1 = widened<A>(context, w.b1, w.dtype, r);
    w2 = widened<A>(context, w.w2, w.dtype, c * inner());
    b2 = widened<A>(context, w.b2, w.dtype, c);
  }
  int64_t inner() const { return r ? r : c; }  // what the last layer reads

  // The gates of `count` samples from their squeezes. hidden and active (r apart) are not touched if there is one layer;
  // hidden may be active, and logits (`logit_stride` apart) may be gates.
  void forward(int64_t count, const A* pooled, A* hidden, A* active, A* logits, int64_t logit_stride, A* gates,
               int64_t stride) const {
    if (r) {
      linear(count, r, c, w1, b1, pooled, stride, hidden, r);
      for_lanes<A>(count * r, [=, activation = activation](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        store(active + i, activate(load(hidden + i, lanes), activation), lanes);
      });
    }
    linear(count, c, inner(), w2, b2, r ? active : pooled, r ? r : stride, logits, logit_stride);
    for (int64_t s = 0; s < count; s++) {
      for_lanes<A>(c, [=, gate = gate](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        store(gates + s * stride + i, apply_gate(load(logits + s * logit_stride + i, lanes), gate), lanes);
      });
    }
  }
};

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

template <class T, class W>
void backward(const Context& context, const SqueezeExciteBackwardArgs& a) {
  using A = Acc<T>;
  const Layers<A> layers(context, a.weights, a.c);
  const int64_t n = a.n, c = a.c, r = layers.r;
  // Of each sample, what the gradients of the weights are made of.
  A* active = static_cast<A*>(context.workspace(context, n * (3 * r + 2 * c) * sizeof(A)));
  A *hidden = active + n * r, *grad_hidden = hidden + n * r, *squeezed = grad_hidden + n * r, *grad_logits = squeezed + n * c;
  channel_gate_backward<T>(
      context, n, c, a.hw, a.grad, a.x, a.grad_x, a.weights.add_maxpool,
      [&](int64_t first, int64_t count, const A* pooled, const A* grad_gates, A* gates, A* grad_pooled, int64_t stride) {
        A *act = active + first * r, *h = hidden + first * r, *grad_h = grad_hidden + first * r,
          *dl = grad_logits + first * c;
        layers.forward(count, pooled, h, act, dl, c, gates, stride);
        for (int64_t s = 0; s < count; s++) {
          std::copy_n(pooled + s * stride, c, squeezed + (first + s) * c);
          for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
            A* logit = dl + s * c + i;
            const Vec<A> grad = load(grad_gates + s * stride + i, lanes), gated = load(gates + s * stride + i, lanes);
            store(logit, gate_backward(grad, load(logit, lanes), gated, layers.gate), lanes);
          });
        }
        by_groups(count, [&]<int G>(int64_t begin, std::integral_constant<int, G>) {
          const auto put_pooled = [&](int g, int64_t j, auto lanes, Vec<A> sum) {
            store(grad_pooled + (begin + g) * stride + j, sum, lanes);
          };
          const auto left = [&](int64_t i, int g) { return dl[(begin + g) * c + i]; };
          if (!r) return sum_rows<G, A>(c, c, layers.w2, left, put_pooled);
          sum_rows<G, A>(c, r, layers.w2, left, [&](int g, int64_t j, auto lanes, Vec<A> sum) {
            const int64_t at = (begin + g) * r + j;
            store(grad_h + at, activation_backward(sum, load(h + at, lanes), layers.activation), lanes);
          });
          sum_rows<G, A>(r, c, layers.w1, [&](int64_t i, int g) { return grad_h[(begin + g) * r + i]; }, put_pooled);
        });
      });
  sum_of_products(context, n, c, layers.inner(), grad_logits, r ? active : squeezed, static_cast<W*>(a.grad_w2),
                  static_cast<W*>(a.grad_b2));
  if (r) {
    sum_of_products(context, n, r, c, grad_hidden, squeezed, static_cast<W*>(a.grad_w1), static_cast<W*>(a.grad_b1));
  }
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_squeeze_excite(const convblocks::Context& context, const convblocks::SqueezeExciteArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_squeeze_excite_backward(const convblocks::Context& context,
                                               const convblocks::SqueezeExciteBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) {
    using A = convblocks::cpu::Acc<T>;
    if (args.weights.dtype == args.dtype) convblocks::cpu::backward<T, T>(context, args);
    else convblocks::cpu::backward<T, A>(context, args);
  });
}
