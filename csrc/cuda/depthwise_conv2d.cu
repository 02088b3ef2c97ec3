// Depthwise convolution on CUDA. Usual filters go through shared memory (depthwise.h; for the gradients
// depthwise_backward.cu). For all others, and for doubles, a thread computes one number from the maps directly.
#include "../depthwise_conv2d.h"

#include "depthwise.h"
#include "reduce.h"

namespace convblocks::cuda {
namespace depthwise {
namespace {

// The sizes: none needs 64 bits, nor has a sample so many values.
struct Conv {
  int n, c, multiplier, h, w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, top, left;

  explicit Conv(const DepthwiseConv2dShape& s)
      : n(s.n), c(s.c), multiplier(s.multiplier), h(s.h), w(s.w), out_h(s.out_h), out_w(s.out_w), kernel_h(s.kernel_h),
        kernel_w(s.kernel_w), stride_h(s.stride_h), stride_w(s.stride_w), dilation_h(s.dilation_h),
        dilation_w(s.dilation_w), top(s.top), left(s.left) {}
  static bool fits(const DepthwiseConv2dShape& s) {
    const int64_t channels = s.c * s.multiplier;
    return std::max({s.h + 2 * s.top, s.w + 2 * s.left, s.out_h * s.stride_h, s.out_w * s.stride_w, s.n,
                     s.kernel_h * s.dilation_h, s.kernel_w * s.dilation_w, s.kernel_h * s.kernel_w, channels,
                     s.c * s.h * s.w, channels * s.out_h * s.out_w}) <= 1 << 30;
  }
  __host__ __device__ int channels() const { return c * multiplier; }
  __host__ __device__ int pixels() const { return h * w; }
  __host__ __device__ int windows() const { return out_h * out_w; }
};

template <int K, int S, class T>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(Tiling t, Planes<const T> x, Planes<T> y, Parameter<T> weight, Parameter<T> bias, bool vectors,
                   Activation activation, Acc<T>* shares) {
  using A = Acc<T>;
  CB_DYN_SHARED(A, shared);
  const Tile<A> tile(t, shared, (t.height - 1) * S + K, (t.width - 1) * S + K);
  unsigned block = blockIdx.x;
  // Neighbours in memory run at the same time.
  const unsigned inner = t.channels_last ? t.groups : t.rows * t.columns;
  const unsigned low = block % inner, high = block / inner;
  const unsigned outer = t.channels_last ? t.rows * t.columns : t.groups, middle = high % outer, sample = high / outer;
  const int group = t.channels_last ? low : middle, place = t.channels_last ? middle : low;
  const int first = group * t.channels, row = place / t.columns * t.height, column = place % t.columns * t.width;
  const Filters<K, A> filters(t, shared + tile.size(), weight, bias, first);
  const int in_row = row * S - t.top, in_column = column * S - t.left;
  constexpr int V = kVector<T>;
  if (vectors)
    fill<V>(tile, x, t.channels_last, sample, first, t.all_channels - first, in_row, in_column, t.h, t.w);
  else
    fill<1>(tile, x, t.channels_last, sample, first, t.all_channels - first, in_row, in_column, t.h, t.w);
  __syncthreads();
  const Lane lane(t);
  const bool is_there = first + lane.channel < t.all_channels, finite = is_there && filters.finite(lane.channel);
  const int items = t.width * (t.height / kRows);
  A total[1] = {};
  for (int i = is_there ? lane.slot : items; i < items; i += t.threads) {
    const int at = i / t.width * kRows, out_column = i % t.width;
    if (row + at >= t.out_h || column + out_column >= t.out_w) continue;
    A z[kRows];
    convolve<K, S>(tile, filters, finite, lane.channel, at * S, out_column * S, in_row + at * S,
                   in_column + out_column * S, t.h, t.w, z);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      if (row + at + r >= t.out_h) continue;
      const A result = activate(z[r], activation);
      *y.at(sample, first + lane.channel, int64_t{row + at + r} * t.out_w + column + out_column) =
          static_cast<T>(result);
      total[0] += result;
    }
  }
  if (!shares) return;
  __syncthreads();
  team_reduce(total, t.channels_last ? t.channels : 1, shared + threadIdx.y * (blockDim.x / 32));
  if (lane.slot == 0 && is_there)
    shares[(int64_t{place} * t.samples + sample) * t.all_channels + first + lane.channel] = total[0];
}

// The sums of the pixels of planes.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    sum_kernel(Planes<const T> map, int channels, int pixels, bool channels_last, Acc<T>* sums) {
  using A = Acc<T>;
  __shared__ A shared[kThreads];
  const int width = channels_last ? 32 : 1, groups = (channels + width - 1) / width;
  const int64_t sample = blockIdx.x / groups;
  const int channel = blockIdx.x % groups * width + threadIdx.x % width;
  A total[1] = {};
  for (int i = channel < channels ? threadIdx.x / width : pixels; i < pixels; i += kThreads / width)
    total[0] += static_cast<A>(*map.at(sample, channel, i));
  team_reduce(total, width, shared);
  if (static_cast<int>(threadIdx.x) < width && channel < channels) sums[sample * channels + channel] = total[0];
}

template <class T>
void sum(const Context& context, const Map& map, int64_t samples, int64_t channels, int64_t pixels, bool channels_last,
         Acc<T>* sums) {
  const int64_t groups = ceil_div(channels, channels_last ? 32 : 1);
  CB_LAUNCH((sum_kernel<T>), static_cast<unsigned>(samples * groups), kThreads, 0, stream_of(context),
            Planes<const T>(map), static_cast<int>(channels), static_cast<int>(pixels), channels_last, sums);
}

// --- any filter ---------------------------------------------------------------------------------------------------------

// A thread's element of a map of `channels` planes of `pixels`. Neighbours in memory run at the same time.
struct Element {
  int64_t sample;
  int channel, pixel;
  bool valid;

  static int64_t blocks(int64_t samples, int channels, int pixels) {
    return samples * ceil_div(int64_t{channels} * pixels, kThreads);
  }
  __device__ Element(int channels, int pixels, bool channels_last) {
    const unsigned size = channels * pixels, blocks = (size + kThreads - 1) / kThreads;
    const unsigned i = blockIdx.x % blocks * kThreads + threadIdx.x, inner = channels_last ? channels : pixels;
    sample = blockIdx.x / blocks;
    channel = static_cast<int>(channels_last ? i % inner : i / inner);
    pixel = static_cast<int>(channels_last ? i / inner : i % inner);
    valid = i < size;
  }
};

// The result; or with a gradient, that of what the activation was given.
template <class T, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    any_forward_kernel(Conv s, Planes<const T> x, Planes<const T> grad, Planes<Out> y, Parameter<T> weight,
                       Parameter<T> bias, Activation activation, bool channels_last) {
  using A = Acc<T>;
  const Element e(s.channels(), s.windows(), channels_last);
  if (!e.valid) return;
  const int row = e.pixel / s.out_w * s.stride_h - s.top, column = e.pixel % s.out_w * s.stride_w - s.left;
  int64_t tap = int64_t{e.channel} * s.kernel_h * s.kernel_w;
  A z = bias ? bias[e.channel] : A(0);
#pragma unroll 1
  for (int in_row = row; in_row < row + s.kernel_h * s.dilation_h; in_row += s.dilation_h) {
    A sum = 0;  // of a row of the filter: sums of few lose less to rounding
#pragma unroll 1
    for (int in_column = column; in_column < column + s.kernel_w * s.dilation_w; in_column += s.dilation_w, tap++) {
      if (in_row < 0 || in_row >= s.h || in_column < 0 || in_column >= s.w) continue;
      sum += weight[tap] * static_cast<A>(*x.at(e.sample, e.channel / s.multiplier, int64_t{in_row} * s.w + in_column));
    }
    z += sum;
  }
  z = grad.data ? activation_grad(static_cast<A>(*grad.at(e.sample, e.channel, e.pixel)), z, activation)
                : activate(z, activation);
  *y.at(e.sample, e.channel, e.pixel) = static_cast<Out>(z);
}

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 1)
    any_grad_x_kernel(Conv s, Planes<const G> inner, Planes<T> grad_x, Parameter<T> weight, bool channels_last) {
  using A = Acc<T>;
  const Element e(s.c, s.pixels(), channels_last);
  if (!e.valid) return;
  const int row = e.pixel / s.w + s.top, column = e.pixel % s.w + s.left;
  int64_t tap = int64_t{e.channel} * s.multiplier * s.kernel_h * s.kernel_w;
  A sum = 0;
#pragma unroll 1
  for (int channel = e.channel * s.multiplier; channel < (e.channel + 1) * s.multiplier; channel++) {
#pragma unroll 1
    for (int kh = 0; kh < s.kernel_h; kh++) {
      const int down = row - kh * s.dilation_h, out_row = down / s.stride_h;
      const bool met = down >= 0 && down == out_row * s.stride_h && out_row < s.out_h;
      A row_sum = 0;
#pragma unroll 1
      for (int kw = 0; kw < s.kernel_w; kw++, tap++) {
        const int across = column - kw * s.dilation_w, out_column = across / s.stride_w;
        if (!met || across < 0 || across != out_column * s.stride_w || out_column >= s.out_w) continue;
        row_sum += weight[tap] * static_cast<A>(*inner.at(e.sample, channel, int64_t{out_row} * s.out_w + out_column));
      }
      sum += row_sum;
    }
  }
  *grad_x.at(e.sample, e.channel, e.pixel) = static_cast<T>(sum);
}

// How the windows of all samples are shared out: a chunk has those of `samples` in a stretch of `windows`, and each tap
// of a chunk has `parts` threads.
struct Shares {
  int samples, windows, stretches, chunks;
  int taps, channels, slots, parts;

  Shares(const Conv& s, bool channels_last)
      : taps(s.kernel_h * s.kernel_w + 1), channels(channels_last ? 32 : 1), slots(kThreads / channels),
        parts(std::max(1, slots / taps)) {
    windows = std::min(s.windows(), 4096);
    stretches = ceil_div(s.windows(), windows);
    samples = std::min<int64_t>(s.n, std::max(ceil_div(4096, windows), ceil_div(int64_t{s.n} * stretches, 512)));
    chunks = stretches * ceil_div(s.n, samples);
  }
  int64_t count() const { return int64_t{chunks} * parts; }
};

// A thread sums one tap of one channel, or several, over its part of a chunk; the last tap is the bias.
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 1)
    any_grad_weight_kernel(Conv s, Shares shares, Planes<const T> x, Planes<const G> inner, Acc<T>* sums) {
  using A = Acc<T>;
  const int channels = s.channels(), groups = (channels + shares.channels - 1) / shares.channels;
  const int chunk = blockIdx.x / groups,
            channel = blockIdx.x % groups * shares.channels + threadIdx.x % shares.channels;
  if (channel >= channels) return;
  const int begin = chunk % shares.stretches * shares.windows, end = min(begin + shares.windows, s.windows());
  const int first = chunk / shares.stretches * shares.samples, last = min(first + shares.samples, s.n);
  for (int i = threadIdx.x / shares.channels; i < shares.taps * shares.parts; i += shares.slots) {
    const int tap = i % shares.taps, part = i / shares.taps;
    const bool is_bias = tap == shares.taps - 1;
    const int down = tap / s.kernel_w * s.dilation_h - s.top, across = tap % s.kernel_w * s.dilation_w - s.left;
    A sum = 0;
#pragma unroll 1
    for (int sample = first; sample < last; sample++) {
#pragma unroll 1
      for (int next = begin + part, window = next; next < end;) {
        A few = 0;
        next += 32 * shares.parts;
#pragma unroll 1
        for (; window < min(next, end); window += shares.parts) {
          const int row = window / s.out_w * s.stride_h + down, column = window % s.out_w * s.stride_w + across;
          // Taps outside the map multiply by zero: a NaN stays one, as in torch.
          A value = is_bias ? A(1) : A(0);
          if (!is_bias && row >= 0 && row < s.h && column >= 0 && column < s.w)
            value = static_cast<A>(*x.at(sample, channel / s.multiplier, int64_t{row} * s.w + column));
          few += value * static_cast<A>(*inner.at(sample, channel, window));
        }
        sum += few;
      }
    }
    sums[((int64_t{chunk} * shares.parts + part) * shares.taps + tap) * channels + channel] = sum;
  }
}

template <class T>
const char* run(const Context& context, const DepthwiseConv2dArgs& args) {
  bool channels_last;
  if (const char* error = find_layout({args.x, args.y}, channels_last)) return error;
  const Planes<const T> x(args.x);
  const Planes<T> y(args.y);
  const Parameter<T> weight(args.weights.weight, args.weights.dtype), bias(args.weights.bias, args.weights.dtype);
  const Activation activation = args.weights.activation;
  Acc<T>* const sums = static_cast<Acc<T>*>(args.sums);
  const int64_t channels = args.shape.c * args.shape.multiplier;
  if constexpr (sizeof(T) < 8) {
    const bool done =
        with_filter(args.shape, [&]<int K, int S>(std::integral_constant<int, K>, std::integral_constant<int, S>) {
          using A = Acc<T>;
          const auto bytes = [&](const Tiling& t) {
            const Tile<A> tile(t, nullptr, (t.height - 1) * S + K, (t.width - 1) * S + K);
            const int reduce = sums ? kThreads / 32 * (channels_last ? t.channels : 1) : 0;
            return int64_t{std::max(tile.size() + Filters<K, A>::size(t), reduce)} * static_cast<int64_t>(sizeof(A));
          };
          Tiling t;
          if (!find_tiling<T>(args.shape, channels_last, 0, bytes, t) || t.pieces() * t.groups >= int64_t{1} << 31)
            return false;
          const int64_t places = int64_t{t.rows} * t.columns, planes = t.samples * channels;
          A* const shares =
              sums && places > 1 ? static_cast<A*>(context.workspace(context, places * planes * sizeof(A))) : sums;
          CB_LAUNCH((forward_kernel<K, S, T>), static_cast<unsigned>(t.pieces() * t.groups), t.block(), bytes(t),
                    stream_of(context), t, x, y, weight, bias, aligned<T>(args.x, t, t.w), activation, shares);
          if (shares != sums) sum<A>(context, {shares, 0, 1, planes}, 1, planes, places, true, sums);
          return true;
        });
    if (done) return launch_error();
  }
  if (!Conv::fits(args.shape)) return "a sample of more than 2^30 values";
  const Conv s(args.shape);
  const int64_t blocks = Element::blocks(s.n, s.channels(), s.windows());
  if (blocks >= int64_t{1} << 31) return "more than 2^39 results";
  CB_LAUNCH((any_forward_kernel<T, T>), static_cast<unsigned>(blocks), kThreads, 0, stream_of(context), s, x,
            Planes<const T>({}), y, weight, bias, activation, channels_last);
  if (sums) sum<T>(context, args.y, s.n, channels, s.windows(), channels_last, sums);
  return launch_error();
}

template <class T>
const char* run_backward(const Context& context, const DepthwiseConv2dBackwardArgs& args) {
  using A = Acc<T>;
  bool channels_last;
  if (const char* error = find_layout({args.grad, args.x, args.grad_x}, channels_last)) return error;
  const Parameter<T> weight(args.weights.weight, args.weights.dtype), bias(args.weights.bias, args.weights.dtype);
  const Parameter<T> grad_weight(args.grad_weight, args.weights.dtype), grad_bias(args.grad_bias, args.weights.dtype);
  const auto stream = stream_of(context);
  const int64_t channels = args.shape.c * args.shape.multiplier;
  const int taps = static_cast<int>(args.shape.kernel_h * args.shape.kernel_w) + 1;
  if constexpr (sizeof(T) < 8) {
    if (run_tiles<T>(context, args, channels_last)) return launch_error();
  }
  if (!Conv::fits(args.shape)) return "a sample of more than 2^30 values";
  const Conv s(args.shape);
  const Planes<const T> x(args.x), grad(args.grad);
  const Planes<T> grad_x(args.grad_x);
  const Shares shares(s, channels_last);
  const int64_t pixels = s.windows(), results = s.n * channels * pixels;
  const int64_t blocks = Element::blocks(s.n, s.channels(), s.windows()),
                x_blocks = Element::blocks(s.n, s.c, s.pixels());
  if (std::max(blocks, x_blocks) >= int64_t{1} << 31) return "more than 2^39 values";
  const bool is_linear = args.weights.activation == Activation::none;
  Workspace<A> workspace(context, shares.count() * taps * channels + (is_linear ? 0 : results));
  A* const sums = workspace.take(shares.count() * taps * channels);
  const auto with_inner = [&]<class G>(const Planes<const G>& inner) {
    const auto share_blocks = static_cast<unsigned>(int64_t{shares.chunks} * ceil_div(channels, shares.channels));
    CB_LAUNCH((any_grad_weight_kernel<T, G>), share_blocks, kThreads, 0, stream, s, shares, x, inner, sums);
    add_up<T>(context, args, sums, shares.count());
    CB_LAUNCH((any_grad_x_kernel<T, G>), static_cast<unsigned>(x_blocks), kThreads, 0, stream, s, inner, grad_x, weight,
              channels_last);
  };
  if (is_linear) {
    with_inner(grad);
  } else {
    const Map map{workspace.take(results), channels * pixels, channels_last ? 1 : pixels, channels_last ? channels : 1};
    CB_LAUNCH((any_forward_kernel<T, A>), static_cast<unsigned>(blocks), kThreads, 0, stream, s, x, grad,
              Planes<A>(map), weight, bias, args.weights.activation, channels_last);
    with_inner(Planes<const A>(map));
  }
  return launch_error();
}

}  // namespace
}  // namespace depthwise
}  // namespace convblocks::cuda

using namespace convblocks;

const char* convblocks_depthwise_conv2d(const Context& context, const DepthwiseConv2dArgs& args) {
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::depthwise::run<T>(context, args); });
}

const char* convblocks_depthwise_conv2d_backward(const Context& context, const DepthwiseConv2dBackwardArgs& args) {
  return cuda::dispatch(args.dtype, [&]<class T>(T) { return cuda::depthwise::run_backward<T>(context, args); });
}
