// The products of the layers with pooled numbers. They are bound by reading the weights, so each block takes several
// samples to one reading.
#include "layers.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSamples = 4;   // of a block in a product
constexpr int kAcross = 8;    // lanes across a row in a product with the transposed weights
constexpr int kColumns = 32;  // lanes across a row of a gradient of weights
constexpr int kRows = 4;      // of a block in a gradient of weights

// What is done with a product's numbers. Activated: z is kept for the backward.
template <class T>
struct Hidden {
  Acc<T>*z, *h;  // [sample][unit]; z may be null
  Activation activation;
  __device__ void operator()(int64_t i, Acc<T> logit) const {
    if (z) z[i] = logit;
    h[i] = activate(logit, activation);
  }
};
// Gated: in the backward with the loss's slopes by the logits.
template <class T>
struct Gated {
  Acc<T>*gates, *slopes;  // [sample][channel]; slopes may be null
  Gate gate;
  Pooled<Acc<T>> dots;
  T* out = nullptr;         // where the gates go instead
  const T* grad = nullptr;  // of the gates, instead of the dots
  __device__ void operator()(int64_t plane, Acc<T> logit) const {
    const Acc<T> gated = apply_gate(logit, gate);
    if (out)
      out[plane] = static_cast<T>(gated);
    else
      gates[plane] = gated;
    if (!slopes) return;
    const Acc<T> slope = grad ? static_cast<Acc<T>>(grad[plane]) : dots.total(dots.dot, plane);
    slopes[plane] = gate_grad(slope, logit, gated, gate);
  }
};

// Calls finish(sample * rows + row, the row of the weights times the sample's input + bias): a team for each row and
// kSamples samples.
template <class T, class F>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(Layer<T> layer, Pooled<Acc<T>> input, int64_t samples, F finish) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Quotient place = divide(blockIdx.x * blockDim.y + threadIdx.y, layer.rows);
  const int64_t row = place.remainder, first = int64_t{place.quotient} * kSamples, columns = layer.columns;
  A sums[kSamples] = {};
  if (first < samples) {
    for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) {
      const A weight = layer.weight[row * columns + i];
#pragma unroll
      for (int s = 0; s < kSamples; s++) {
        sums[s] += weight * input.squeeze(min(first + s, samples - 1) * columns + i);
      }
    }
  }
  team_reduce(sums, 1, shared);
  const A bias = layer.bias ? layer.bias[row] * static_cast<A>(layer.biases) : A(0);
  const int thread = threadIdx.x;
#pragma unroll
  for (int s = 0; s < kSamples; s++) {
    if (thread == s && first + s < samples) finish((first + s) * layer.rows + row, sums[s] + bias);
  }
}

// out[sample][column] = the sum over rows of weight[row][column] * input[sample][row], then back through the activation
// of z.
template <class T>
struct Transposed {
  Layer<T> layer;
  const Acc<T>* input;
  Acc<T>* out;
  const Acc<T>* z;  // or null
  Activation activation;
  int64_t samples, inputs;  // the samples take turns at the inputs

  __host__ __device__ unsigned blocks() const { return ceil_div(layer.columns, kAcross) * ceil_div(samples, kSamples); }
  __device__ void run(unsigned block, Acc<T>* shared) const {
    using A = Acc<T>;
    const Quotient place = divide(block, ceil_div(layer.columns, kAcross));
    const int own_row = threadIdx.x / kAcross;
    const int64_t column = place.remainder * kAcross + threadIdx.x % kAcross, first = place.quotient * kSamples;
    A sums[kSamples] = {};
    if (column < layer.columns) {
      for (int64_t row = own_row; row < layer.rows; row += kThreads / kAcross) {
        const A weight = layer.weight[row * layer.columns + column];
#pragma unroll
        for (int s = 0; s < kSamples; s++)
          sums[s] += weight * input[min(first + s, samples - 1) % inputs * layer.rows + row];
      }
    }
    team_reduce(sums, kAcross, shared);
#pragma unroll
    for (int s = 0; s < kSamples; s++) {
      if (own_row == s && column < layer.columns && first + s < samples) {
        const int64_t i = (first + s) * layer.columns + column;
        out[i] = z ? activation_grad(sums[s], z[i], activation) : sums[s];
      }
    }
  }
};

// The gradients of a layer. Of weight[row][column]: the sum over samples of slopes[sample][row] times
// input[sample][column]. Of the bias: the same with one column of ones.
template <class T>
struct WeightGradient {
  Layer<T> grad;
  const Acc<T>* slopes;
  Pooled<Acc<T>> input;
  int64_t samples;

  __host__ __device__ unsigned blocks() const {
    return ceil_div(grad.columns + 1, kColumns) * ceil_div(grad.rows, kRows);
  }
  __device__ void run(unsigned block, Acc<T>* shared) const {
    using A = Acc<T>;
    const Quotient place = divide(block, ceil_div(grad.columns + 1, kColumns));
    const int own_row = threadIdx.x / kColumns;
    const int64_t column = place.remainder * kColumns + threadIdx.x % kColumns, first = place.quotient * kRows;
    A sums[kRows] = {};
    if (column <= grad.columns) {
      for (int64_t s = own_row; s < samples; s += kThreads / kColumns) {
        const A value = column < grad.columns ? input.squeeze(s * grad.columns + column) : static_cast<A>(grad.biases);
#pragma unroll
        for (int r = 0; r < kRows; r++) sums[r] += value * slopes[s * grad.rows + min(first + r, grad.rows - 1)];
      }
    }
    team_reduce(sums, kColumns, shared);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int64_t row = first + r;
      if (own_row != r || row >= grad.rows) continue;
      if (column < grad.columns) grad.weight.set(row * grad.columns + column, sums[r]);
      if (column == grad.columns && grad.bias) grad.bias.set(row, sums[r]);
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) transposed_kernel(Transposed<T> product) {
  CB_DYN_SHARED(Acc<T>, shared);
  product.run(blockIdx.x, shared);
}

// What depends on nothing else any more: the gradients of the squeezed numbers and of the weights.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    gradients_kernel(Transposed<T> squeezed, WeightGradient<T> second, WeightGradient<T> first) {
  CB_DYN_SHARED(Acc<T>, shared);
  unsigned block = blockIdx.x;
  if (block < squeezed.blocks()) return squeezed.run(block, shared);
  block -= squeezed.blocks();
  if (block < second.blocks()) return second.run(block, shared);
  first.run(block - second.blocks(), shared);
}

}  // namespace

template <class T>
Pooled<Acc<T>> Layers<T>::numbers(A* hidden) const {
  Pooled<A> pooled;
  pooled.sum = hidden;
  pooled.chunks = ways_;
  pooled.planes = n_ * w_.reduced;
  return pooled;
}

template <class T>
Pooled<Acc<T>> Layers<T>::hidden(Workspace<A>& workspace, const Pooled<A>& pooled) const {
  if (!w_.reduced) return pooled;
  A* const hidden = workspace.take(ways_ * n_ * w_.reduced);
  product(layer(w_.w1, w_.b1, w_.reduced, c_), pooled, ways_ * n_, Hidden<T>{nullptr, hidden, w_.activation});
  return numbers(hidden);
}

template <class T>
Acc<T>* Layers<T>::gates(Workspace<A>& workspace, const Pooled<A>& input) const {
  A* const gates = workspace.take(n_ * c_);
  product(second(), input, n_, Gated<T>{gates, nullptr, w_.gate, input});
  return gates;
}

template <class T>
void Layers<T>::write_gates(const Pooled<A>& input, void* out) const {
  product(second(), input, n_, Gated<T>{nullptr, nullptr, w_.gate, input, static_cast<T*>(out)});
}

template <class T>
LayerGradients<Acc<T>> Layers<T>::backward(Workspace<A>& workspace, const Pooled<A>& pooled, const Pooled<A>& dots,
                                           const WeightGradients& grads, const void* grad) const {
  const int64_t samples = ways_ * n_;
  A *const z = workspace.take(samples * w_.reduced), *const hidden = workspace.take(samples * w_.reduced);
  A *const hidden_slopes = workspace.take(samples * w_.reduced), *const gates = workspace.take(n_ * c_);
  A *const slopes = workspace.take(n_ * c_), *const squeezed = workspace.take(samples * c_);

  const Layer<T> one = layer(w_.w1, w_.b1, w_.reduced, c_), two = second();
  const Pooled<A> input = w_.reduced ? numbers(hidden) : pooled;
  if (w_.reduced) product(one, pooled, samples, Hidden<T>{z, hidden, w_.activation});
  product(two, input, n_, Gated<T>{gates, slopes, w_.gate, dots, nullptr, static_cast<const T*>(grad)});
  Transposed<T> by_squeezed{two, slopes, squeezed, nullptr, w_.activation, n_, n_};
  if (w_.reduced) {
    const Transposed<T> by_hidden{two, slopes, hidden_slopes, z, w_.activation, samples, n_};
    launch(transposed_kernel<T>, by_hidden.blocks(), by_hidden);
    by_squeezed = {one, hidden_slopes, squeezed, nullptr, w_.activation, samples, samples};
  }
  const Layer<T> grad_one = layer(grads.w1, grads.b1, one.rows, one.columns);
  Layer<T> grad_two = layer(grads.w2, grads.b2, two.rows, two.columns);
  grad_two.biases = ways_;
  const WeightGradient<T> by_one{grad_one, hidden_slopes, pooled, samples}, by_two{grad_two, slopes, input, n_};
  launch(gradients_kernel<T>, by_squeezed.blocks() + by_two.blocks() + by_one.blocks(), by_squeezed, by_two, by_one);
  return {gates, squeezed};
}

template <class T>
template <class F>
void Layers<T>::product(const Layer<T>& layer, const Pooled<A>& input, int64_t samples, const F& finish) const {
  const int threads = layer.columns <= 256 ? 32 : 128, teams = threads == 32 ? 4 : 1;
  const int64_t rows = layer.rows * ceil_div(samples, kSamples);
  const auto kernel = product_kernel<T, F>;
  CB_LAUNCH(kernel, ceil_div(rows, teams), dim3(threads, teams), threads / 32 * kSamples * sizeof(A),
            stream_of(context_), layer, input, samples, finish);
}

template <class T>
template <class... Parameters>
void Layers<T>::launch(void (*kernel)(Parameters...), int64_t blocks, const Parameters&... parameters) const {
  const int numbers = std::max(kAcross * kSamples, kColumns * kRows);
  CB_LAUNCH(kernel, blocks, kThreads, kThreads / 32 * numbers * sizeof(A), stream_of(context_), parameters...);
}

template class Layers<float>;
template class Layers<double>;
template class Layers<f16>;
template class Layers<bf16>;

}  // namespace convblocks::cuda
