// The small layers that gates are made of: their checks (convblocks/ops/checks.py says the same), as ATen formulas, and
// as the kernels take them.
#pragma once
#include "gate_formula.h"
#include "op.h"
#include "squeeze_excite.h"

namespace convblocks {

using MaybeTensor = std::optional<Tensor>;

inline bool is_matrix(const Tensor& w, const c10::SymInt& columns) {
  const bool ones = w.dim() == 2 || (w.dim() == 4 && w.sym_size(2) == 1 && w.sym_size(3) == 1);
  return ones && w.sym_size(1) == columns;
}

inline void check_matrix(const char* op, const char* name, const Tensor& w, const c10::SymInt& rows,
                         const c10::SymInt& columns) {
  TORCH_CHECK_VALUE(is_matrix(w, columns) && w.sym_size(0) == rows, op, ": expected ", name, " of size [", rows, ", ",
                    columns, "] or [", rows, ", ", columns, ", 1, 1], got ", size_of(w));
}

// How many outputs a first layer has.
inline c10::SymInt check_hidden_size(const char* op, const Tensor& w1, const c10::SymInt& columns,
                                     const char* name = "w1") {
  TORCH_CHECK_VALUE(is_matrix(w1, columns) && w1.sym_size(0) > 0, op, ": expected ", name, " of size [R, ", columns,
                    "] or [R, ", columns, ", 1, 1], got ", size_of(w1));
  return w1.sym_size(0);
}

inline void check_vector(const char* op, const char* name, const MaybeTensor& t, const c10::SymInt& length) {
  TORCH_CHECK_VALUE(!t.has_value() || (t->dim() == 1 && t->sym_size(0) == length), op, ": expected ", name,
                    " of size [", length, "], got ", size_of(*t));
}

inline Activation activation_of(const char* op, std::string_view text) {
  return static_cast<Activation>(check_one_of(op, "activation", text, kActivationNames));
}
inline Gate gate_of(const char* op, std::string_view text) {
  return static_cast<Gate>(check_one_of(op, "gate", text, kGateNames));
}

// Parameters and what they are made to meet: the dtype of x.
inline Tensor layer_weight(const Tensor& w, const Tensor& x) { return w.flatten(1).to(x.scalar_type()); }
inline MaybeTensor layer_bias(const MaybeTensor& b, const Tensor& x) {
  return b.has_value() ? MaybeTensor(b->to(x.scalar_type())) : b;
}
// A parameter's gradient in its size and dtype.
inline Tensor gradient_like(const Tensor& g, const Tensor& parameter) {
  return g.reshape_symint(parameter.sym_sizes()).to(parameter.scalar_type());
}
// A number for each channel, of all its pixels.
inline Tensor plane(const Tensor& t) { return t.unsqueeze(-1).unsqueeze(-1); }

// The layers as the kernels take them; keeps copies of the rare tensors that are not contiguous alive.
struct DenseLayers {
  std::array<MaybeTensor, 4> tensors;
  SqueezeExciteWeights weights;
  DenseLayers(Dtype dtype, const MaybeTensor& w1, const MaybeTensor& b1, const MaybeTensor& w2, const MaybeTensor& b2,
              Activation activation, Gate gate, bool add_maxpool = false)
      : tensors{w1, b1, w2, b2} {
    for (auto& t : tensors) {
      if (t.has_value()) t = t->contiguous();
    }
    weights = {dtype,
               w1.has_value() ? w1->size(0) : 0,
               data_of(tensors[0]),
               data_of(tensors[1]),
               data_of(tensors[2]),
               data_of(tensors[3]),
               activation,
               gate,
               add_maxpool};
  }
};

}  // namespace convblocks
