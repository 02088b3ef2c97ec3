// An operation of a map that later ones read, too, and that hands the map on to them: it adds its gradient of the map to
// theirs, in place where nobody else holds that. Autograd, left to it, adds up whole maps, each in memory of its own.
#pragma once

#include "op.h"

namespace convblocks {

template <class Op, class Function = decltype(&Op::formula)>
struct HandingOn;
template <class Op>
struct HandingOnNode;

template <class Op, class... Args>
struct HandingOn<Op, Tensor (*)(const Tensor&, Args...)> {
  using Plain = Operator<Op>;
  using Outputs = std::tuple<Tensor, Tensor>;
  using MaybeTensor = std::optional<Tensor>;
  static std::string name() { return std::string("_") + Op::name + "_handing_on"; }
  static inline KernelSlot slot{std::string("convblocks_") + Op::name + "_backward_onto", false};

  struct Derivative {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, Args... args) {
      ctx->set_materialize_grads(false);
      return {Plain::Derivative::forward(ctx, nullptr, x, args...), x};
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
      if (!grad[0].defined()) {
        variable_list handed(1 + sizeof...(Args));
        handed[0] = grad[1];
        return handed;
      }
      variable_list result = Plain::Derivative::gradients(ctx, [&](const Tensor& x, const auto&... rest) {
        if (!takes_more(grad[1], grad[0], x) || !(is_plain(rest) && ...)) {
          Grads grads = Plain::unpack(Plain::call_backward(grad[0], x, rest...));
          if (grad[1].defined()) grads[0] = grads[0] + grad[1];
          return grads;
        }
        Plain::check_backward(grad[0], x, rest...);  // hooks may have put anything in the place of what was kept
        Grads grads{grad[1]};
        (append_grad(grads, rest), ...);
        Op::run_backward(Call(Op::name, slot, x), grads, grad[0], x, rest...);
        return grads;
      });
      result.erase(result.begin());  // what Plain's node has for `known`
      return result;
    }
    static bool takes_more(const Tensor& onto, const Tensor& grad, const Tensor& x) {
      if (!onto.defined() || at::GradMode::is_enabled() || under_transform() || is_empty(x) || !slot.on(x))
        return false;
      if (c10::impl::dispatch_mode_enabled()) return false;
      if (!is_plain(onto) || !is_plain(grad) || !is_plain(x) || !x.is_cpu()) return false;
      const bool alone = onto.use_count() == 1 && onto.has_storage() && onto.storage().use_count() == 1;
      const bool alike = onto.scalar_type() == x.scalar_type() && onto.sizes() == x.sizes();
      return alone && alike && onto.is_contiguous(memory_format(x));
    }
  };

  static Outputs run(const Tensor& x, Args... args) {
    const bool plain = !slot.on(x) || under_transform() || at::isTensorSubclassLike(x) || has_tangent(x) ||
                       (has_tangent(args) || ...) || (is_missing(args) || ...);
    if (plain || !at::GradMode::is_enabled() || !wants_grad(x)) return {Plain::call(x, args...), x};
    const variable_list both = HandingOnNode<Op>::apply(x, args...);
    return {both[0], both[1]};
  }

  static void define(torch::Library& m) {
    std::string schema(Op::schema);  // (Tensor x, ...) -> Tensor
    schema.replace(schema.find("Tensor x"), 8, "Tensor(a) x").replace(schema.rfind("Tensor"), 6, "(Tensor, Tensor(a))");
    define_once(m, name(), schema.c_str());
  }
};

template <class Op>
struct HandingOnNode : torch::autograd::Function<HandingOnNode<Op>> {
  using Derivative = typename HandingOn<Op>::Derivative;
  template <class... Args>
  static variable_list forward(AutogradContext* ctx, const Args&... args) {
    return Derivative::forward(ctx, args...);
  }
  // By reference: a copy would hold the gradients, too.
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return Derivative::backward(ctx, grad);
  }
};

}  // namespace convblocks

// On any device: the operations that it calls have a kernel for each.
#define CONVBLOCKS_REGISTER_HANDING_ON(Op)                            \
  TORCH_LIBRARY_FRAGMENT(convblocks, m) { HandingOn<Op>::define(m); } \
  TORCH_LIBRARY_IMPL(convblocks, CompositeImplicitAutograd, m) {      \
    m.impl(HandingOn<Op>::name().c_str(), HandingOn<Op>::run);        \
  }
