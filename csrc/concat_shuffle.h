// Concatenation and channel shuffle in one: with cat the concatenation of the parts, of c channels in all,
// whole[j * groups + i] = cat[i * c / groups + j], for i < groups and j < c / groups. The gradient is the way back: the
// parts from the whole.
#pragma once
#include <algorithm>
#include <vector>

#include "kernel.h"

namespace convblocks {

struct ShufflePart {
  Map map;
  int64_t channels;  // at least one
};

struct ShuffleArgs {
  Dtype dtype;
  bool channels_last;  // the channels of a pixel are neighbours in all maps; else the pixels of a plane are
  bool back;           // from the whole to the parts
  int64_t n, c, hw, groups;
  Map whole;
  const ShufflePart* parts;
  int64_t count;

  int64_t width() const { return c / groups; }
  // Where channel i of the concatenation is in the whole.
  int64_t place(int64_t i) const { return i % width() * groups + i / width(); }
};

// `few` streams of `length` channels each, side by side on one side; one stream, in which they alternate, on the other.
struct Weave {
  struct Stream {
    int64_t part;  // -1: the whole
    int64_t channel;
  };
  int64_t few, length;
  Stream woven;
  std::vector<Stream> loose;
};

// A shuffle as weaves. cat is a matrix of groups x width channels; its rows, or if it has fewer columns those, are the
// streams, cut where a part ends.
inline std::vector<Weave> weaves_of(const ShuffleArgs& a) {
  const int64_t width = a.width();
  std::vector<int64_t> starts{0};
  for (int64_t p = 0; p < a.count; p++) starts.push_back(starts.back() + a.parts[p].channels);
  std::vector<Weave> weaves;
  if (a.groups <= width) {
    std::vector<int64_t> cuts;
    for (const int64_t start : starts) cuts.push_back(start % width);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    cuts.push_back(width);
    for (size_t k = 0; k + 1 < cuts.size(); k++) {
      Weave& weave = weaves.emplace_back(Weave{a.groups, cuts[k + 1] - cuts[k], {-1, cuts[k] * a.groups}, {}});
      int64_t part = 0;
      for (int64_t i = cuts[k]; i < a.c; i += width) {
        while (i >= starts[part + 1]) part++;
        weave.loose.push_back({part, i - starts[part]});
      }
    }
    return weaves;
  }
  for (int64_t part = 0; part < a.count; part++) {
    for (int64_t i = starts[part], end = starts[part + 1]; i < end;) {
      const int64_t rows = i % width ? 0 : (end - i) / width;
      const int64_t few = rows ? width : std::min(width - i % width, end - i);
      Weave& weave = weaves.emplace_back(Weave{few, std::max<int64_t>(rows, 1), {part, i - starts[part]}, {}});
      for (int64_t j = 0; j < few; j++) weave.loose.push_back({-1, a.place(i + j)});
      i += few * weave.length;
    }
  }
  return weaves;
}

}  // namespace convblocks

CONVBLOCKS_KERNEL const char* convblocks_concat_shuffle(const convblocks::Context&, const convblocks::ShuffleArgs&);
