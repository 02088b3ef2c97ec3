#include "cbam.h"

#include "layer_formula.h"
#include "norm_factors.h"
#include "op.h"

namespace convblocks {
namespace {

// What inference on the CPU does at once. It returns nothing where the tensors are not of one dtype on the CPU, or do not
// fit together: the modules, which then run one operation after the other, say why.
bool alike(const Tensor& t, const Tensor& x) {
  return t.is_cpu() && t.layout() == at::kStrided && t.scalar_type() == x.scalar_type();
}
bool is_vector(const MaybeTensor& t, const Tensor& x, int64_t size) {
  return !t.has_value() || (alike(*t, x) && t->numel() == size);
}
bool is_layer(const Tensor& w, const Tensor& x, int64_t rows, int64_t columns) {
  return alike(w, x) && is_matrix(w, columns) && w.size(0) == rows && rows > 0;
}

// The convolution to one plane, and the norm and the gate after it. torch's convolutions take several times as long for so
// few channels.
struct PixelGates {
  Tensor weight;
  NormFactors norm;
  Gate gate;

  PixelGates(const Tensor& weight_, const NormFactors& norm_, Gate gate_)
      : weight(weight_.contiguous()), norm(norm_), gate(gate_) {}

  static std::optional<PixelGates> of(const char* op, const Tensor& x, int64_t planes, const Tensor& weight,
                                      const MaybeTensor& bias, const MaybeTensor& mean, const MaybeTensor& var,
                                      const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                                      std::string_view gate) {
    const bool floats = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    const bool square = weight.dim() == 4 && weight.size(0) == 1 && weight.size(1) == planes &&
                        weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1;
    if (!floats || !alike(x, x) || is_empty(x) || !square || !alike(weight, x) || !is_vector(bias, x, 1)) return {};
    if (mean.has_value() != var.has_value() || !is_vector(mean, x, 1) || !is_vector(var, x, 1)) return {};
    if (!is_vector(gamma, x, 1) || !is_vector(beta, x, 1)) return {};
    return PixelGates(weight, NormFactors(bias, mean, var, gamma, beta, eps), gate_of(op, gate));
  }
  PixelKernel kernel() const {
    return {weight.size(2), weight.const_data_ptr(), data_of(norm.scale), data_of(norm.shift), gate};
  }
};

KernelSlot pixel_gates_slot{"convblocks_pixel_gates", false};
KernelSlot cbam_slot{"convblocks_cbam", false};

MaybeTensor pixel_gates(const Tensor& planes, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& mean,
                        const MaybeTensor& var, const MaybeTensor& gamma, const MaybeTensor& beta, double eps,
                        std::string_view gate) {
  if (!pixel_gates_slot.on(planes) || planes.dim() != 4) return std::nullopt;
  const int64_t n = planes.size(0), count = planes.size(1), h = planes.size(2), w = planes.size(3);
  const auto pixels = PixelGates::of("_pixel_gates", planes, count, weight, bias, mean, var, gamma, beta, eps, gate);
  if (!pixels.has_value()) return std::nullopt;
  const Walk from(planes, memory_format(planes));
  Tensor out = at::empty({n, 1, h, w}, planes.options());
  Call("_pixel_gates", pixel_gates_slot,
       planes)(PixelGatesArgs{dtype_of(planes), n, count, h, w, pixels->kernel(), from.map, out.data_ptr()});
  return out;
}

// The whole block.
MaybeTensor cbam(const Tensor& x, const Tensor& w1, const MaybeTensor& b1, const Tensor& w2, const MaybeTensor& b2,
                 const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& mean, const MaybeTensor& var,
                 const MaybeTensor& gamma, const MaybeTensor& beta, double eps, std::string_view activation,
                 std::string_view gate, bool residual) {
  if (!cbam_slot.on(x) || x.dim() != 4) return std::nullopt;
  const int64_t n = x.size(0), c = x.size(1), r = w1.dim() ? w1.size(0) : 0;
  const auto pixels = PixelGates::of("_cbam", x, 2, weight, bias, mean, var, gamma, beta, eps, gate);
  if (!pixels.has_value() || !is_layer(w1, x, r, c) || !is_layer(w2, x, c, r)) return std::nullopt;
  if (!is_vector(b1, x, r) || !is_vector(b2, x, c)) return std::nullopt;
  const DenseLayers layers(dtype_of(x), w1, b1, w2, b2, activation_of("_cbam", activation), pixels->gate);
  const Tensor y = empty_map(x);
  const auto format = walk_format(x);
  const Walk from(x, format), to(y, format);
  Call("_cbam", cbam_slot, x)(
      CbamArgs{dtype_of(x), n, c, x.size(2), x.size(3), layers.weights, pixels->kernel(), residual, from.map, to.map});
  return y;
}

constexpr const char* kPixelGatesSchema =
    "(Tensor planes, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, Tensor? gamma, Tensor? beta, float eps, "
    "str gate) -> Tensor?";
constexpr const char* kCbamSchema =
    "(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "Tensor? gamma, Tensor? beta, float eps, str activation, str gate, bool residual) -> Tensor?";

}  // namespace

TORCH_LIBRARY_FRAGMENT(convblocks, m) {
  define_once(m, "_pixel_gates", kPixelGatesSchema);
  define_once(m, "_cbam", kCbamSchema);
}
TORCH_LIBRARY_IMPL(convblocks, CompositeExplicitAutograd, m) {
  m.impl("_pixel_gates", pixel_gates);
  m.impl("_cbam", cbam);
}

}  // namespace convblocks
