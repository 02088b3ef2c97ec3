// The small layers between the squeezed means of the channels and their gates: z = W1 p + b1, gate(W2 act(z) + b2), or
// one layer, gate(W2 p + b2). And their gradients.
#pragma once
#include "../squeeze_excite.h"
#include "gate.h"
#include "weights.h"

namespace convblocks::cpu {

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

  // The gates of `count` samples from their squeezes. hidden and active (r apart) are not touched if there is one
  // layer; hidden may be active, and logits (`logit_stride` apart) may be gates.
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

// Of each of n samples, what the gradients of the weights are made of.
template <class A>
class LayersBackward {
 public:
  LayersBackward(const Context& context, const SqueezeExciteWeights& w, int64_t n, int64_t c)
      : layers(context, w, c), context_(context), n_(n), dtype_(w.dtype) {
    const int64_t r = layers.r;
    active_ = static_cast<A*>(context.workspace(context, n * (3 * r + 2 * c) * sizeof(A)));
    hidden_ = active_ + n * r;
    grad_hidden_ = hidden_ + n * r;
    squeezed_ = grad_hidden_ + n * r;
    grad_logits_ = squeezed_ + n * c;
  }

  // The gates of the samples from `first` on, again, and from their gradients those of the squeezes; all `stride`
  // apart.
  void operator()(int64_t first, int64_t count, const A* pooled, const A* grad_gates, A* gates, A* grad_pooled,
                  int64_t stride) const {
    const int64_t c = layers.c, r = layers.r;
    A *act = active_ + first * r, *h = hidden_ + first * r, *grad_h = grad_hidden_ + first * r,
      *dl = grad_logits_ + first * c;
    layers.forward(count, pooled, h, act, dl, c, gates, stride);
    for (int64_t s = 0; s < count; s++) {
      std::copy_n(pooled + s * stride, c, squeezed_ + (first + s) * c);
      for_lanes<A>(c, [=, gate = layers.gate](int64_t i, auto lanes) CONVBLOCKS_LOOP {
        A* logit = dl + s * c + i;
        const Vec<A> grad = load(grad_gates + s * stride + i, lanes), gated = load(gates + s * stride + i, lanes);
        store(logit, gate_backward(grad, load(logit, lanes), gated, gate), lanes);
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
  }

  void weights(void* grad_w1, void* grad_b1, void* grad_w2, void* grad_b2) const {
    const int64_t c = layers.c, r = layers.r;
    const auto to = [this](void* grad, int64_t count) { return Narrowed<A>(context_, grad, dtype_, count); };
    sum_of_products(context_, n_, c, layers.inner(), grad_logits_, r ? active_ : squeezed_,
                    to(grad_w2, c * layers.inner()), to(grad_b2, c));
    if (r) sum_of_products(context_, n_, r, c, grad_hidden_, squeezed_, to(grad_w1, r * c), to(grad_b1, r));
  }

  const Layers<A> layers;

 private:
  const Context& context_;
  int64_t n_;
  Dtype dtype_;
  A *active_, *hidden_, *grad_hidden_, *squeezed_, *grad_logits_;
};

}  // namespace convblocks::cpu
