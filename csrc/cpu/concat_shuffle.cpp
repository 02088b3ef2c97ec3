// Concatenation and channel shuffle on the CPU: planes are copied as they are (NCHW), the channels of a pixel are woven
// (channels_last).
#include "../concat_shuffle.h"

#include <bit>
#include <cstring>
#include <utility>

#include "caches.h"
#include "dispatch.h"
#include "team.h"
#include "vec.h"

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

// Of the same pixels. `woven` is where the channels of `few` loose streams, `length` of each, alternate.
template <class T>
struct Piece {
  Stream<T> woven;
  const Stream<T>* loose;
  int64_t few, length, pixels;

  // Pixels that have no other channels follow one another as if they were one.
  bool dense() const {
    bool all = woven.pixel == few * length;
    for (int64_t i = 0; i < few; i++) all &= loose[i].pixel == length;
    return all;
  }
  // Whether the vectors that are written begin where lines of the cache do.
  bool aligned(bool back) const {
    const auto begins = [this](const Stream<T>& s) {
      const int64_t pixel = pixels == 1 ? 0 : s.pixel * sizeof(T);
      return (reinterpret_cast<uintptr_t>(s.data) | pixel) % kBytes == 0;
    };
    return back ? std::all_of(loose, loose + few, begins) : begins(woven);
  }
};

// Past the caches. At least one vector; the first and the last, which no line begins with, may overlap others.
CONVBLOCKS_LOOP inline void copy_past_caches(char* to, const char* from, int64_t bytes) {
  std::memcpy(to, from, kBytes);
  int64_t i = kBytes - reinterpret_cast<uintptr_t>(to) % kBytes;
  for (; i + kBytes <= bytes; i += kBytes)
    store_past_caches(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  if (i < bytes) std::memcpy(to + bytes - kBytes, from + bytes - kBytes, kBytes);
}

// At least one vector, and few: that takes less time than the call of memcpy. The last one may overlap another.
CONVBLOCKS_LOOP inline void copy_few_vectors(char* to, const char* from, int64_t bytes) {
  const auto copy = [=](int64_t i) CONVBLOCKS_LOOP {
    store(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(from + i)));
  };
  for (int64_t i = 0; i + kBytes <= bytes; i += kBytes) copy(i);
  if (bytes % kBytes) copy(bytes - kBytes);
}

#if __has_builtin(__builtin_shufflevector)
template <class T, int N>
struct Lanes {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};

// The lanes of a and b alternating, from lane `kFirst` of each; and the way back, every other lane of both.
template <int kFirst, class V, int... I>
V zip(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kFirst + I / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}
template <int kFirst, class V, int... I>
V unzip(V a, V b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (kFirst + 2 * I)...);
}

// N channels of each loose stream, a power of two, from or to their places in the woven one.
template <bool kBack, bool kPast, int kFew, int N, class T>
CONVBLOCKS_LOOP inline void weave_block(T* woven, T* const* loose, int64_t j) {
  using V = typename Lanes<T, N>::type;
  constexpr std::make_integer_sequence<int, N> lanes{};
  constexpr int kHalf = kFew / 2;
  V v[kFew], next[kFew];
  for (int i = 0; i < kFew; i++) std::memcpy(&v[i], kBack ? woven + j * kFew + i * N : loose[i] + j, sizeof(V));
  for (int step = 1; step < kFew; step *= 2) {
    for (int i = 0; i < kHalf; i++) {
      if constexpr (kBack) {
        next[i] = unzip<0>(v[2 * i], v[2 * i + 1], lanes);
        next[i + kHalf] = unzip<1>(v[2 * i], v[2 * i + 1], lanes);
      } else {
        next[2 * i] = zip<0>(v[i], v[i + kHalf], lanes);
        next[2 * i + 1] = zip<N / 2>(v[i], v[i + kHalf], lanes);
      }
    }
    for (int i = 0; i < kFew; i++) v[i] = next[i];
  }
  for (int i = 0; i < kFew; i++) {
    T* to = kBack ? loose[i] + j : woven + j * kFew + i * N;
    if constexpr (kPast && sizeof(V) == kBytes)
      store_past_caches(reinterpret_cast<float*>(to), (VecF)v[i]);
    else
      std::memcpy(to, &v[i], sizeof(V));
  }
}
#endif

// A whole number of blocks, the last one moved back to end where the streams end; smaller blocks for short streams.
template <bool kBack, bool kPast, int kFew, int N, class T>
CONVBLOCKS_LOOP inline void weave_pixel(T* woven, T* const* loose, int64_t length) {
#if __has_builtin(__builtin_shufflevector)
  if constexpr (N > 1 && std::has_single_bit(unsigned{kFew})) {
    if (length < N) return weave_pixel<kBack, false, kFew, N / 2>(woven, loose, length);
    for (int64_t j = 0; j + N <= length; j += N) weave_block<kBack, kPast, kFew, N>(woven, loose, j);
    if (length % N) weave_block<kBack, false, kFew, N>(woven, loose, length - N);
    return;
  }
#endif
  for (int64_t j = 0; j < length; j++) {
    for (int i = 0; i < kFew; i++) {
      if constexpr (kBack)
        loose[i][j] = woven[j * kFew + i];
      else
        woven[j * kFew + i] = loose[i][j];
    }
  }
}

template <bool kBack, bool kPast, int kFew, class T>
void weave_few(const Piece<T>& piece) {
  for (int64_t p = 0; p < piece.pixels; p++) {
    T* loose[kFew];
    for (int i = 0; i < kFew; i++) loose[i] = piece.loose[i].data + p * piece.loose[i].pixel;
    weave_pixel<kBack, kPast, kFew, kBytes / sizeof(T)>(piece.woven.data + p * piece.woven.pixel, loose, piece.length);
  }
}

template <bool kBack, class T>
void weave_many(const Piece<T>& piece) {
  constexpr int64_t kRows = 64;  // of the woven stream, which stay in the cache
  for (int64_t p = 0; p < piece.pixels; p++) {
    T* woven = piece.woven.data + p * piece.woven.pixel;
    for (int64_t begin = 0; begin < piece.length; begin += kRows) {
      const int64_t end = std::min(piece.length, begin + kRows);
      for (int64_t i = 0; i < piece.few; i++) {
        T* loose = piece.loose[i].data + p * piece.loose[i].pixel;
        for (int64_t j = begin; j < end; j++) {
          if constexpr (kBack)
            loose[j] = woven[j * piece.few + i];
          else
            woven[j * piece.few + i] = loose[j];
        }
      }
    }
  }
}

template <bool kBack, bool kPast, class T>
void weave(const Piece<T>& piece) {
  switch (piece.few) {
    case 1: return weave_few<kBack, kPast, 1>(piece);  // a copy
    case 2: return weave_few<kBack, kPast, 2>(piece);
    case 3: return weave_few<kBack, kPast, 3>(piece);
    case 4: return weave_few<kBack, kPast, 4>(piece);
    case 8: return weave_few<kBack, kPast, 8>(piece);
  }
  weave_many<kBack>(piece);
}

template <class T>
void shuffle_pixels(const Context& context, const ShuffleArgs& a) {
  const std::vector<Weave> weaves = weaves_of(a);
  const bool far = exceeds_caches(a.n * a.c * a.hw * sizeof(T));
  // Pixels that stay in the first cache.
  const int64_t run = weaves.size() == 1 ? a.hw : std::max<int64_t>(1, 4096 / a.c);
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
        Piece<T> piece{stream_of(w.woven), loose.data(), w.few, w.length, count};
        const bool back = (w.woven.part < 0) == a.back;
        if (piece.dense()) piece.length *= std::exchange(piece.pixels, 1);
        const bool past = far && piece.aligned(back);
        if (back)
          past ? weave<true, true>(piece) : weave<true, false>(piece);
        else
          past ? weave<false, true>(piece) : weave<false, false>(piece);
      }
    }
    if (far) finish_stores();
  });
}

void shuffle_planes(const Context& context, const ShuffleArgs& a, int64_t size) {
  struct Plane {
    char* data;
    int64_t sample;
  };
  std::vector<Plane> planes(a.c);  // of the parts, in the order of the whole
  int64_t group = 0, place = 0;
  for (int64_t p = 0; p < a.count; p++) {
    const auto& [map, channels] = a.parts[p];
    for (int64_t c = 0; c < channels; c++) {
      planes[place] = {static_cast<char*>(map.data) + c * map.channel * size, map.batch * size};
      place += a.groups;
      if (place >= a.c) place = ++group;
    }
  }
  // The arguments by value: the compiler takes every store for one that may change what a reference leads to.
  const bool far = exceeds_caches(a.n * a.c * a.hw * size);
  const auto copy = [&planes, a, size, far](int64_t begin, int64_t end) {
    const int64_t bytes = a.hw * size, batch = a.whole.batch * size, channel = a.whole.channel * size;
    int64_t sample = begin / a.c, c = begin % a.c;
    const Plane* const parts = planes.data();
    for (int64_t i = begin; i < end; i++) {
      char* whole = static_cast<char*>(a.whole.data) + sample * batch + c * channel;
      char* part = parts[c].data + sample * parts[c].sample;
      char* to = a.back ? part : whole;
      const char* from = a.back ? whole : part;
      if (far && bytes >= kBytes)
        copy_past_caches(to, from, bytes);
      else if (bytes >= kBytes && bytes <= 16 * kBytes)
        copy_few_vectors(to, from, bytes);
      else
        std::memcpy(to, from, bytes);
      if (++c == a.c) c = 0, sample++;
    }
    if (far) finish_stores();
  };
  parallel_for(context, a.n * a.c, std::max<int64_t>(1, 16384 / a.hw), copy);
}

template <class T>
void shuffle(const Context& context, const ShuffleArgs& a) {
  a.channels_last ? shuffle_pixels<T>(context, a) : shuffle_planes(context, a, sizeof(T));
}

}  // namespace
}  // namespace convblocks::cpu

const char* convblocks_concat_shuffle(const convblocks::Context& context, const convblocks::ShuffleArgs& args) {
  using namespace convblocks;
  return cpu::dispatch(args.dtype, [&](auto value) { cpu::shuffle<cpu::Bits<sizeof(value)>>(context, args); });
}
