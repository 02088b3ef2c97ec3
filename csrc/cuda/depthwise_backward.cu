// The gradients of depthwise convolutions with usual filters, all in one pass. For its tile a block computes the inner
// gradient, of what the activation was given, in shared memory, also in a margin around it that the pixels of x need;
// from there the gradient of x, by gathering, and what the tile adds to those of the filters, which threads keep in
// registers over all tiles of their block.
#include "depthwise.h"
#include "reduce.h"

namespace convblocks::cuda::depthwise {
namespace {

// Along one side of a backward tile of `size` windows and size * S pixels of x. The windows in shared memory start
// `before` the tile's own. Pixels are worked on in groups of `group`, from `shift` before the first one on, so that it is
// known which taps meet them: window `base` of those in shared memory is the first one that meets the first group.
template <int K, int S>
struct Margin {
  int before, shift, base, pixel_groups, windows;
  __host__ __device__ Margin(int size, int padding, int group, int round)
      : before(max(0, (K - 1 - padding + padding % S) / S)), shift(padding % S),
        base((padding - shift - (K - 1)) / S + before), pixel_groups((size * S + shift + group - 1) / group),
        windows((max(before + size, base + pixel_groups * (group / S) + (K - 1) / S) + round - 1) / round * round) {}
};

template <int K, int S, class A>
struct BackwardTile {
  static constexpr int kPixels = kRows * S;  // rows that a thread works on at a time
  const Margin<K, S> rows, columns;
  const int margin_rows, margin_columns;  // of windows for which x is there, before the tile's own
  const Tile<A> inner, x;
  __host__ __device__ BackwardTile(const Tiling& t, bool is_linear, A* shared)
      : rows(t.height, t.top, kPixels, kRows), columns(t.width, t.left, S, 1), margin_rows(is_linear ? 0 : rows.before),
        margin_columns(is_linear ? 0 : columns.before), inner(t, shared, rows.windows, columns.windows),
        x(t, shared + inner.size(), ((is_linear ? t.height : rows.windows) - 1) * S + K,
          ((is_linear ? t.width : columns.windows) - 1) * S + K) {}
  __host__ __device__ int size() const { return inner.size() + x.size(); }
};

template <int K, int S, class T>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(Tiling t, Planes<const T> x, Planes<const T> grad, Planes<T> grad_x, Parameter<T> weight,
                    Parameter<T> bias, bool x_vectors, bool grad_vectors, Activation activation, Acc<T>* sums) {
  using A = Acc<T>;
  constexpr int V = kVector<T>, kTaps = K * K;
  CB_DYN_SHARED(A, shared);
  const bool is_linear = activation == Activation::none;
  const BackwardTile<K, S, A> tile(t, is_linear, shared);
  const int group = blockIdx.x % t.groups, first = group * t.channels, left = t.all_channels - first;
  const int64_t chunks = gridDim.x / t.groups, chunk = blockIdx.x / t.groups;
  const Filters<K, A> filters(t, shared + tile.size(), weight, bias, first);
  const Lane lane(t);
  const bool is_there = lane.channel < left;
  bool finite = true;
  A total[K][K] = {}, bias_total[1] = {};

  for (int64_t piece = chunk; piece < t.pieces(); piece += chunks) {
    const int64_t sample = piece / (t.rows * t.columns);
    const int place = static_cast<int>(piece % (t.rows * t.columns));
    const int row = place / t.columns * t.height, column = place % t.columns * t.width;
    const int top = row - tile.rows.before, side = column - tile.columns.before;
    const int x_top = (row - tile.margin_rows) * S - t.top, x_side = (column - tile.margin_columns) * S - t.left;
    __syncthreads();
    if (x_vectors)
      fill<V>(tile.x, x, t.channels_last, sample, first, left, x_top, x_side, t.h, t.w);
    else
      fill<1>(tile.x, x, t.channels_last, sample, first, left, x_top, x_side, t.h, t.w);
    if (grad_vectors)
      fill<V>(tile.inner, grad, t.channels_last, sample, first, left, top, side, t.out_h, t.out_w);
    else
      fill<1>(tile.inner, grad, t.channels_last, sample, first, left, top, side, t.out_h, t.out_w);
    __syncthreads();
    if (is_there && piece == chunk) finite = filters.finite(lane.channel);

    if (!is_linear) {
      const int items = tile.inner.columns * (tile.inner.rows / kRows);
      for (int i = is_there ? lane.slot : items; i < items; i += t.threads) {
        const int r0 = i / tile.inner.columns * kRows, w = i % tile.inner.columns;
        if (side + w < 0 || side + w >= t.out_w) continue;
        A z[kRows];
        convolve<K, S>(tile.x, filters, finite, lane.channel, r0 * S, w * S, x_top + r0 * S, x_side + w * S, t.h, t.w,
                       z);
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          A* const value = tile.inner.at(lane.channel, r0 + r, w);
          if (top + r0 + r >= 0 && top + r0 + r < t.out_h) *value = activation_grad(*value, z[r], activation);
        }
      }
      __syncthreads();
    }

    const int items = t.width * (t.height / kRows);
    for (int i = is_there ? lane.slot : items; i < items; i += t.threads) {
      const int r0 = i / t.width * kRows, w = i % t.width;
      if (row + r0 >= t.out_h || column + w >= t.out_w) continue;
      const A* const p = tile.x.at(lane.channel, (tile.margin_rows + r0) * S, (tile.margin_columns + w) * S);
      const A* const q = tile.inner.at(lane.channel, tile.rows.before + r0, tile.columns.before + w);
      A inner[kRows];
#pragma unroll
      for (int r = 0; r < kRows; r++) {
        inner[r] = q[r * tile.inner.row];
        bias_total[0] += inner[r];  // zero below the map
      }
#pragma unroll
      for (int kw = 0; kw < K; kw++) {
        A values[(kRows - 1) * S + K];
#pragma unroll
        for (int k = 0; k < (kRows - 1) * S + K; k++) values[k] = p[k * tile.x.row + kw * tile.x.column];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          if (row + r0 + r < t.out_h) {  // below, an Inf of x would meet a zero
#pragma unroll
            for (int kh = 0; kh < K; kh++) total[kh][kw] += inner[r] * values[r * S + kh];
          }
        }
      }
    }

    constexpr int kPixels = BackwardTile<K, S, A>::kPixels;
    const int width = t.width * S, pixel_items = width * tile.rows.pixel_groups;
    for (int i = is_there ? lane.slot : pixel_items; i < pixel_items; i += t.threads) {
      const int at = i / width, w = i % width;
      const int in_row = row * S + at * kPixels - tile.rows.shift, in_column = column * S + w;
      if (in_row >= t.h || in_column >= t.w) continue;
      const int phase = (in_column + t.left) % S;  // the first tap across that meets the column
      const A* const p = tile.inner.at(lane.channel, tile.rows.base + at * kRows, 0);
      const int last = (in_column + t.left - phase) / S - side;  // the window of that tap
      A gradient[kPixels] = {};
      if (finite) {
#pragma unroll
        for (int tap = 0; tap < (K + S - 1) / S; tap++) {
          const int kw = phase + tap * S;
          if (kw >= K) continue;
          A values[kRows + (K - 1) / S];
#pragma unroll
          for (int k = 0; k < kRows + (K - 1) / S; k++)
            values[k] = p[k * tile.inner.row + (last - tap) * tile.inner.column];
#pragma unroll
          for (int kh = 0; kh < K; kh++) {
            const A weight = filters.get(lane.channel, kh * K + kw);
#pragma unroll
            for (int r = 0; r < kPixels; r++) {
              if ((r + K - 1 - kh) % S == 0) gradient[r] += weight * values[(r + K - 1 - kh) / S];
            }
          }
        }
      } else {
#pragma unroll
        for (int r = 0; r < kPixels; r++) {
#pragma unroll 1
          for (int k = 0; k < kTaps; k++) {
            const int kh = k / K, kw = k % K;
            if ((r + K - 1 - kh) % S || (kw - phase) % S) continue;
            const int down = tile.rows.base + at * kRows + (r + K - 1 - kh) / S, across = last - (kw - phase) / S;
            if (top + down >= 0 && top + down < t.out_h && side + across >= 0 && side + across < t.out_w)
              gradient[r] += filters.get(lane.channel, k) * *tile.inner.at(lane.channel, down, across);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kPixels; r++) {
        const int own = at * kPixels + r - tile.rows.shift;
        if (own >= 0 && own < t.height * S && row * S + own < t.h)
          *grad_x.at(sample, first + lane.channel, int64_t{row * S + own} * t.w + in_column) =
              static_cast<T>(gradient[r]);
      }
    }
  }

  __syncthreads();
  const int width = t.channels_last ? t.channels : 1;
  A* const scratch = shared + threadIdx.y * (blockDim.x / 32 * K);  // of a team: threads in a row
  A* const to = sums + chunk * (kTaps + 1) * t.all_channels + first + lane.channel;
#pragma unroll
  for (int kh = 0; kh < K; kh++) {
    team_reduce(total[kh], width, scratch);
#pragma unroll
    for (int kw = 0; kw < K; kw++) {
      if (lane.slot == 0 && is_there) to[int64_t{kh * K + kw} * t.all_channels] = total[kh][kw];
    }
  }
  team_reduce(bias_total, width, scratch);
  if (lane.slot == 0 && is_there) to[int64_t{kTaps} * t.all_channels] = bias_total[0];
}

// Adds up `count` shares of the gradients of the filters, each [tap][channel], of which the last tap is the bias.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    add_up_kernel(const Acc<T>* sums, int64_t count, int taps, int64_t channels, Parameter<T> grad_weight,
                  Parameter<T> grad_bias) {
  using A = Acc<T>;
  __shared__ A shared[kThreads];
  const int64_t at = int64_t{blockIdx.x} * 32 + threadIdx.x % 32, size = taps * channels;
  A total[1] = {};
  if (at < size) {
#pragma unroll 4
    for (int64_t i = threadIdx.x / 32; i < count; i += kThreads / 32) total[0] += sums[i * size + at];
  }
  team_reduce(total, 32, shared);
  if (threadIdx.x >= 32 || at >= size) return;
  const int64_t tap = at / channels, channel = at % channels;
  if (tap < taps - 1)
    grad_weight.set(channel * (taps - 1) + tap, total[0]);
  else if (grad_bias)
    grad_bias.set(channel, total[0]);
}

template <int K, int S, class T>
bool launch(const Context& context, const DepthwiseConv2dBackwardArgs& args, bool channels_last) {
  using A = Acc<T>;
  const DepthwiseConv2dWeights& w = args.weights;
  const bool is_linear = w.activation == Activation::none;
  const auto bytes = [&](const Tiling& t) {
    const int64_t elements = BackwardTile<K, S, A>(t, is_linear, nullptr).size() + Filters<K, A>::size(t);
    const int64_t reduce = kThreads / 32 * K * (channels_last ? t.channels : 1);
    return std::max(elements, reduce) * static_cast<int64_t>(sizeof(A));
  };
  Tiling t;
  if (!find_tiling<T>(args.shape, channels_last, S, bytes, t)) return false;
  const int64_t chunks = std::min(t.pieces(), ceil_div(2048, t.groups));
  Workspace<A> workspace(context, chunks * (K * K + 1) * t.all_channels);
  A* const sums = workspace.take(chunks * (K * K + 1) * t.all_channels);
  CB_LAUNCH((backward_kernel<K, S, T>), static_cast<unsigned>(chunks * t.groups), t.block(), bytes(t),
            stream_of(context), t, Planes<const T>(args.x), Planes<const T>(args.grad), Planes<T>(args.grad_x),
            Parameter<T>(w.weight, w.dtype), Parameter<T>(w.bias, w.dtype), aligned<T>(args.x, t, t.w),
            aligned<T>(args.grad, t, t.out_w), w.activation, sums);
  add_up<T>(context, args, sums, chunks);
  return true;
}

}  // namespace

template <class T>
void add_up(const Context& context, const DepthwiseConv2dBackwardArgs& args, const Acc<T>* sums, int64_t count) {
  const DepthwiseConv2dShape& s = args.shape;
  const int64_t channels = s.c * s.multiplier;
  const int taps = static_cast<int>(s.kernel_h * s.kernel_w) + 1;
  CB_LAUNCH((add_up_kernel<T>), static_cast<unsigned>(ceil_div(channels * taps, 32)), kThreads, 0, stream_of(context),
            sums, count, taps, channels, Parameter<T>(args.grad_weight, args.weights.dtype),
            Parameter<T>(args.grad_bias, args.weights.dtype));
}
template void add_up<float>(const Context&, const DepthwiseConv2dBackwardArgs&, const float*, int64_t);
template void add_up<double>(const Context&, const DepthwiseConv2dBackwardArgs&, const double*, int64_t);
template void add_up<f16>(const Context&, const DepthwiseConv2dBackwardArgs&, const float*, int64_t);
template void add_up<bf16>(const Context&, const DepthwiseConv2dBackwardArgs&, const float*, int64_t);

template <class T>
bool run_tiles(const Context& context, const DepthwiseConv2dBackwardArgs& args, bool channels_last) {
  return with_filter(args.shape, [&]<int K, int S>(std::integral_constant<int, K>, std::integral_constant<int, S>) {
    return launch<K, S, T>(context, args, channels_last);
  });
}
template bool run_tiles<float>(const Context&, const DepthwiseConv2dBackwardArgs&, bool);
template bool run_tiles<f16>(const Context&, const DepthwiseConv2dBackwardArgs&, bool);
template bool run_tiles<bf16>(const Context&, const DepthwiseConv2dBackwardArgs&, bool);

}  // namespace convblocks::cuda::depthwise
