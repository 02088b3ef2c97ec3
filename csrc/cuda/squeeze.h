// What gates computed from pooled channels share: the pass that pools a map, and the pass that applies the gates. The
// gradient of such an operation has the same two passes: one also sums grad * x, the other scales and shifts grad.
#pragma once
#include "activation.h"
#include "reduce.h"
#include "tile.h"

namespace convblocks::cuda {

// What a map's planes are pooled to, each [chunk][plane]: tiles leave their shares, and whoever reads adds them up.
template <class A>
struct Pooled {
  A *sum = nullptr, *dot = nullptr;   // of x, and of grad * x
  A *max = nullptr, *ties = nullptr;  // the maximum, and how many pixels are it; null where it is not wanted
  int chunks = 1;
  bool both = false;  // mean and maximum are two numbers: the maxima follow the means of all planes
  int64_t planes = 0;
  A mean_scale = 1;  // 1 / pixels

  Pooled() = default;
  Pooled(Workspace<A>& workspace, int64_t planes, int64_t pixels, int chunks, bool backward, bool maximum,
         bool both = false)
      : chunks(chunks), both(both), planes(planes), mean_scale(A(1) / pixels) {
    const auto take = [&](bool wanted) { return wanted ? workspace.take(planes * chunks) : nullptr; };
    sum = take(true);
    dot = take(backward && !both);
    max = take(maximum);
    ties = take(backward && maximum);
  }
  static int64_t size(int64_t planes, int chunks, bool backward, bool maximum, bool both = false) {
    return planes * chunks * ((1 + backward) * (1 + maximum) - (backward && both));
  }

  __device__ A total(const A* part, int64_t plane) const {
    A total = part[plane];
#pragma unroll 1
    for (int chunk = 1; chunk < chunks; chunk++) total += part[chunk * planes + plane];
    return total;
  }
  __device__ A maximum(int64_t plane) const {
    A most = max[plane];
#pragma unroll 1
    for (int chunk = 1; chunk < chunks; chunk++) most = Max()(most, max[chunk * planes + plane]);
    return most;
  }
  __device__ A tied(int64_t plane) const {
    const A most = maximum(plane);
    A total = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
      if (max[chunk * planes + plane] == most) total += ties[chunk * planes + plane];
    }
    return total;
  }
  // Mean, or half mean and half maximum.
  __device__ A squeeze(int64_t plane) const {
    if (both && plane >= planes) return maximum(plane - planes);
    const A mean = total(sum, plane) * mean_scale;
    return max && !both ? (mean + maximum(plane)) / 2 : mean;
  }
};

// A channel's linear function of its sample's `inputs` pooled numbers: a row of a matrix, or a filter that slides over
// the channels.
template <class T>
struct Linear {
  using A = Acc<T>;
  Parameter<T> weight, bias;
  Pooled<A> input;
  int inputs = 0, taps = 0;
  int slide = 0;  // 0: a matrix of rows of `taps`; 1 or -1: one filter, forward or backward
  bool circular = false;

  __device__ A term(int64_t sample, int channel, int tap) const {
    int i = tap;
    if (slide != 0) {
      i = channel + slide * (tap - taps / 2);
      if (i < 0 || i >= inputs) {
        if (!circular) return 0;
        i += i < 0 ? inputs : -inputs;
      }
    }
    return input.squeeze(sample * inputs + i);
  }
  // For `lanes` neighbouring lanes of a warp, which all get the result.
  __device__ A operator()(int64_t sample, int64_t channel, int lane, int lanes) const {
    A total = 0;
#pragma unroll 2
    for (int tap = lane; tap < taps; tap += lanes) {
      total += weight[slide == 0 ? channel * taps + tap : tap] * term(sample, channel, tap);
    }
    for (int apart = lanes / 2; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffffu, total, apart);
    return bias ? total + bias[slide == 0 ? channel : 0] : total;
  }
};

// What becomes of a plane: in * scale + shift, and at_max more where x is max.
template <class A>
struct Change {
  A scale, shift, max, at_max;
};

template <class T>
struct Changes {
  using A = Acc<T>;
  // Forward: the gates of the planes. Backward: the gradients of the squeezed numbers. Null: `linear` computes them.
  const A* values = nullptr;
  Linear<T> linear;
  Gate gate = Gate::sigmoid;
  const A* gates = nullptr;  // backward
  Pooled<A> pooled;          // backward

  // Lanes that compute the change of a plane together.
  __device__ int lanes() const { return values || linear.slide != 0 ? 1 : 8; }
  __device__ Change<A> operator()(int64_t sample, int channel, int channels, int lane) const {
    const int64_t plane = sample * channels + channel;
    const A value = values ? values[plane] : linear(sample, channel, lane, lanes());
    if (pooled.both) {
      return {0, value * pooled.mean_scale, pooled.maximum(plane), values[pooled.planes + plane] / pooled.tied(plane)};
    }
    if (!gates) return {values ? value : apply_gate(value, gate), 0, 0, 0};
    if (!pooled.max) return {gates[plane], value * pooled.mean_scale, 0, 0};
    return {gates[plane], value / 2 * pooled.mean_scale, pooled.maximum(plane), value / 2 / pooled.tied(plane)};
  }
};

// Pools x, and grad * x if there is a grad; how many pixels have the maximum, where `pooled` has ties.
template <class T>
void pool(const Context& context, const Layout& layout, const Tiling& tiling, const Map& x, const Map* grad,
          const Pooled<Acc<T>>& pooled);

// out = in * scale + shift, or without `in` (its data is null) the shift alone; x is read only where a change depends on
// the maximum.
template <class T>
void apply(const Context& context, const Layout& layout, const Map& in, const Map& x, const Map& out,
           const Changes<T>& changes);

}  // namespace convblocks::cuda
