// Concatenation and channel shuffle on the CPU: planes are copied as they are (NCHW), the channels of a pixel are woven
// (channels_last).
#include "../concat_shuffle.h"

#include <cstring>

#include "dispatch.h"
#include "reduce.h"

namespace convblocks::cpu {
namespace {

// Values are moved, not computed with.
template <size_t kSize>
using Bits = std::conditional_t<kSize == 8, uint64_t, std::conditional_t<kSize == 4, uint32_t, uint16_t>>;

// A run of channels in each of several pixels.
template <class T>
struct Stream {
  T* data;
  int64_t pixel;
};

template <class T>
struct Piece {
  Stream<T> woven;
  const Stream<T>* loose;
  int64_t few, length, pixels;
};

// Channels j to j + N of each loose stream, from or to their places in the woven one. Constant sizes make vector code.
template <bool kBack, int kFew, int N, class T>
CONVBLOCKS_LOOP inline void weave_block(T* __restrict woven, T* const* loose, int64_t j) {
  for (int e = 0; e < N; e++) {
    for (int i = 0; i < kFew; i++) {
      if constexpr (kBack)
        loose[i][j + e] = woven[(j + e) * kFew + i];
      else
        woven[(j + e) * kFew + i] = loose[i][j + e];
    }
  }
}

// A whole number of blocks, the last one moved back to end where the streams end; smaller blocks for short streams.
template <bool kBack, int kFew, int N, class T>
CONVBLOCKS_LOOP inline void weave_pixel(T* woven, T* const* loose, int64_t length) {
  if constexpr (N > 1) {
    if (length < N) return weave_pixel<kBack, kFew, N / 2>(woven, loose, length);
  }
  int64_t j = 0;
  for (; j + N <= length; j += N) weave_block<kBack, kFew, N>(woven, loose, j);
  if (j < length) weave_block<kBack, kFew, N>(woven, loose, length - N);
}

template <bool kBack, int kFew, class T>
void weave_few(const Piece<T>& piece) {
  for (int64_t p = 0; p < piece.pixels; p++) {
    T* loose[kFew];
    for (int i = 0; i < kFew; i++) loose[i] = piece.loose[i].data + p * piece.loose[i].pixel;
    weave_pixel<kBack, kFew, kBytes / sizeof(T)>(piece.woven.data + p * piece.woven.pixel, loose, piece.length);
  }
}

template <bool kBack, class T>
void weave_many(const Piece<T>& piece) {
  for (int64_t p = 0; p < piece.pixels; p++) {
    T* woven = piece.woven.data + p * piece.woven.pixel;
    for (int64_t i = 0; i < piece.few; i++) {
      T* loose = piece.loose[i].data + p * piece.loose[i].pixel;
      for (int64_t j = 0; j < piece.length; j++) {
        if constexpr (kBack)
          loose[j] = woven[j * piece.few + i];
        else
          woven[j * piece.few + i] = loose[j];
      }
    }
  }
}

template <bool kBack, class T>
void weave(const Piece<T>& piece) {
  switch (piece.few) {
    case 1: return weave_few<kBack, 1>(piece);  // a copy
    case 2: return weave_few<kBack, 2>(piece);
    case 3: return weave_few<kBack, 3>(piece);
    case 4: return weave_few<kBack, 4>(piece);
    case 8: return weave_few<kBack, 8>(piece);
  }
  weave_many<kBack>(piece);
}

template <class T>
void shuffle_pixels(const Context& context, const ShuffleArgs& a) {
  const std::vector<Weave> weaves = weaves_of(a);
  const int64_t run = weaves.size() == 1 ? a.hw : std::max<int64_t>(1, 4096 / a.c);  // pixels that stay in the cache
  parallel_for(context, a.n * a.hw, std::max<int64_t>(1, 16384 / a.c), [&](int64_t begin, int64_t end) {
    std::vector<Stream<T>> loose;
    for (int64_t count; begin < end; begin += count) {
      const int64_t sample = begin / a.hw, pixel = begin % a.hw;
      count = std::min({end - begin, a.hw - pixel, run});
      const auto stream_of = [&](const Weave::Stream& s) {
        const Map& map = s.part < 0 ? a.whole : a.parts[s.part].map;
        return Stream<T>{static_cast<T*>(map.data) + sample * map.batch + pixel * map.pixel + s.channel, map.pixel};
      };
      for (const Weave& w : weaves) {
        loose.clear();
        for (const Weave::Stream& s : w.loose) loose.push_back(stream_of(s));
        const Piece<T> piece{stream_of(w.woven), loose.data(), w.few, w.length, count};
        if ((w.woven.part < 0) == a.back)
          weave<true>(piece);
        else
          weave<false>(piece);
      }
    }
  });
}

template <class T>
void shuffle_planes(const Context& context, const ShuffleArgs& a) {
  std::vector<Stream<T>> planes(a.c);  // of the parts, in the order of the whole, with the stride of their samples
  for (int64_t p = 0, i = 0; p < a.count; p++) {
    const auto& [map, channels] = a.parts[p];
    for (int64_t c = 0; c < channels; c++, i++)
      planes[a.place(i)] = {static_cast<T*>(map.data) + c * map.channel, map.batch};
  }
  parallel_for(context, a.n * a.c, std::max<int64_t>(1, 16384 / a.hw), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t sample = i / a.c, c = i % a.c;
      T* whole = static_cast<T*>(a.whole.data) + sample * a.whole.batch + c * a.whole.channel;
      T* part = planes[c].data + sample * planes[c].pixel;
      std::memcpy(a.back ? part : whole, a.back ? whole : part, a.hw * sizeof(T));
    }
  });
}

template <class T>
void shuffle(const Context& context, const ShuffleArgs& a) {
  a.channels_last ? shuffle_pixels<T>(context, a) : shuffle_planes<T>(context, a);
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_concat_shuffle(const convblocks::Context& context, const convblocks::ShuffleArgs& args) {
  using namespace convblocks;
  return cpu::dispatch(args.dtype, [&](auto value) { cpu::shuffle<cpu::Bits<sizeof(value)>>(context, args); });
}
