// What registration asks of an operation's arguments, whatever their types: a map, a list of maps, a tensor that may be
// absent, or no tensor at all.
#pragma once
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace convblocks {

using at::Tensor;

inline bool has_tangent(const Tensor& t) { return torch::autograd::isFwGradDefined(t); }
inline bool has_tangent(const std::optional<Tensor>& t) { return t.has_value() && has_tangent(*t); }
inline bool has_tangent(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return has_tangent(t); });
}
template <class T>
bool has_tangent(const T&) {
  return false;
}
inline bool wants_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool wants_grad(const std::optional<Tensor>& t) { return t.has_value() && wants_grad(*t); }
inline bool wants_grad(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return wants_grad(t); });
}
template <class T>
bool wants_grad(const T&) {
  return false;
}

// The map that says what the output is like, and whether there is nothing to compute.
inline const Tensor& first_map(const Tensor& x) { return x; }
inline const Tensor& first_map(at::TensorList maps) { return maps.front(); }
inline bool is_empty(const Tensor& x) { return x.numel() == 0; }
inline bool is_empty(at::TensorList maps) {
  return std::all_of(maps.begin(), maps.end(), [](auto& t) { return is_empty(t); });
}
inline std::vector<c10::SymInt> channels_of(at::TensorList maps) {
  std::vector<c10::SymInt> channels;
  for (const Tensor& t : maps) channels.push_back(t.sym_size(1));
  return channels;
}

// Whether a kernel may read it as it lies. Under a mode, too: who passes the dispatcher by has to ask for that besides.
inline bool is_plain(const Tensor& t) {
  return !has_tangent(t) && !t.is_neg() && !t._is_zerotensor() && !t.key_set().has_any(at::kTensorSubclassLike);
}
inline bool is_plain(const std::optional<Tensor>& t) { return !t.has_value() || is_plain(*t); }
template <class T>
bool is_plain(const T&) {
  return true;
}

template <class T>
bool is_missing(const T& arg) {
  if constexpr (std::is_same_v<T, Tensor>) return !arg.defined();
  return false;
}

template <class T>
constexpr bool is_tensor_argument =
    std::is_same_v<std::decay_t<T>, Tensor> || std::is_same_v<std::decay_t<T>, std::optional<Tensor>>;

}  // namespace convblocks
