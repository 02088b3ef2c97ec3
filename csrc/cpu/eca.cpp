// Efficient channel attention on the CPU: the passes over the maps are channel_gate.h's, the filter over the channels
// is here.
#include "../eca.h"

#include <vector>

#include "channel_gate.h"
#include "dispatch.h"
#include "gate.h"
#include "weights.h"

namespace convblocks::cpu {
namespace {

template <class A>
struct Filter {
  int64_t c, k, pad;
  const A *taps, *bias;
  Gate gate;
  bool circular;

  Filter(const Context& context, const EcaWeights& w, int64_t channels)
      : c(channels), k(w.kernel), pad(k / 2), gate(w.gate), circular(w.circular) {
    taps = widened<A>(context, w.weight, w.dtype, k);
    bias = widened<A>(context, w.bias, w.dtype, 1);
  }
  int64_t padded_size() const { return c + k - 1; }

  // padded[pad + i] = pooled[i], with the padding on both sides.
  void pad_to(A* padded, const A* pooled) const {
    std::copy_n(pooled, c, padded + pad);
    if (circular) {
      std::copy_n(pooled + c - pad, pad, padded);
      std::copy_n(pooled, pad, padded + pad + c);
    } else {
      std::fill_n(padded, pad, A(0));
      std::fill_n(padded + pad + c, pad, A(0));
    }
  }
  void forward(const A* padded, A* logits, A* gates) const {
    const A start = bias ? *bias : A(0), *taps = this->taps;
    for_lanes<A>(c, [=, k = k, gate = gate](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      Vec<A> sum = splat<Vec<A>>(start);
      for (int64_t j = 0; j < k; j++) sum += taps[j] * load(padded + i + j, lanes);
      store(logits + i, sum, lanes);
      store(gates + i, apply_gate(sum, gate), lanes);
    });
  }
};

template <class T>
void forward(const Context& context, const EcaArgs& a) {
  using A = Acc<T>;
  const Filter<A> filter(context, a.weights, a.c);
  A* padded = static_cast<A*>(context.workspace(context, a.n * filter.padded_size() * sizeof(A)));
  channel_gate<T>(context, a.n, a.c, a.hw, a.x, a.y, false,
                  [&](int64_t first, int64_t count, const A* pooled, A* gates, int64_t stride) {
                    for (int64_t s = 0; s < count; s++) {
                      A* p = padded + (first + s) * filter.padded_size();
                      filter.pad_to(p, pooled + s * stride);
                      filter.forward(p, gates + s * stride, gates + s * stride);
                    }
                  });
}

template <class T>
void backward(const Context& context, const EcaBackwardArgs& a) {
  using A = Acc<T>;
  const Filter<A> filter(context, a.weights, a.c);
  const int64_t n = a.n, c = a.c, k = filter.k, pad = filter.pad, margin = k - 1;
  // Of each sample: the padded squeeze; the gradient of the logits between two margins of zeros, and that of the padded
  // squeeze; what the sample adds to the gradients of the k taps and of the bias.
  const int64_t size = filter.padded_size() * 2 + c + 2 * margin + k + 1;
  A* workspace = static_cast<A*>(context.workspace(context, n * size * sizeof(A)));
  const auto tap_grads = [&](int64_t sample) { return workspace + sample * size + size - (k + 1); };
  const auto sample_backward = [&](int64_t sample, const A* pooled, const A* grad_gates, A* gates, A* grad_pooled) {
    A *padded = workspace + sample * size, *grad_padded = padded + filter.padded_size(),
      *wide = grad_padded + filter.padded_size(), *dl = wide + margin, *taps = tap_grads(sample);
    filter.pad_to(padded, pooled);
    filter.forward(padded, dl, gates);
    for_lanes<A>(c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      const Vec<A> grad = load(grad_gates + i, lanes);
      store(dl + i, gate_backward(grad, load(dl + i, lanes), load(gates + i, lanes), filter.gate), lanes);
    });
    std::fill_n(wide, margin, A(0));
    std::fill_n(dl + c, margin, A(0));
    for (int64_t j = 0; j < k; j++) taps[j] = dot(dl, padded + j, c);
    taps[k] = reduce_plane<A, 1>(
        c, [=](int64_t i, auto lanes) CONVBLOCKS_LOOP { return Vecs<A, 1>{load(dl + i, lanes)}; })[0];
    for_lanes<A>(filter.padded_size(), [=](int64_t i, auto lanes) CONVBLOCKS_LOOP {
      Vec<A> sum{};
      for (int64_t j = 0; j < k; j++) sum += filter.taps[j] * load(wide + i + margin - j, lanes);
      store(grad_padded + i, sum, lanes);
    });
    std::copy_n(grad_padded + pad, c, grad_pooled);
    if (filter.circular) {
      for (int64_t i = 0; i < pad; i++) {
        grad_pooled[c - pad + i] += grad_padded[i];
        grad_pooled[i] += grad_padded[pad + c + i];
      }
    }
  };
  channel_gate_backward<T>(context, n, c, a.hw, a.grad, a.x, a.grad_x, false,
                           [&](int64_t first, int64_t count, const A* pooled, const A* grad_gates, A* gates,
                               A* grad_pooled, int64_t stride) {
                             for (int64_t s = 0; s < count; s++) {
                               const int64_t at = s * stride;
                               sample_backward(first + s, pooled + at, grad_gates + at, gates + at, grad_pooled + at);
                             }
                           });
  const Narrowed<A> grad_weight(context, a.grad_weight, a.weights.dtype, k),
      grad_bias(context, a.grad_bias, a.weights.dtype, 1);
  for (int64_t j = 0; j <= k; j++) {
    A sum = 0;
    for (int64_t sample = 0; sample < n; sample++) sum += tap_grads(sample)[j];
    if (j < k)
      grad_weight[j] = sum;
    else if (grad_bias)
      *grad_bias = sum;
  }
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_eca(const convblocks::Context& context, const convblocks::EcaArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::forward<T>(context, args); });
}

const char* convblocks_eca_backward(const convblocks::Context& context, const convblocks::EcaBackwardArgs& args) {
  return convblocks::cpu::dispatch(args.dtype, [&]<class T>(T) { convblocks::cpu::backward<T>(context, args); });
}
