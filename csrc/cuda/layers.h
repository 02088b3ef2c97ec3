// The small layers between pooled channels and their gates, and their gradients: squeeze-and-excitation's.
#pragma once
#include "../squeeze_excite.h"
#include "squeeze.h"

namespace convblocks::cuda {

// A layer's weights: rows of `columns`.
template <class T>
struct Layer {
  Parameter<T> weight, bias;
  int64_t rows, columns;
  int biases = 1;  // how many times the bias is added
};

// The numbers of one call of the backward that the passes over the map need.
template <class A>
struct LayerGradients {
  A *gates, *squeezed;  // [sample][channel]: the gates, and the gradients of the squeezed numbers
};

// What a call of the layers is given besides the pooled numbers: where the gradients of the weights go.
struct WeightGradients {
  void *w1, *b1, *w2, *b2;
};

// With two `ways` to pool (Pooled::both) each goes through the first layer, and the last one takes the sum of the two.
template <class T>
class Layers {
 public:
  using A = Acc<T>;

  Layers(const Context& context, int64_t n, int64_t c, const SqueezeExciteWeights& w, int ways = 1)
      : context_(context), w_(w), n_(n), c_(c), ways_(ways) {}

  // What hidden() and gates(), or backward(), take of the workspace.
  int64_t size(bool backward) const {
    return n_ * (backward ? 3 * ways_ * w_.reduced + (2 + ways_) * c_ : ways_ * w_.reduced + c_);
  }
  Layer<T> second() const {
    Layer<T> last = layer(w_.w2, w_.b2, c_, w_.reduced ? w_.reduced : c_);
    last.biases = ways_;
    return last;
  }

  // What the last layer is given: the activated numbers of the first one, or the pooled ones where there is none.
  Pooled<A> hidden(Workspace<A>& workspace, const Pooled<A>& pooled) const;
  A* gates(Workspace<A>& workspace, const Pooled<A>& input) const;
  void write_gates(const Pooled<A>& input, void* out) const;  // of T
  // `dots` has the gradients of the gates, or `grad` has them.
  LayerGradients<A> backward(Workspace<A>& workspace, const Pooled<A>& pooled, const Pooled<A>& dots,
                             const WeightGradients& grads, const void* grad = nullptr) const;

 private:
  Layer<T> layer(const void* weight, const void* bias, int64_t rows, int64_t columns) const {
    return {{weight, w_.dtype}, {bias, w_.dtype}, rows, columns};
  }
  Pooled<A> numbers(A* hidden) const;
  template <class F>
  void product(const Layer<T>& layer, const Pooled<A>& input, int64_t samples, const F& finish) const;
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), int64_t blocks, const Parameters&... parameters) const;

  const Context& context_;
  const SqueezeExciteWeights& w_;
  int64_t n_, c_;
  int ways_;
};

}  // namespace convblocks::cuda
