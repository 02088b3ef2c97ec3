// Concatenation and channel shuffle on CUDA: values are moved as they are, in vectors. NCHW: a thread moves a vector of a
// plane. channels_last: a thread weaves a vector of each of a few streams of channels, or unweaves them; where their
// number is no small constant, it moves one channel.
#include "../concat_shuffle.h"

#include <algorithm>

#include "element.h"

namespace convblocks::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kParts = 8;  // of one launch: they are passed by value

// Values are moved, not computed with.
template <size_t kSize>
using Bits = std::conditional_t<kSize == 8, uint64_t, std::conditional_t<kSize == 4, uint32_t, uint16_t>>;

// A map, or a run of its channels: `row` is from pixel to pixel, or in NCHW from channel to channel.
template <class T>
struct Stream {
  T* data;
  int64_t sample, row;

  __device__ T* in(int64_t n, int64_t r) const { return data + n * sample + r * row; }
};

// `length` items in each of `rows`, which are the channels or the pixels of a sample.
template <class Index>
struct Grid {
  Index total, length, rows;

  Grid(int64_t n, int64_t rows, int64_t length) : total(n * rows * length), length(length), rows(rows) {}
  unsigned blocks() const { return ceil_div(total, kThreads); }
  struct Item {
    int64_t sample, row, at;
    bool valid;
  };
  __device__ Item item() const {
    const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x, row = i / length;
    return {static_cast<int64_t>(row / rows), static_cast<int64_t>(row % rows), static_cast<int64_t>(i % length),
            i < total};
  }
};

// The parts of one launch: part k has the channels of the concatenation from start[k] on.
template <class T, class Index>
struct Parts {
  Stream<T> stream[kParts];
  Index start[kParts], end;
};

template <class T, int V, bool PLANES, bool BACK, class Index>
__global__ void __launch_bounds__(kThreads)
    copy_kernel(Stream<T> whole, Parts<T, Index> parts, Grid<Index> grid, Index groups, Index width) {
  const auto [sample, row, at, valid] = grid.item();
  const Index place = PLANES ? row : at, i = place % groups * width + place / groups;
  if (!valid || i < parts.start[0] || i >= parts.end) return;
  Stream<T> part = parts.stream[0];
  Index start = parts.start[0];
#pragma unroll
  for (int k = 1; k < kParts; k++) {
    if (i >= parts.start[k]) {
      part = parts.stream[k];
      start = parts.start[k];
    }
  }
  const int64_t channel = i - start;
  T* w = whole.in(sample, row) + at * V;
  T* p = PLANES ? part.in(sample, channel) + at * V : part.in(sample, row) + channel;
  BACK ? store(p, load<V>(w)) : store(w, load<V>(p));
}

template <class T, int FEW>
struct Loose {
  Stream<T> stream[FEW];
};

template <class T, int V, int FEW, bool BACK, class Index>
__global__ void __launch_bounds__(kThreads) weave_kernel(Stream<T> woven, Loose<T, FEW> loose, Grid<Index> grid) {
  const auto [sample, pixel, at, valid] = grid.item();
  if (!valid) return;
  // Vector k of the piece on either side: of stream k, or of the stretch in which they alternate.
  T* const stretch = woven.in(sample, pixel) + at * (V * FEW);
  const auto stream = [&](int k) { return loose.stream[k].in(sample, pixel) + at * V; };
  Vec<T, V> in[FEW], out;
#pragma unroll
  for (int k = 0; k < FEW; k++) in[k] = load<V>(BACK ? stretch + k * V : stream(k));
#pragma unroll
  for (int k = 0; k < FEW; k++) {
#pragma unroll
    for (int e = 0; e < V; e++) {
      const int i = BACK ? e * FEW + k : (k * V + e) % FEW * V + (k * V + e) / FEW;
      out.data[e] = in[i / V].data[i % V];
    }
    store(BACK ? stream(k) : stretch + k * V, out);
  }
}

template <class T>
Stream<T> view_of(const ShuffleArgs& a, const Map& map, int64_t channel = 0) {
  return {static_cast<T*>(map.data) + channel * map.channel, map.batch, a.channels_last ? map.pixel : map.channel};
}

// Whether each row of a stream begins at a vector, where there are `rows` of them in a sample.
template <int V, class T>
bool has_vectors(const ShuffleArgs& a, const Stream<T>& s, int64_t rows) {
  return reinterpret_cast<uintptr_t>(s.data) % (V * sizeof(T)) == 0 && (a.n == 1 || s.sample % V == 0) &&
         (rows == 1 || s.row % V == 0);
}

template <class T, class Index>
class Launcher {
 public:
  Launcher(const Context& context, const ShuffleArgs& args) : stream_(stream_of(context)), a_(args) {}

  void run() const {
    if (!a_.channels_last) return planes();
    const std::vector<Weave> weaves = weaves_of(a_);
    const auto is_few = [](const Weave& w) { return w.few <= 4 || w.few == 8; };
    if (weaves.size() > kParts || !std::all_of(weaves.begin(), weaves.end(), is_few)) return copy<1, false>();
    for (const Weave& w : weaves) (w.woven.part < 0) == a_.back ? weave<true>(w) : weave<false>(w);
  }

 private:
  void planes() const {
    constexpr int V = kVector<T>;
    bool vectors = a_.hw % V == 0 && has_vectors<V>(a_, view_of<T>(a_, a_.whole), a_.c);
    for (int64_t p = 0; p < a_.count; p++)
      vectors = vectors && has_vectors<V>(a_, view_of<T>(a_, a_.parts[p].map), a_.parts[p].channels);
    vectors ? copy<V, true>() : copy<1, true>();
  }

  template <int V, bool PLANES>
  void copy() const {
    a_.back ? copy<V, PLANES, true>() : copy<V, PLANES, false>();
  }
  template <int V, bool PLANES, bool BACK>
  void copy() const {
    const Grid<Index> grid(a_.n, PLANES ? a_.c : a_.hw, PLANES ? a_.hw / V : a_.c);
    const auto whole = view_of<T>(a_, a_.whole);
    for (int64_t p = 0, start = 0; p < a_.count;) {
      Parts<T, Index> parts{};
      std::fill_n(parts.start, kParts, static_cast<Index>(a_.c));  // no channel is there
      for (int k = 0; k < kParts && p < a_.count; k++, p++) {
        parts.stream[k] = view_of<T>(a_, a_.parts[p].map);
        parts.start[k] = static_cast<Index>(start);
        start += a_.parts[p].channels;
      }
      parts.end = static_cast<Index>(start);
      CB_LAUNCH((copy_kernel<T, V, PLANES, BACK, Index>), grid.blocks(), kThreads, 0, stream_, whole, parts, grid,
                static_cast<Index>(a_.groups), static_cast<Index>(a_.width()));
    }
  }

  template <bool BACK>
  void weave(const Weave& w) const {
    switch (w.few) {
      case 1: return weave<1, BACK>(w);  // a copy
      case 2: return weave<2, BACK>(w);
      case 3: return weave<3, BACK>(w);
      case 4: return weave<4, BACK>(w);
      case 8: return weave<8, BACK>(w);
    }
  }
  template <int FEW, bool BACK>
  void weave(const Weave& w) const {
    constexpr int V = kVector<T> * FEW > 32 ? 32 / FEW : kVector<T>;  // what a thread holds without spills
    const auto stream = [&](const Weave::Stream& s) {
      return view_of<T>(a_, s.part < 0 ? a_.whole : a_.parts[s.part].map, s.channel);
    };
    const Stream<T> woven = stream(w.woven);
    bool vectors = w.length % V == 0 && has_vectors<V>(a_, woven, a_.hw);
    Loose<T, FEW> loose;
    for (int k = 0; k < FEW; k++) {
      loose.stream[k] = stream(w.loose[k]);
      vectors = vectors && has_vectors<V>(a_, loose.stream[k], a_.hw);
    }
    vectors ? launch<V, FEW, BACK>(w, woven, loose) : launch<1, FEW, BACK>(w, woven, loose);
  }
  template <int V, int FEW, bool BACK>
  void launch(const Weave& w, const Stream<T>& woven, const Loose<T, FEW>& loose) const {
    const Grid<Index> grid(a_.n, a_.hw, w.length / V);
    CB_LAUNCH((weave_kernel<T, V, FEW, BACK, Index>), grid.blocks(), kThreads, 0, stream_, woven, loose, grid);
  }

  cudaStream_t stream_;
  const ShuffleArgs& a_;
};

}  // namespace
}  // namespace convblocks::cuda

const char* convblocks_concat_shuffle(const convblocks::Context& context, const convblocks::ShuffleArgs& args) {
  using namespace convblocks;
  return cuda::dispatch(args.dtype, [&](auto value) {
    using T = cuda::Bits<sizeof(value)>;
    if (args.n * args.c * args.hw < int64_t{1} << 31)
      cuda::Launcher<T, uint32_t>(context, args).run();
    else
      cuda::Launcher<T, uint64_t>(context, args).run();
    return cuda::launch_error();
  });
}
