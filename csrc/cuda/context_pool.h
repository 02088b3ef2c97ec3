// The passes of global context over the maps, which need all channels of a pixel at once: a block keeps the channels of
// a few pixels, a tile, in shared memory, and takes tile after tile. Where not even a sector of each channel fits, it
// reads them from the map again.
#pragma once
#include "reduce.h"
#include "tile.h"

namespace convblocks::cuda {

constexpr int kContextThreads = 256;
constexpr int64_t kContextBytes = 96 << 10;  // shared memory that every GPU from compute capability 8.0 on has
constexpr int kMostPixels = 256;             // of a tile, whose logits a block has a thread for each

// How the maps of a call are cut, `maps` tiles at a time, with `arrays` numbers for each channel beside them.
struct ContextTiling {
  bool channels_last, vectors, kept;
  int samples, channels, pixels, arrays;
  int64_t hw, pitch;  // pitch: between the rows of a tile, in elements
  int splits;         // blocks of a sample
  int64_t tiles;      // of a block
  int64_t bytes;      // of shared memory

  template <class T>
  static ContextTiling make(const Layout& l, int64_t c, int64_t hw, int maps, int arrays) {
    constexpr int V = kVector<T>, kSector = 32 / sizeof(T);
    ContextTiling t{};
    t.channels_last = l.channels_last;
    t.vectors = l.vectors;
    t.samples = static_cast<int>(l.samples);
    t.channels = static_cast<int>(c);
    t.arrays = arrays;
    t.hw = hw;
    const auto tile_bytes = [&] {
      t.pitch = ceil_div(t.channels_last ? c : t.pixels, V) * V + V;
      return maps * t.tile_elements() * static_cast<int64_t>(sizeof(T));
    };
    const int64_t own = t.numbers() * sizeof(Acc<T>);
    for (t.pixels = 32; t.pixels < kMostPixels && t.pixels * c < 2048;) t.pixels *= 2;
    while (t.pixels > (t.channels_last ? 1 : kSector) && own + tile_bytes() > kContextBytes / 2) t.pixels /= 2;
    t.kept = own + tile_bytes() <= kContextBytes;
    t.bytes = own + (t.kept ? tile_bytes() : 0);
    const int64_t all = ceil_div(hw, t.pixels);
    const int64_t worth = ceil_div(4096, c * t.pixels);  // tiles of a block, which leaves a share of each channel
    t.tiles = std::max(worth, ceil_div(all, std::clamp<int64_t>(ceil_div(512, l.samples), 1, 64)));
    t.splits = static_cast<int>(ceil_div(all, t.tiles));
    return t;
  }
  __host__ __device__ int64_t tile_elements() const { return (channels_last ? pixels : channels) * pitch; }
  // In front of the tiles, which they leave aligned.
  __host__ __device__ int64_t numbers() const {
    return ceil_div(int64_t{arrays} * channels + 2 * (kContextThreads + kMostPixels), 4) * 4;
  }
  unsigned blocks() const { return static_cast<unsigned>(int64_t{samples} * splits); }
};

// The channels of some pixels, in shared memory or in the map.
template <class T>
struct Pixels {
  T* data;
  int64_t channel, pixel;
  __device__ T& at(int c, int p) const { return data[c * channel + p * pixel]; }
  __device__ Acc<T> operator()(int c, int p) const { return static_cast<Acc<T>>(data[c * channel + p * pixel]); }
};

// The part of the maps that a block works on.
template <class T>
struct ContextBlock {
  using A = Acc<T>;
  const ContextTiling& t;
  int sample, split;
  A* arrays;   // t.arrays of t.channels
  A* scratch;  // of two numbers for each thread
  A* weights;  // two for each pixel

  __device__ ContextBlock(const ContextTiling& tiling, A* shared)
      : t(tiling), arrays(shared), scratch(shared + int64_t{tiling.arrays} * tiling.channels) {
    const Quotient place = divide(blockIdx.x, t.splits);
    sample = place.quotient;
    split = place.remainder;
    weights = scratch + 2 * kContextThreads;
  }
  // Calls f(first pixel, pixels) for each tile.
  template <class F>
  __device__ void each(F f) const {
    for (int64_t i = 0; i < t.tiles; i++) {
      const int64_t first = (split * t.tiles + i) * t.pixels;
      if (first >= t.hw) return;
      f(first, static_cast<int>(min(int64_t{t.pixels}, t.hw - first)));
    }
  }
  __device__ Pixels<T> in_map(const Map& map, int64_t first) const {
    return {static_cast<T*>(map.data) + sample * map.batch + first * map.pixel, map.channel, map.pixel};
  }
  __device__ Pixels<T> tile(int number) const {
    T* const data = reinterpret_cast<T*>(arrays + t.numbers()) + number * t.tile_elements();
    return t.channels_last ? Pixels<T>{data, 1, t.pitch} : Pixels<T>{data, t.pitch, 1};
  }
  // Calls f(channel, pixel, vector) for all vectors of a tile; each is of V elements along the rows.
  template <int V, class F>
  __device__ void each_vector(int pixels, F f) const {
    const int across = (t.channels_last ? t.channels : pixels) / V, rows = t.channels_last ? pixels : t.channels;
    for (int i = threadIdx.x; i < across * rows; i += kContextThreads) {
      const Quotient place = divide(i, across);
      t.channels_last ? f(place.remainder * V, place.quotient) : f(place.quotient, place.remainder * V);
    }
  }
  template <int V>
  __device__ void copy(const Pixels<T>& from, const Pixels<T>& to, int pixels) const {
    each_vector<V>(pixels, [&](int c, int p) { store(&to.at(c, p), load<V>(&from.at(c, p))); });
  }
  __device__ void copy(const Pixels<T>& from, const Pixels<T>& to, int pixels) const {
    t.vectors ? copy<kVector<T>>(from, to, pixels) : copy<1>(from, to, pixels);
  }
  // The tile, or the map where that is not kept.
  __device__ Pixels<T> fetch(const Map& map, int64_t first, int pixels, int number) const {
    const Pixels<T> from = in_map(map, first);
    if (!t.kept) return from;
    const Pixels<T> to = tile(number);
    copy(from, to, pixels);
    return to;
  }
  // out[p] = the sum over the channels of f(channel, p), for each pixel; all threads may read it on return.
  template <class F>
  __device__ void sum_channels(int pixels, A* out, F f) const {
    const int slots = kContextThreads / t.pixels;
    const Quotient by_pixel = divide(threadIdx.x, t.pixels), by_slot = divide(threadIdx.x, slots);
    const int p = t.channels_last ? by_slot.quotient : by_pixel.remainder;
    const int slot = t.channels_last ? by_slot.remainder : by_pixel.quotient;
    A sum = 0;
    if (p < pixels) {
      for (int c = slot; c < t.channels; c += slots) sum += f(c, p);
    }
    scratch[slot * t.pixels + p] = sum;
    __syncthreads();
    if (threadIdx.x < static_cast<unsigned>(pixels)) {
      A total = 0;
      for (int s = 0; s < slots; s++) total += scratch[s * t.pixels + threadIdx.x];
      out[threadIdx.x] = total;
    }
    __syncthreads();
  }
};

// What a block leaves of its pixels: the maximum of the logits, the sum of their exponentials, and of each channel the
// sums of exponential * x, and in the backward of grad * x and of grad.
template <class A>
struct ContextShares {
  A *maximum, *total, *sums;  // [block]; [block][kind][channel]
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kContextThreads, 2)
    context_pool_kernel(Map x, Map grad, Parameter<T> weight, Parameter<T> bias, ContextTiling tiling,
                        ContextShares<Acc<T>> shares) {
  using A = Acc<T>;
  constexpr int K = kBackward ? 3 : 1;
  CB_DYN_SHARED(A, shared);
  const ContextBlock<T> block(tiling, shared);
  const int channels = tiling.channels;
  for (int c = threadIdx.x; c < K * channels; c += kContextThreads) block.arrays[c] = 0;
  A maximum = weight ? A(-INFINITY) : A(0), total = 0;
  block.each([&](int64_t first, int pixels) {
    const Pixels<T> v = block.fetch(x, first, pixels, 0);
    const Pixels<T> g = kBackward ? block.fetch(grad, first, pixels, 1) : v;
    __syncthreads();
    A* const e = block.weights;
    A rescale = 1;
    if (weight) {
      block.sum_channels(pixels, e, [&](int c, int p) { return weight[c] * v(c, p); });
      const A shift = bias ? 0 * bias[0] : A(0);
      A most = maximum;
      for (int p = 0; p < pixels; p++) most = Max()(most, e[p] + shift);
      const A taken_off = most == A(-INFINITY) ? A(0) : most;  // all of these have exponentials of 0
      rescale = std::exp(maximum - taken_off);
      maximum = most;
      __syncthreads();
      if (threadIdx.x < static_cast<unsigned>(pixels)) e[threadIdx.x] = std::exp(e[threadIdx.x] + shift - taken_off);
      __syncthreads();
      A sum = 0;
      for (int p = 0; p < pixels; p++) sum += e[p];
      total = total * rescale + sum;
    } else {
      total += pixels;
    }
    for (int c = threadIdx.x; c < channels; c += kContextThreads) {
      A sums[3] = {};
      for (int begin = 0; begin < pixels; begin += 16) {  // sums of few lose less to rounding
        A part[3] = {};
        for (int p = begin; p < min(pixels, begin + 16); p++) {
          const A value = v(c, p);
          part[0] += weight ? value * e[p] : value;
          if constexpr (kBackward) {
            const A gradient = g(c, p);
            part[1] += value * gradient;
            part[2] += gradient;
          }
        }
        for (int k = 0; k < K; k++) sums[k] += part[k];
      }
      block.arrays[c] = block.arrays[c] * rescale + sums[0];
      for (int k = 1; k < K; k++) block.arrays[k * channels + c] += sums[k];
    }
    __syncthreads();
  });
  for (int c = threadIdx.x; c < K * channels; c += kContextThreads) {
    shares.sums[int64_t{blockIdx.x} * K * channels + c] = block.arrays[c];
  }
  if (threadIdx.x == 0) {
    shares.maximum[blockIdx.x] = maximum;
    shares.total[blockIdx.x] = total;
  }
}

// Puts the shares of a sample's blocks together: a block for each sample. `numbers`: its maximum, and 1 / its total.
template <class A>
__global__ void __launch_bounds__(kContextThreads, 2)
    context_merge_kernel(ContextShares<A> shares, int splits, int kinds, int channels, A* context, A* dot, A* sum,
                         A* numbers) {
  const int64_t first = int64_t{blockIdx.x} * splits, row = int64_t{blockIdx.x} * channels;
  A maximum = shares.maximum[first], total = 0;
  for (int s = 1; s < splits; s++) maximum = Max()(maximum, shares.maximum[first + s]);
  for (int s = 0; s < splits; s++) total += shares.total[first + s] * std::exp(shares.maximum[first + s] - maximum);
  for (int c = threadIdx.x; c < channels; c += kContextThreads) {
    A weighted = 0, dots = 0, grads = 0;
    for (int s = 0; s < splits; s++) {
      const A* const share = shares.sums + (first + s) * kinds * channels + c;
      weighted += share[0] * std::exp(shares.maximum[first + s] - maximum);
      if (kinds > 1) {
        dots += share[channels];
        grads += share[2 * channels];
      }
    }
    context[row + c] = weighted / total;
    if (kinds > 1) {
      dot[row + c] = dots;
      sum[row + c] = grads;
    }
  }
  if (threadIdx.x == 0) {
    numbers[2 * blockIdx.x] = maximum;
    numbers[2 * blockIdx.x + 1] = 1 / total;
  }
}

// grad_x = grad * scale + a gc + dz w, dz = a <gc, x - c>; and the block's share in the gradient of the weight, the sum
// of dz (x - c), and in that of the bias. dz sums to 0: what is taken away changes nothing, but where one pixel has all
// attention the rest is exactly 0.
template <class T>
__global__ void __launch_bounds__(kContextThreads, 2)
    context_gradient_kernel(Map x, Map grad, Map grad_x, Parameter<T> weight, Parameter<T> bias, ContextTiling tiling,
                            const Acc<T>* scale, const Acc<T>* context, const Acc<T>* grad_context,
                            const Acc<T>* numbers, Acc<T>* shares) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const ContextBlock<T> block(tiling, shared);
  const int channels = tiling.channels;
  const int64_t row = int64_t{block.sample} * channels;
  const A *const mean = context + row, *const gc = grad_context + row, *const gate = scale + row;
  for (int c = threadIdx.x; c < channels; c += kContextThreads) block.arrays[c] = 0;
  const A maximum = numbers[2 * block.sample], factor = numbers[2 * block.sample + 1];
  A total = 0;
  block.each([&](int64_t first, int pixels) {
    const Pixels<T> v = block.fetch(x, first, pixels, 0), g = block.fetch(grad, first, pixels, 1);
    const Pixels<T> out = block.in_map(grad_x, first), kept = tiling.kept ? g : out;
    __syncthreads();
    A *const attention = block.weights, *const dz = attention + kMostPixels;
    block.sum_channels(pixels, attention, [&](int c, int p) { return weight[c] * v(c, p); });
    block.sum_channels(pixels, dz, [&](int c, int p) { return gc[c] * (v(c, p) - mean[c]); });
    if (threadIdx.x < static_cast<unsigned>(pixels)) {
      const A a = std::exp(attention[threadIdx.x] + (bias ? 0 * bias[0] : A(0)) - maximum) * factor;
      attention[threadIdx.x] = a;
      dz[threadIdx.x] *= a;
    }
    __syncthreads();
    for (int p = 0; p < pixels; p++) total += dz[p];
    for (int c = threadIdx.x; c < channels; c += kContextThreads) {
      A sum = 0;
      for (int p = 0; p < pixels; p++) {
        sum += dz[p] * (v(c, p) - mean[c]);
        kept.at(c, p) = static_cast<T>(g(c, p) * gate[c] + attention[p] * gc[c] + dz[p] * weight[c]);
      }
      block.arrays[c] += sum;
    }
    __syncthreads();
    if (tiling.kept) {
      block.copy(kept, out, pixels);
      __syncthreads();
    }
  });
  for (int c = threadIdx.x; c < channels; c += kContextThreads) {
    shares[int64_t{blockIdx.x} * (channels + 1) + c] = block.arrays[c];
  }
  if (threadIdx.x == 0) shares[int64_t{blockIdx.x} * (channels + 1) + channels] = total;
}

}  // namespace convblocks::cuda
