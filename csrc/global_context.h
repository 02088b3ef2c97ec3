// Global context: y = x * gate(t_scale(c)) + t_add(c), with c = sum(a x) over the pixels, a = softmax(w . x + b) over
// them (or c the mean), and t(c) = W2 act(layer_norm(W1 c + b1)) + b2. Either transform may be absent.
#pragma once
#include "gate.h"
#include "kernel.h"

namespace convblocks {

// What is learned, dense and row-major, or its gradients.
struct ContextTransform {
  int64_t reduced;                // R; 0 where the transform is absent, and its pointers are null
  void* w1;                       // (R, C)
  void* b1;                       // (R)
  void *norm_weight, *norm_bias;  // (R)
  void* w2;                       // (C, R)
  void* b2;                       // (C)
};
inline constexpr int kScale = 0, kAdd = 1;
struct ContextParameters {
  void* attn_weight;  // (C), or null: the mean
  void* attn_bias;    // (1), or null: attention does not change with it, unless it is not finite
  ContextTransform transforms[2];
};
struct ContextWeights : ContextParameters {
  Dtype dtype;  // that of the map, or f32
  double eps;
  Activation activation;
  Gate gate;
};

struct GlobalContextArgs {
  Dtype dtype;
  int64_t n, c, hw;
  ContextWeights weights;
  Map x;
  Map y;  // x's layout, dense
  // Null, or for what the backward takes: the contexts (N, C) and, where these are not the mean, attention (N, HW).
  void* memory;
};

// With gc the gradient of c, r = gc . x of a pixel and dz = a (r - gc . c): grad_x = grad * gate + a gc + dz w.
struct GlobalContextBackwardArgs {
  Dtype dtype;
  int64_t n, c, hw;
  ContextWeights weights;
  Map grad;  // same kind of layout as x
  Map x;
  Map grad_x;
  const void* memory;       // null: to be computed again
  ContextParameters grads;  // shapes and dtype of the weights; null where the weight is
};

}  // namespace convblocks

// In the shared objects whose kernels keep a memory and take it: those of the CPU.
CONVBLOCKS_KERNEL const bool convblocks_global_context_remembers;
CONVBLOCKS_KERNEL const char* convblocks_global_context(const convblocks::Context&,
                                                        const convblocks::GlobalContextArgs&);
CONVBLOCKS_KERNEL const char* convblocks_global_context_backward(const convblocks::Context&,
                                                                 const convblocks::GlobalContextBackwardArgs&);
