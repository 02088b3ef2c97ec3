// How much the caches hold, as the kernel of the operating system says it.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <optional>

namespace convblocks::cpu {

// One cache of the last level, and how many processors it serves. The C library may know the sum of several of them.
struct LastCache {
  int64_t bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
  int sharers = 1 << 20;

  LastCache() {
    long kilobytes = 0;
    read("size", [&](FILE* file) {
      if (std::fscanf(file, "%ldK", &kilobytes) == 1 && kilobytes > 0) bytes = int64_t{kilobytes} << 10;
    });
    read("shared_cpu_list", [this](FILE* file) {  // as 0-7,64-71
      int first, last, count = 0;
      while (std::fscanf(file, "%d", &first) == 1) {
        last = first;
        int next = std::fgetc(file);
        if (next == '-' && std::fscanf(file, "%d", &last) == 1) next = std::fgetc(file);
        count += last - first + 1;
        if (next != ',') break;
      }
      if (count > 0) sharers = count;
    });
  }

 private:
  template <class F>
  static void read(const char* name, F f) {
    char path[96];
    std::snprintf(path, sizeof(path), "/sys/devices/system/cpu/cpu0/cache/index3/%s", name);
    if (FILE* file = std::fopen(path, "r")) {
      f(file);
      std::fclose(file);
    }
  }
};

// What CONVBLOCKS_CACHE_BYTES says, a number, that caches hold at most: for a process that has a part of them, and for tests.
inline std::optional<int64_t> given_caches() {
  const char* given = std::getenv("CONVBLOCKS_CACHE_BYTES");
  if (!given) return {};
  char* end;
  const long long bytes = std::strtoll(given, &end, 10);
  return end != given && !*end && bytes >= 0 ? std::optional<int64_t>(bytes) : std::nullopt;
}

// What all caches of the machine hold. The same for any number of threads, as what is summed while it is written depends on
// it.
inline int64_t caches() {
  static const int64_t bytes = given_caches().value_or([] {
    const LastCache last;
    const int64_t processors = std::max<int64_t>(sysconf(_SC_NPROCESSORS_ONLN), 1);
    const int64_t second = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
    return std::max(last.bytes * ((processors + last.sharers - 1) / last.sharers), second * processors);
  }());
  return bytes;
}

// What the cache of the second level of one processor holds.
inline int64_t second_cache() {
  static const int64_t bytes = [] {
    const int64_t own = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return std::min(own > 0 ? own : 1 << 20, given_caches().value_or(INT64_MAX));
  }();
  return bytes;
}

// Whether a map of so many bytes and a second one of the same size are larger than the caches.
inline bool exceeds_caches(int64_t bytes) { return 2 * bytes > caches(); }

// Whether of maps that take so many bytes together little is left in the caches of the second level that so many threads
// have: what is not read or written in the order in which it lies has to be fetched early. Results do not depend on it.
inline bool leaves_second_caches(int64_t bytes, int64_t threads) { return bytes / 4 > second_cache() * threads; }

}  // namespace convblocks::cpu
