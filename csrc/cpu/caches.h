// How much the caches hold, as the kernel of the operating system says it.
#pragma once
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

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

// What all caches of the machine hold, or what CONVBLOCKS_CACHE_BYTES says, a number: for a process that has a part of
// them, and for tests. The same for any number of threads, as what is summed while it is written depends on it.
inline int64_t all_caches() {
  if (const char* given = std::getenv("CONVBLOCKS_CACHE_BYTES")) {
    char* end;
    const long long bytes = std::strtoll(given, &end, 10);
    if (end != given && !*end && bytes >= 0) return bytes;
  }
  const LastCache last;
  const int64_t processors = std::max<int64_t>(sysconf(_SC_NPROCESSORS_ONLN), 1);
  const int64_t second = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
  return std::max(last.bytes * ((processors + last.sharers - 1) / last.sharers), second * processors);
}

inline int64_t caches() {
  static const int64_t bytes = all_caches();
  return bytes;
}

// Whether a map of so many bytes and a second one of the same size are larger than the caches; or than a quarter of them,
// where much of the maps will have given way to something else.
inline bool exceeds_caches(int64_t bytes) { return 2 * bytes > caches(); }
inline bool crowds_caches(int64_t bytes) { return 8 * bytes > caches(); }

}  // namespace convblocks::cpu
