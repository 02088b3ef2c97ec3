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

  static void linear(const A* w, const A* b, const A* in, A* out, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) out[i] = dot(w + i * cols, in, cols) + (b ? b[i] : A(0));
  }
  // hidden and active are not touched if there is one layer; logits may be gates.
  void forward(const A* pooled, A* hidden, A* active, A* logits, A* gates) const {
    if (r) {
      linear(w1, b1, pooled, hidden, r, c);
      for_lanes<A>(r, [&](int64_t i, auto lanes) { store(active + i, activate(load(hidden + i, lanes), activation), lanes); });
    }
    linear(w2, b2, r ? active : pooled, logits, c, inner());
    for_lanes<A>(c, [&](int64_t i, auto lanes) { store(gates + i, apply_gate(load(logits + i, lanes), gate), lanes); });
  }
};

template <class T>
void forward(const Context& context, const SqueezeExciteArgs& a) {
  using A = Acc<T>;
  const Layers<A> layers(context, a.weights, a.c);
  A* hidden = static_cast<A*>(context.workspace(context, std::max<int64_t>(1, a.n * layers.r) * sizeof(A)));
  channel_gate<T>(context, a.n, a.c, a.hw, a.x, a.y, a.weights.add_maxpool,
                  [&](int64_t sample, const A* pooled, A* gates) {
                    A* h = hidden + sample * layers.r;
                    layers.forward(pooled, h, h, gates, gates);
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
      [&](int64_t sample, const A* pooled, const A* grad_gates, A* gates, A* grad_pooled) {
        A *act = active + sample * r, *h = hidden + sample * r, *grad_h = grad_hidden + sample * r,
          *dl = grad_logits + sample * c;
        std::copy_n(pooled, c, squeezed + sample * c);
        layers.forward(pooled, h, act, dl, gates);
        for_lanes<A>(c, [&](int64_t i, auto lanes) {
          const Vec<A> slope = gate_slope(load(dl + i, lanes), load(gates + i, lanes), layers.gate);
          store(dl + i, load(grad_gates + i, lanes) * slope, lanes);
        });
        sum_rows<A>(
            c, layers.inner(), layers.w2, layers.inner(), [&](int64_t i) { return dl[i]; },
            [&](int64_t j, auto lanes, Vec<A> sum) {
              if (r) store(grad_h + j, sum * activation_slope(load(h + j, lanes), layers.activation), lanes);
              else store(grad_pooled + j, sum, lanes);
            });
        if (r) {
          sum_rows<A>(
              r, c, layers.w1, c, [&](int64_t i) { return grad_h[i]; },
              [&](int64_t j, auto lanes, Vec<A> sum) { store(grad_pooled + j, sum, lanes); });
        }
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
