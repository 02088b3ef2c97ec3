// Checks of the small layers that gates are made of (convblocks/ops/checks.py says the same).
#pragma once
#include "op.h"

namespace convblocks {

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
inline c10::SymInt check_hidden_size(const char* op, const Tensor& w1, const c10::SymInt& columns) {
  TORCH_CHECK_VALUE(is_matrix(w1, columns) && w1.sym_size(0) > 0, op, ": expected w1 of size [R, ", columns,
                    "] or [R, ", columns, ", 1, 1], got ", size_of(w1));
  return w1.sym_size(0);
}

inline void check_vector(const char* op, const char* name, const std::optional<Tensor>& t, const c10::SymInt& length) {
  TORCH_CHECK_VALUE(!t.has_value() || (t->dim() == 1 && t->sym_size(0) == length), op, ": expected ", name,
                    " of size [", length, "], got ", size_of(*t));
}

}  // namespace convblocks
