// Everything an operation needs to be in the dispatcher, so that its own .cpp is its schema, its checks, its formula and
// its call of the kernel. An operation is a struct:
//
//   struct Simam {
//     static constexpr const char* name = "simam";
//     static constexpr const char* schema = "(Tensor x, float e_lambda) -> Tensor";
//     static constexpr const char* backward_schema = "(Tensor grad, Tensor x, float e_lambda) -> Tensor";
//     static void check(const Tensor& x, double e_lambda);                         // throws; sizes may be symbolic
//     static Tensor formula(const Tensor& x, double e_lambda);                     // ATen, differentiable to any order
//     static Tensor backward_formula(const Tensor& grad, const Tensor& x, double e_lambda);
//     static void run(const Call&, const Tensor& y, const Tensor& x, double e_lambda);       // the kernel
//     static void run_backward(const Call&, Grads& grads, const Tensor& grad, const Tensor& x, double e_lambda);
//   };
//   CONVBLOCKS_REGISTER(Simam)
//
// The first argument is the feature map; gradients come in the order of the tensor arguments, an empty tensor for one
// that is absent. An operation that is linear in its map, its only tensor, leaves the map out of the backward: nothing is
// kept for it, and the kernel of the operation serves both ways. So is one whose map is a list of maps (Tensor[]): its
// backward takes their channels (SymInt[]) in their place and returns a list. What an operation may have in addition:
//
//     static std::vector<c10::SymInt> output_size(const Tensor& x, double e_lambda);         // else that of x
//     static constexpr bool autocasts = true;                         // computes, as convolutions do, in autocast's dtype
//     static Grads empty_grads(const Tensor& grad, ...);                  // of maps among the other arguments, or in a list
//     static int64_t memory_size(const Tensor& x, double e_lambda);       // of the Memory that run keeps and run_backward takes;
//                                                                         // x has four dimensions, nothing else is checked
#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "call.h"
#include "memory.h"

namespace convblocks {

using Grads = std::vector<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// --- words and checks shared by the operations (convblocks/ops/checks.py says the same) -------------------------------

std::string size_of(const Tensor& t);
std::string name_of(at::ScalarType dtype);
void check_feature_map(const char* op, const Tensor& x);
void check_parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x);
void check_parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                     c10::SymIntArrayRef size);
void check_same_dtype(const char* op, const char* name, const std::optional<Tensor>& t, const char* first_name,
                      const Tensor& first);
// A map of the input's dtype on its device: a gradient, or a second input.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x, c10::SymIntArrayRef size);
// The place of value in names, or an error that lists them.
int64_t check_one_of(const char* op, const char* argument, std::string_view value,
                     at::ArrayRef<std::string_view> names);

constexpr at::DispatchKey autocast_key(at::DeviceType device) {
  return device == at::kCPU ? at::DispatchKey::AutocastCPU : at::DispatchKey::AutocastCUDA;
}
// A tensor as autocast wants it on the device; anything else as it is.
Tensor in_autocast_dtype(const Tensor& t, at::DeviceType device);
std::optional<Tensor> in_autocast_dtype(const std::optional<Tensor>& t, at::DeviceType device);
template <class Arg>
const Arg& in_autocast_dtype(const Arg& argument, at::DeviceType) {
  return argument;
}

// --- registration -----------------------------------------------------------------------------------------------------

// A second definition of a schema aborts the process, so a copy of this library loaded twice must not make one.
void define_once(torch::Library& m, const std::string& name, const char* schema, const std::vector<at::Tag>& tags = {});
bool under_transform();                                       // a functorch transform (grad, vmap, jvp) is active
Tensor empty_map(const Tensor& x, c10::SymIntArrayRef size);  // like x, in x's memory format, dense
inline Tensor empty_map(const Tensor& x) { return empty_map(x, x.sym_sizes()); }
inline void append_grad(Grads& grads, const Tensor& t) {
  grads.push_back(grads.empty() ? empty_map(t) : at::empty_symint(t.sym_sizes(), t.options()));
}
inline void append_grad(Grads& grads, const std::optional<Tensor>& t) {
  grads.push_back(t.has_value() ? at::empty_symint(t->sym_sizes(), t->options()) : at::empty({0}, grads[0].options()));
}
template <class T>
void append_grad(Grads&, const T&) {}
// A gradient that was computed elsewhere: as it is where it lies as is promised, else copied.
inline void take_grad(Tensor& grad, const Tensor& computed) {
  if (computed.strides() == grad.strides())
    grad = computed;
  else
    grad.copy_(computed);
}

template <class Op, class Function = decltype(&Op::formula), class Backward = decltype(&Op::backward_formula)>
struct Operator;
template <class Op>
struct Node;

template <class Op, class... Args, class Gradient, class... BackwardArgs>
struct Operator<Op, Tensor (*)(Args...), Gradient (*)(BackwardArgs...)> {
  using First = std::decay_t<std::tuple_element_t<0, std::tuple<Args...>>>;
  static constexpr bool many = std::is_same_v<First, at::TensorList>;
  static constexpr bool linear = many || sizeof...(BackwardArgs) == sizeof...(Args);
  static std::string backward_name() { return std::string(Op::name) + "_backward"; }
  static inline KernelSlot forward_slot{std::string("convblocks_") + Op::name};
  static inline KernelSlot backward_slot{"convblocks_" + (linear ? Op::name : backward_name())};
  static inline KernelSlot remembering{std::string("convblocks_") + Op::name + "_remembers", false};

  template <class Signature>
  static auto handle(const std::string& name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(("convblocks::" + name).c_str(), "").typed<Signature>();
  }
  static Tensor call(Args... args) {
    static auto op = handle<Tensor(Args...)>(Op::name);
    return op.call(args...);
  }
  static Gradient call_backward(BackwardArgs... args) {
    static auto op = handle<Gradient(BackwardArgs...)>(backward_name());
    return op.call(args...);
  }

  static Gradient pack(Grads& grads) {
    if constexpr (std::is_same_v<Gradient, Tensor>) {
      return grads[0];
    } else if constexpr (many) {
      return std::move(grads);
    } else {
      return pack(grads, std::make_index_sequence<std::tuple_size_v<Gradient>>());
    }
  }
  template <size_t... I>
  static Gradient pack(Grads& grads, std::index_sequence<I...>) {
    return Gradient(grads[I]...);
  }
  static Grads unpack(const Gradient& gradient) {
    if constexpr (std::is_same_v<Gradient, Tensor>) {
      return {gradient};
    } else if constexpr (many) {
      return gradient;
    } else {
      return std::apply([](const auto&... g) { return Grads{g...}; }, gradient);
    }
  }

  static auto output_size(Args... args) {
    if constexpr (requires { Op::output_size(args...); })
      return Op::output_size(args...);
    else
      return std::get<0>(std::tie(args...)).sym_sizes();
  }
  static const Tensor& first(const Args&... args) { return first_map(std::get<0>(std::tie(args...))); }
  static Tensor empty_output(Args... args) { return empty_map(first(args...), output_size(args...)); }
  // Where a kernel reads every tensor as it lies, and is one that keeps a memory. The sizes of fakes are not looked at.
  static int64_t memory_size(Args... args) {
    if constexpr (requires { Op::memory_size(args...); }) {
      const Tensor& x = first(args...);
      const bool remembers = remembering.on(x) && (is_plain(args) && ...) && x.dim() == 4 && x.numel();
      return remembers ? Op::memory_size(args...) : 0;
    } else {
      return 0;
    }
  }
  static Grads empty_grads(BackwardArgs... args) {
    if constexpr (requires { Op::empty_grads(args...); }) return Op::empty_grads(args...);
    Grads grads;
    if constexpr (linear)
      append_grad(grads, std::get<0>(std::tie(args...)));
    else
      [&](const Tensor&, const auto&... rest) { (append_grad(grads, rest), ...); }(args...);
    return grads;
  }
  static void check_backward(BackwardArgs... args) {
    if constexpr (linear) {
      Op::check(args...);
    } else {
      [](const Tensor& grad, const Tensor& x, const auto&... rest) {
        Op::check(x, rest...);
        check_like(Op::name, "a gradient", grad, x, output_size(x, rest...));
      }(args...);
    }
  }

  // Devices without kernels of their own.
  static Tensor fallback(Args... args) {
    Op::check(args...);
    const Tensor y = Op::formula(args...), like = empty_output(args...);
    return y.strides() == like.strides() ? y : like.copy_(y);
  }
  static Gradient fallback_backward(BackwardArgs... args) {
    check_backward(args...);
    Grads grads = unpack(Op::backward_formula(args...)), like = empty_grads(args...);
    for (size_t i = 0; i < grads.size(); i++) like[i].copy_(grads[i]);
    return pack(like);
  }
  // Devices with kernels: where there is nothing to compute, or none is loaded, the formula.
  static Tensor forward(Args... args) {
    const Tensor& x = first(args...);
    if (is_empty(std::get<0>(std::tie(args...))) || !forward_slot.on(x)) return fallback(args...);
    Op::check(args...);
    c10::DeviceGuard guard(x.device());
    Tensor y = empty_output(args...);
    Op::run(Call(Op::name, forward_slot, x), y, args...);
    return y;
  }
  static Gradient backward(BackwardArgs... args) {
    const Tensor& x = std::get<linear ? 0 : 1>(std::tie(args...));
    if (is_empty(x) || !backward_slot.on(x)) return fallback_backward(args...);
    check_backward(args...);
    c10::DeviceGuard guard(x.device());
    Grads grads = empty_grads(args...);
    Op::run_backward(Call(Op::name, backward_slot, x), grads, args...);
    return pack(grads);
  }

  static Tensor meta(Args... args) {
    Op::check(args...);
    return empty_output(args...);
  }
  static Gradient backward_meta(BackwardArgs... args) {
    check_backward(args...);
    Grads grads = empty_grads(args...);
    return pack(grads);
  }

  // Keeps the arguments, of a list of maps their channels, and a memory where there is one; the kernel computes the rest
  // again.
  template <class T>
  using Kept = std::conditional_t<std::is_same_v<T, at::TensorList>, c10::SymIntArrayRef, T>;
  struct Derivative {
    // `known`: the output, if it has been computed before; else null.
    static Tensor forward(AutogradContext* ctx, const Tensor* known, Args... args) {
      variable_list saved;
      size_t i = 0;
      auto keep = [&](const auto& arg) {
        using T = std::decay_t<decltype(arg)>;
        if constexpr (std::is_same_v<T, Tensor>) {
          saved.push_back(linear ? Tensor() : arg);
        } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
          saved.push_back(arg.value_or(Tensor()));
        } else if constexpr (std::is_same_v<T, at::TensorList>) {
          ctx->saved_data[std::to_string(i)] = c10::IValue(c10::SymIntArrayRef(channels_of(arg)));
        } else if constexpr (std::is_same_v<T, std::string_view>) {
          ctx->saved_data[std::to_string(i)] = std::string(arg);
        } else if constexpr (std::is_same_v<T, c10::SymIntArrayRef>) {
          ctx->saved_data[std::to_string(i)] = c10::IValue(arg);
        } else {
          ctx->saved_data[std::to_string(i)] = arg;
        }
        i++;
      };
      (keep(args), ...);
      at::AutoDispatchBelowADInplaceOrView guard;
      const Memory memory(first(args...), memory_size(args...));
      const Tensor y = known ? *known : call(args...);
      if (memory.kept().defined()) saved.push_back(memory.kept());
      ctx->save_for_backward(std::move(saved));
      return y;
    }
    static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
      return gradients(ctx, [&](const auto& x, const auto&... rest) {
        if constexpr (linear && !many)
          return unpack(call_backward(grad[0], rest...));
        else
          return unpack(call_backward(grad[0], x, rest...));
      });
    }
    // What compute(args...) returns, with the arguments as they were kept, in the places of forward's arguments.
    template <class F>
    static variable_list gradients(AutogradContext* ctx, F compute) {
      variable_list saved = ctx->get_saved_variables();
      size_t tensor = 0, i = 0;
      std::vector<std::string> texts;
      std::vector<std::vector<c10::SymInt>> lists;
      texts.reserve(sizeof...(Args));
      lists.reserve(sizeof...(Args));
      auto restore = [&]<class T>(std::type_identity<T>) -> Kept<T> {
        i++;
        if constexpr (std::is_same_v<T, Tensor>) {
          return saved[tensor++];
        } else if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
          const Tensor& t = saved[tensor++];
          return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
        } else if constexpr (std::is_same_v<T, std::string_view>) {
          return texts.emplace_back(ctx->saved_data[std::to_string(i - 1)].toStringRef());
        } else if constexpr (std::is_same_v<Kept<T>, c10::SymIntArrayRef>) {
          return lists.emplace_back(ctx->saved_data[std::to_string(i - 1)].toSymIntVector());
        } else {
          return ctx->saved_data[std::to_string(i - 1)].to<T>();
        }
      };
      // Braces: the arguments are restored from left to right.
      std::tuple<Kept<std::decay_t<Args>>...> args{restore(std::type_identity<std::decay_t<Args>>())...};
      std::optional<Memory> memory;
      if (tensor < saved.size()) memory.emplace(saved[0], saved[tensor]);
      Grads grads = std::apply(compute, args);
      if constexpr (many) {
        grads.resize(grads.size() + sizeof...(Args) - 1);  // none for the other arguments
        grads.insert(grads.begin(), Tensor());             // nor for `known`
        return grads;
      }
      variable_list result{Tensor()};
      tensor = 0;
      ((result.push_back(is_tensor_argument<Args> && (linear || saved[tensor].defined()) ? grads[tensor] : Tensor()),
        tensor += is_tensor_argument<Args>),
       ...);
      return result;
    }
  };

  static Tensor autograd(Args... args) {
    if (under_transform() || (has_tangent(args) || ...)) return (Op::check(args...), Op::formula(args...));
    if (!(at::GradMode::is_enabled() && (wants_grad(args) || ...))) {
      at::AutoDispatchBelowADInplaceOrView guard;
      return call(args...);
    }
    if ((is_missing(args) || ...)) Op::check(args...);  // which says so; autograd would crash
    return Node<Op>::apply(static_cast<const Tensor*>(nullptr), args...);
  }
  static Gradient backward_autograd(BackwardArgs... args) {
    if (under_transform() || (has_tangent(args) || ...) || (at::GradMode::is_enabled() && (wants_grad(args) || ...))) {
      return (check_backward(args...), Op::backward_formula(args...));
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(args...);
  }
  template <at::DeviceType kDevice>
  static Tensor autocast(Args... args) {
    c10::impl::ExcludeDispatchKeyGuard guard(autocast_key(kDevice));
    return call(in_autocast_dtype(args, kDevice)...);
  }
  static Tensor batched(Args... args) { return (Op::check(args...), Op::formula(args...)); }

  static void define(torch::Library& m) {
    const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::flexible_layout};
    define_once(m, Op::name, Op::schema, tags);
    define_once(m, backward_name(), Op::backward_schema, tags);
  }
  static void implement(torch::Library& m, decltype(&forward) function, decltype(&backward) backward_function) {
    m.impl(Op::name, function);
    m.impl(backward_name().c_str(), backward_function);
  }
  template <at::DeviceType kDevice>
  static void implement_autocast(torch::Library& m) {
    if constexpr (requires { Op::autocasts; }) m.impl(Op::name, autocast<kDevice>);
  }
};

// Of few words: autograd spells its name out at each backward, which takes longer the more there is in it.
template <class Op>
struct Node : torch::autograd::Function<Node<Op>> {
  using Derivative = typename Operator<Op>::Derivative;
  template <class... Args>
  static Tensor forward(AutogradContext* ctx, const Args&... args) {
    return Derivative::forward(ctx, args...);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return Derivative::backward(ctx, grad);
  }
};

}  // namespace convblocks

#define CONVBLOCKS_REGISTER(Op)                                                                       \
  TORCH_LIBRARY_FRAGMENT(convblocks, m) { Operator<Op>::define(m); }                                  \
  TORCH_LIBRARY_IMPL(convblocks, CPU, m) {                                                            \
    Operator<Op>::implement(m, Operator<Op>::forward, Operator<Op>::backward);                        \
  }                                                                                                   \
  TORCH_LIBRARY_IMPL(convblocks, CUDA, m) {                                                           \
    Operator<Op>::implement(m, Operator<Op>::forward, Operator<Op>::backward);                        \
  }                                                                                                   \
  TORCH_LIBRARY_IMPL(convblocks, CompositeExplicitAutograd, m) {                                      \
    Operator<Op>::implement(m, Operator<Op>::fallback, Operator<Op>::fallback_backward);              \
  }                                                                                                   \
  TORCH_LIBRARY_IMPL(convblocks, Meta, m) {                                                           \
    Operator<Op>::implement(m, Operator<Op>::meta, Operator<Op>::backward_meta);                      \
  }                                                                                                   \
  TORCH_LIBRARY_IMPL(convblocks, Autograd, m) {                                                       \
    Operator<Op>::implement(m, Operator<Op>::autograd, Operator<Op>::backward_autograd);              \
  }                                                                                                   \
  TORCH_LIBRARY_IMPL(convblocks, AutocastCPU, m) { Operator<Op>::implement_autocast<at::kCPU>(m); }   \
  TORCH_LIBRARY_IMPL(convblocks, AutocastCUDA, m) { Operator<Op>::implement_autocast<at::kCUDA>(m); } \
  TORCH_LIBRARY_IMPL(convblocks, FuncTorchBatched, m) {                                               \
    Operator<Op>::implement(m, Operator<Op>::batched, Op::backward_formula);                          \
  }
