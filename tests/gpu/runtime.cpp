// Runs a kernel's threads as fibers: a thread runs until a barrier or a warp operation, then the next one does.
// Blocks run one after another. Shared memory is NaN when a block starts. A broken rule ends the launch with an error.
#include "runtime.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "fiber.h"

namespace cuda_cpu {

constexpr size_t kMaxDynamic = 227 << 10, kDefaultDynamic = 48 << 10;
constexpr int kMaxThreads = 1024;

Coordinates here;
Now now;

namespace {

enum class State { ready, at_barrier, at_warp, done };

struct Thread {
  Fiber fiber;
  State state;
  Where where;  // of the barrier or warp operation
  WarpOperation operation;
  unsigned mask;
  int source;
  uint64_t value;
};

std::vector<Thread> threads;  // of the running block
const Launch* running = nullptr;
char* dynamic = nullptr;
bool stopped = false;
int seed = 0;
std::map<const void*, size_t> dynamic_limits;
std::string reports;
struct {
  cudaError_t code = cudaSuccess;
  std::string text;
} last_error;
thread_local char shared_anchor;  // makes sure that the segment of static shared memory exists

void fail(cudaError_t code, const std::string& text) { last_error = {code, text}; }

std::string text(const Where& where) {
  std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

std::string text(uint3 p) {
  return "(" + std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")";
}

// __shared__ is thread_local here, and nothing else is: so this object's TLS segment is the static shared memory.
Range static_shared() {
  shared_anchor = 0;
  Range range;
  dl_iterate_phdr(
      [](dl_phdr_info* object, size_t, void* result) {
        auto anchor = reinterpret_cast<uintptr_t>(&shared_anchor), begin = uintptr_t(object->dlpi_tls_data);
        for (int i = 0; begin && i < object->dlpi_phnum; i++)
          if (Range r{begin, begin + object->dlpi_phdr[i].p_memsz};
              object->dlpi_phdr[i].p_type == PT_TLS && r.holds(anchor))
            *static_cast<Range*>(result) = r;
        return 0;
      },
      &range);
  return range;
}

Thread& current() { return threads[now.thread]; }

void thread_main() {
  current().fiber.enter();
  running->body(running->call);
  current().state = State::done;
  current().fiber.pause(true);
}

void wait(State state, const Where& where) {
  current().state = state;
  current().where = where;
  current().fiber.pause();
}

// Completes the operation of the lanes that wait with one mask, if all of them are there. False: a rule is broken.
bool complete_warp_operation(int warp, int count, bool& progress) {
  Thread* lanes = &threads[warp * 32];
  for (int first = 0; first < count; first++) {
    if (lanes[first].state != State::at_warp) continue;
    const unsigned mask = lanes[first].mask;
    unsigned active = 0, waiting = 0;
    for (int l = 0; l < count; l++)
      if (mask >> l & 1) {
        active |= unsigned(lanes[l].state != State::done) << l;
        waiting |= unsigned(lanes[l].state == State::at_warp) << l;
      }
    if (waiting != active) continue;
    unsigned ballot = 0;
    for (int l = 0; l < count; l++) {
      if (!(waiting >> l & 1)) continue;
      Thread &a = lanes[first], &b = lanes[l];
      if (b.mask != mask || b.operation != a.operation || !same_place(a.where, b.where)) {
        report("divergent warp operation in block " + text(here.block) + ", warp " + std::to_string(warp) + ": lane " +
               std::to_string(first) + " is at " + text(a.where) + ", lane " + std::to_string(l) + " at " +
               text(b.where) + ", with masks that name both");
        return false;
      }
      if (b.operation == WarpOperation::shuffle && !(waiting >> b.source & 1)) {
        report("shuffle at " + text(b.where) + " in block " + text(here.block) + ": lane " + std::to_string(l) +
               " reads lane " + std::to_string(b.source) + ", which takes no part in it");
        return false;
      }
      ballot |= unsigned(b.value) << l;
    }
    std::array<uint64_t, 32> values{};
    for (int l = 0; l < count; l++) values[l] = lanes[l].value;
    for (int l = 0; l < count; l++) {
      if (!(waiting >> l & 1)) continue;
      if (lanes[l].operation == WarpOperation::shuffle) lanes[l].value = values[lanes[l].source];
      if (lanes[l].operation == WarpOperation::ballot) lanes[l].value = ballot;
      lanes[l].state = State::ready;
    }
    now.warp_epoch[warp]++;
    progress = true;
  }
  return true;
}

bool complete_barrier(bool& progress) {
  for (auto& t : threads) {
    if (t.state != State::at_barrier) return true;
    if (!same_place(t.where, threads[0].where)) {
      report("divergent barrier in block " + text(here.block) + ": threads wait at " + text(threads[0].where) +
             " and at " + text(t.where));
      return false;
    }
  }
  for (auto& t : threads) t.state = State::ready;
  now.block_epoch++;
  progress = true;
  return true;
}

void report_divergence() {
  std::map<std::string, int> places;
  for (auto& t : threads) {
    if (t.state == State::done) places["returned"]++;
    if (t.state == State::at_barrier) places["wait at __syncthreads, " + text(t.where)]++;
    if (t.state == State::at_warp) places["wait at a warp operation, " + text(t.where)]++;
  }
  std::string fault = "divergent barrier in block " + text(here.block) + ":";
  for (auto& [place, count] : places) fault += " " + std::to_string(count) + " threads " + place + ";";
  fault.pop_back();
  report(fault);
}

// False: a rule is broken, and the block is left as it stands.
bool run_block(const std::vector<int>& order) {
  const dim3 size = here.block_dim;
  now.block++;
  now.block_epoch = 0;
  now.warp_epoch.fill(0);
  std::memset(reinterpret_cast<void*>(now.static_shared.begin), 0xff, now.static_shared.end - now.static_shared.begin);
  if (running->dynamic_bytes) std::memset(dynamic, 0xff, running->dynamic_bytes);
  for (auto& t : threads) {
    t.state = State::ready;
    t.fiber.start(thread_main);
  }
  const int count = int(threads.size());
  for (int alive = count; alive > 0;) {
    bool progress = false;
    for (int i : order) {
      if (threads[i].state != State::ready) continue;
      now.thread = i;
      now.stack.begin = reinterpret_cast<uintptr_t>(threads[i].fiber.stack);
      now.stack.end = now.stack.begin + Fiber::kStack;
      here.thread = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      threads[i].fiber.resume();
      now.thread = -1;
      if (stopped) return false;
      progress = true;
      alive -= threads[i].state == State::done;
    }
    for (int w = 0; w * 32 < count; w++)
      if (!complete_warp_operation(w, std::min(32, count - w * 32), progress)) return false;
    if (alive && !complete_barrier(progress)) return false;
    if (alive && !progress) return report_divergence(), false;
  }
  return true;
}

bool is_valid(const Launch& l) {
  const auto threads = uint64_t(l.block.x) * l.block.y * l.block.z, blocks = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  if (!threads || threads > kMaxThreads || l.block.z > 64 || !blocks || l.grid.x > 0x7fffffff || l.grid.y > 65535 ||
      l.grid.z > 65535) {
    fail(cudaErrorInvalidConfiguration, "invalid configuration: a grid of " +
                                            text(uint3{l.grid.x, l.grid.y, l.grid.z}) + " blocks of " +
                                            text(uint3{l.block.x, l.block.y, l.block.z}) + " threads");
    return false;
  }
  auto limit = dynamic_limits.find(l.kernel);
  const size_t allowed = limit == dynamic_limits.end() ? kDefaultDynamic : limit->second;
  if (l.dynamic_bytes > allowed) {
    fail(cudaErrorInvalidValue, "invalid argument: a launch with " + std::to_string(l.dynamic_bytes) +
                                    " bytes of dynamic shared memory of a kernel that may use " +
                                    std::to_string(allowed) + " (cudaFuncSetAttribute)");
    return false;
  }
  return true;
}

// Thread i of a launch has the i-th part of one mapping, which lasts for the process.
char* stack_of(int i) {
  static char* const stacks = [] {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    return static_cast<char*>(mmap(nullptr, kMaxThreads * Fiber::kStack, PROT_READ | PROT_WRITE, flags, -1, 0));
  }();
  return stacks + i * Fiber::kStack;
}

// 0: forward, 1: backward, else the seed of a random order.
template <class T>
std::vector<T> permutation(T count) {
  std::vector<T> order(count);
  std::iota(order.begin(), order.end(), T(0));
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

}  // namespace

void report(const std::string& fault) {
  reports += fault + "\n";
  if (last_error.code == cudaSuccess) fail(cudaErrorLaunchFailure, fault);
}

void stop_launch() {
  stopped = true;
  current().fiber.pause(true);
}

void run(const Launch& launch) {
  static std::mutex one_launch;
  std::lock_guard lock(one_launch);
  if (!is_valid(launch)) return;
  running = &launch;
  threads = std::vector<Thread>(launch.block.x * launch.block.y * launch.block.z);
  for (int i = 0; auto& t : threads) t.fiber.stack = stack_of(i++);
  std::unique_ptr<char, void (*)(void*)> memory(nullptr, std::free);
  if (void* p = nullptr; launch.dynamic_bytes && posix_memalign(&p, 16, launch.dynamic_bytes) == 0)
    memory.reset(static_cast<char*>(p));  // of the exact size: AddressSanitizer sees an overrun
  dynamic = memory.get();
  const auto begin = reinterpret_cast<uintptr_t>(dynamic), call = reinterpret_cast<uintptr_t>(launch.call);
  now.static_shared = static_shared();
  now.dynamic_shared = {begin, begin + launch.dynamic_bytes};
  now.call = {call, call + launch.call_bytes};
  now.first_block = now.block + 1;
  stopped = false;
  here.block_dim = launch.block;
  here.grid_dim = launch.grid;
  const auto order = permutation(int(threads.size()));
  for (int64_t i : permutation(int64_t(launch.grid.x) * launch.grid.y * launch.grid.z)) {
    here.block = {unsigned(i % launch.grid.x), unsigned(i / launch.grid.x % launch.grid.y),
                  unsigned(i / launch.grid.x / launch.grid.y)};
    if (!run_block(order)) break;
  }
#if defined(__SANITIZE_ADDRESS__)
  for (auto& t : threads) __asan_unpoison_memory_region(t.fiber.stack, Fiber::kStack);  // frames that were left
#endif
}

void sync_block(const Where& where) { wait(State::at_barrier, where); }

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source, const Where& where) {
  Thread& thread = current();
  if (!(mask >> lane() & 1)) {
    report("warp operation at " + text(where) + ": lane " + std::to_string(lane()) + " is not in its own mask");
    mask |= 1u << lane();
  }
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;
  wait(State::at_warp, where);
  return thread.value;
}

int lane() { return now.thread % 32; }

void* dynamic_shared() { return dynamic; }

cudaError_t set_dynamic_limit(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMaxDynamic) {
    fail(cudaErrorInvalidValue, "invalid argument: a limit of " + std::to_string(bytes) +
                                    " bytes of dynamic shared memory; a block has at most " +
                                    std::to_string(kMaxDynamic));
    return cudaErrorInvalidValue;
  }
  dynamic_limits[kernel] = bytes;
  return cudaSuccess;
}

}  // namespace cuda_cpu

cudaError_t cudaPeekAtLastError() { return cuda_cpu::last_error.code; }

cudaError_t cudaGetLastError() { return std::exchange(cuda_cpu::last_error.code, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_cpu::last_error.text.c_str();
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return *value = 132, cudaSuccess;
    case cudaDevAttrL2CacheSize: return *value = 50 << 20, cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return *value = 2048, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: return *value = 0, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = 228 << 10, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = int(cuda_cpu::kMaxDynamic), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

// ---- For the tests (emulator.py) ----
#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void cuda_cpu_order(int seed) { cuda_cpu::seed = seed; }

// The faults since the last call; the text lives until the next one.
EXPORT const char* cuda_cpu_reports() {
  static std::string text;
  text = std::exchange(cuda_cpu::reports, {});
  cuda_cpu::last_error.code = cudaSuccess;
  return text.c_str();
}
