// Sees every load and store of the kernels: they are compiled with -fsanitize=thread, and this file is linked in the
// place of ThreadSanitizer's runtime. It knows what kernels may touch and the order that CUDA's rules give to two
// accesses: barriers order the threads of a block, warp operations those of a warp, nothing orders blocks.
#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime.h"

namespace cuda_cpu {
namespace {

constexpr uintptr_t kCell = 2;  // bytes; the smallest type that kernels share
constexpr uintptr_t kSector = 32;
constexpr size_t kMaxReports = 20;

struct Access {
  int64_t block = 0;
  uint32_t block_epoch = 0, warp_epoch = 0;
  int thread = 0;
  void* code = nullptr;
};

struct Cell {
  Access store, atomic, load, other_load;  // the last ones; other_load: of another thread, if possible of another warp
};

struct Memory {
  Range range;
  bool writable = true;
  std::vector<uint8_t> mask;  // of the bytes that belong to the view; empty: all do
  std::vector<Cell> cells;
  std::vector<int64_t> loaded, stored;  // the last pass that touched each sector
};

struct Kind {
  const char* name;
  bool store, atomic, aligned;
};

bool watching = false;
std::map<uintptr_t, Memory> memories;        // by their first address
std::unordered_map<uintptr_t, Cell> shared;  // by address / kCell
Memory* last = nullptr;                      // where the last access went
std::set<std::tuple<const char*, void*, void*>> reported;
struct {
  int64_t loaded = 0, stored = 0, loaded_sectors = 0, stored_sectors = 0;
} traffic;

Range own_module;
uintptr_t own_base = 0;

void find_own_module() {
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void*) {
        Range r{~uintptr_t(0), 0};
        for (int i = 0; i < object->dlpi_phnum; i++)
          if (auto& segment = object->dlpi_phdr[i]; segment.p_type == PT_LOAD) {
            r.begin = std::min(r.begin, uintptr_t(object->dlpi_addr + segment.p_vaddr));
            r.end = std::max(r.end, uintptr_t(object->dlpi_addr + segment.p_vaddr + segment.p_memsz));
          }
        if (r.holds(reinterpret_cast<uintptr_t>(&own_module))) own_module = r, own_base = object->dlpi_addr;
        return 0;
      },
      nullptr);
}

Access current(void* code) { return {now.block, now.block_epoch, now.warp_epoch[now.thread / 32], now.thread, code}; }

// emulator.py turns @address into file and line.
std::string place(const Access& a) {
  char code[32];
  std::snprintf(code, sizeof code, "@0x%lx", (unsigned long)(reinterpret_cast<uintptr_t>(a.code) - own_base - 1));
  return std::string(code) + " (block " + std::to_string(a.block - now.first_block) + ", thread " +
         std::to_string(a.thread) + ")";
}

// One report for each pair of places in the code: the others say the same.
void report_once(const char* kind, const Access& a, const Access& b, const std::string& text) {
  if (reported.size() < kMaxReports && reported.insert({kind, a.code, b.code}).second) report(text);
}

// Whether an earlier access has no order with the one that happens now.
bool is_concurrent(const Access& a, bool shared) {
  if (a.block < now.first_block || (shared && a.block != now.block)) return false;
  if (a.block != now.block) return true;
  if (a.thread == now.thread || a.block_epoch != now.block_epoch) return false;
  const int warp = now.thread / 32;
  return a.thread / 32 != warp || a.warp_epoch == now.warp_epoch[warp];
}

void check_race(Cell& cell, const Kind& kind, const Access& access, bool is_shared) {
  auto race = [&](const Access& earlier, const char* what) {
    if (is_concurrent(earlier, is_shared))
      report_once(what, access, earlier,
                  std::string("race in ") + (is_shared ? "shared" : "global") + " memory: " + kind.name + " at " +
                      place(access) + ", " + what + " at " + place(earlier));
  };
  race(cell.store, "store");
  if (!kind.atomic) race(cell.atomic, "atomic");
  if (kind.store) {
    race(cell.load, "load");
    race(cell.other_load, "load");
    (kind.atomic ? cell.atomic : cell.store) = access;
    return;
  }
  const bool other_warp = cell.other_load.block != now.block || cell.other_load.thread / 32 != now.thread / 32;
  if ((cell.load.block != now.block || cell.load.thread != now.thread) &&
      !(other_warp && is_concurrent(cell.other_load, is_shared)))
    cell.other_load = cell.load;
  cell.load = access;
}

Memory* find(uintptr_t address) {
  if (last && last->range.holds(address)) return last;
  auto after = memories.upper_bound(address);
  if (after == memories.begin() || !std::prev(after)->second.range.holds(address)) return nullptr;
  return last = &std::prev(after)->second;
}

void count(Memory& memory, uintptr_t address, size_t bytes, const Kind& kind) {
  // A pass is what a block does between two barriers or warp operations.
  const int64_t pass = (now.block << 24) + (int64_t(now.block_epoch) << 12) + now.warp_epoch[now.thread / 32];
  auto& passes = kind.store ? memory.stored : memory.loaded;
  const uintptr_t first = memory.range.begin / kSector;
  if (passes.empty()) passes.resize((memory.range.end - 1) / kSector - first + 1);
  (kind.store ? traffic.stored : traffic.loaded) += int64_t(bytes);
  for (uintptr_t s = address / kSector; s <= (address + bytes - 1) / kSector; s++)
    if (std::exchange(passes[s - first], pass) != pass)
      (kind.store ? traffic.stored_sectors : traffic.loaded_sectors)++;
}

std::string out_of_bounds(uintptr_t address) {
  auto nearest = [&](const Range& r, const std::string& what) {
    std::string size = std::to_string(r.end - r.begin);
    if (address >= r.end) return std::to_string(address - r.end) + " bytes past the end of " + what + size + " bytes";
    return std::to_string(r.begin - address) + " bytes before the start of " + what + size + " bytes";
  };
  auto distance = [&](const Range& r) { return address >= r.end ? address - r.end : r.begin - address; };
  Range best = now.dynamic_shared;
  for (auto& [begin, memory] : memories)
    if (best.begin == best.end || distance(memory.range) < distance(best)) best = memory.range;
  const bool is_shared = best.begin == now.dynamic_shared.begin;
  return nearest(best, is_shared ? "dynamic shared memory of " : "a tensor of ");
}

// Returns false if the access must not happen, after a report.
bool is_allowed(uintptr_t address, size_t bytes, const Kind& kind, const Access& access) {
  const uintptr_t end = address + bytes;
  auto fault = [&](const char* what, const std::string& details = "") {
    report_once(
        what, access, {},
        std::string(what) + ": " + kind.name + " of " + std::to_string(bytes) + " bytes at " + place(access) + details);
    return false;
  };
  auto inside = [&](const Range& r) { return r.holds(address) && end <= r.end; };
  if (kind.aligned && address % bytes) return fault("misaligned");
  if (inside(now.static_shared) || inside(now.dynamic_shared)) {
    for (uintptr_t c = address / kCell; c <= (end - 1) / kCell; c++) check_race(shared[c], kind, access, true);
    return true;
  }
  Memory* memory = find(address);
  if (!memory || end > memory->range.end) {
    const auto position = reinterpret_cast<uintptr_t>(&here);
    const bool constant = inside(now.call) || inside({position, position + sizeof here}) || inside(own_module);
    return (constant && !kind.store) || fault("out of bounds", ", " + out_of_bounds(address));
  }
  const uintptr_t offset = address - memory->range.begin;
  auto belongs = [&](size_t byte) { return memory->mask.empty() || memory->mask[offset + byte]; };
  for (size_t byte = 0; byte < bytes; byte++)
    if (!belongs(byte)) return fault("out of bounds", ", between the elements of a view");
  if (kind.store && !memory->writable) return fault("store to an input");
  if (memory->cells.empty()) memory->cells.resize((memory->range.end - 1) / kCell - memory->range.begin / kCell + 1);
  for (uintptr_t c = address / kCell; c <= (end - 1) / kCell; c++)
    check_race(memory->cells[c - memory->range.begin / kCell], kind, access, false);
  count(*memory, address, bytes, kind);
  return true;
}

void check(const void* pointer, size_t bytes, const Kind& kind, void* code) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (!watching || now.thread < 0 || now.stack.holds(address)) return;
  if (!is_allowed(address, bytes, kind, current(code))) stop_launch();
}

}  // namespace

void allow(const void* begin, size_t bytes, const uint8_t* mask, bool writable) {
  const auto first = reinterpret_cast<uintptr_t>(begin);
  Memory added{{first, first + bytes}, writable, {}, {}, {}, {}};
  if (mask) added.mask.assign(mask, mask + bytes);
  for (auto i = memories.begin(); i != memories.end();) {  // two views of one tensor become one memory
    Memory& m = i->second;
    if (m.range.end <= added.range.begin || m.range.begin >= added.range.end) {
      ++i;
      continue;
    }
    Memory both{{std::min(m.range.begin, added.range.begin), std::max(m.range.end, added.range.end)},
                m.writable || added.writable,
                {},
                {},
                {},
                {}};
    both.mask.resize(both.range.end - both.range.begin);
    for (const Memory* part : {&m, &added})
      for (uintptr_t a = part->range.begin; a < part->range.end; a++)
        both.mask[a - both.range.begin] |= part->mask.empty() || part->mask[a - part->range.begin];
    added = std::move(both);
    i = memories.erase(i);
  }
  last = nullptr;
  memories[added.range.begin] = std::move(added);
}

void forget(const void* begin) {
  last = nullptr;
  memories.erase(reinterpret_cast<uintptr_t>(begin));
}

}  // namespace cuda_cpu

// ---- For the tests (emulator.py) ----
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_cpu_allow(const void* begin, size_t bytes, const uint8_t* mask, int writable) {
  cuda_cpu::allow(begin, bytes, mask, writable != 0);
}

EXPORT void cuda_cpu_watch(int on) {
  using namespace cuda_cpu;
  if (!own_base) find_own_module();
  watching = on != 0;
  watch_allocations(watching);
  if (!watching) {
    memories.clear();
    last = nullptr;
  }
  shared.clear();
  reported.clear();
  traffic = {};
}

EXPORT void cuda_cpu_traffic(int64_t counts[4]) {
  auto& t = cuda_cpu::traffic;
  const int64_t all[] = {t.loaded, t.stored, t.loaded_sectors, t.stored_sectors};
  std::copy(all, all + 4, counts);
}

// ---- What the compiler calls ----
#define HOOK extern "C" void
#define CHECK(bytes, ...) cuda_cpu::check(p, bytes, {__VA_ARGS__}, __builtin_return_address(0))

#define HOOKS(bytes)                                                                        \
  HOOK __tsan_read##bytes(void* p) { CHECK(bytes, "load", false, false, true); }            \
  HOOK __tsan_write##bytes(void* p) { CHECK(bytes, "store", true, false, true); }           \
  HOOK __tsan_unaligned_read##bytes(void* p) { CHECK(bytes, "load", false, false, false); } \
  HOOK __tsan_unaligned_write##bytes(void* p) { CHECK(bytes, "store", true, false, false); }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

HOOK __tsan_init() {}
HOOK __tsan_read_range(void* p, size_t bytes) { CHECK(bytes, "load", false, false, false); }
HOOK __tsan_write_range(void* p, size_t bytes) { CHECK(bytes, "store", true, false, false); }

#define ATOMIC_HOOKS(bits, T)                                                                              \
  extern "C" T __tsan_atomic##bits##_fetch_add(volatile T* q, T value, int) {                              \
    void* p = const_cast<T*>(q);                                                                           \
    CHECK(bits / 8, "atomic", true, true, true);                                                           \
    return __atomic_fetch_add(q, value, __ATOMIC_RELAXED);                                                 \
  }                                                                                                        \
  extern "C" T __tsan_atomic##bits##_compare_exchange_val(volatile T* q, T old, T value, int, int) {       \
    void* p = const_cast<T*>(q);                                                                           \
    CHECK(bits / 8, "atomic", true, true, true);                                                           \
    __atomic_compare_exchange_n(q, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);                \
    return old;                                                                                            \
  }                                                                                                        \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(volatile T* q, T* old, T value, int, int) { \
    void* p = const_cast<T*>(q);                                                                           \
    CHECK(bits / 8, "atomic", true, true, true);                                                           \
    return __atomic_compare_exchange_n(q, old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);          \
  }
ATOMIC_HOOKS(32, uint32_t)
ATOMIC_HOOKS(64, uint64_t)
