// The scheduler behind emulator.h, the emulated CUDA runtime, and the switches that tests turn
// (the extern "C" functions at the end; tests/emulator/__init__.py calls them).
#include "emulator.h"

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the context switch is written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 256 << 10;  // touched pages only; the sanitizers need more than most

enum class Schedule { forward = 0, reverse = 1, shuffled = 2 };

struct DeviceModel {
  int capability;  // 80, 90, 100, 120
  int shared_per_block, shared_per_sm, threads_per_sm;
  bool clusters;
};
constexpr int kSms = 32;
constexpr DeviceModel kDevices[] = {{80, 163 << 10, 164 << 10, 2048, false},
                                    {90, 227 << 10, 228 << 10, 2048, true},
                                    {100, 227 << 10, 228 << 10, 2048, true},
                                    {120, 99 << 10, 100 << 10, 1536, true}};

struct Counters {  // as in __init__.py
  int64_t launches, read, written, blocks, threads, cluster, shared_bytes, device;
};

// A barrier that tests can disable: a line, and the how-manieth time that a thread is there (from
// 0), since one line of a helper serves several callers.
struct BarrierSite {
  std::string name;  // file:line
  int visits = 0;    // the most that a thread has made
};

struct Settings {
  DeviceModel device = kDevices[1];
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;
  int disabled_site = -1, disabled_visit = -1;
};

Settings settings;
Counters counters{};
std::vector<BarrierSite> sites;
std::map<std::pair<std::string, int>, int> site_index;
std::map<const void*, size_t> dynamic_limit;
std::string report;
cudaError_t last_error = cudaSuccess;
int current_device = 0;
constexpr int kDeviceCount = 2;

// One phase after the other; a phase ends when `total` threads have arrived.
struct Barrier {
  const char* what;
  unsigned total;
  std::vector<unsigned> arrivals;
  std::vector<Place> places;
};

enum class State { ready, waiting, done };

struct Warp;
struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned number = 0, thread = 0;  // in the cluster, in the block
  unsigned block_phase = 0, warp_phase = 0, cluster_phase = 0, grid_phase = 0;
  bool arrived_at_cluster = false;
  Barrier* awaited = nullptr;
  unsigned awaited_phase = 0;
  Place place{};
  std::vector<int> visits;  // of each site
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][kWarp];
};

struct Block {
  unsigned index, rank, live;
  bool started = false, finished = false;
  std::vector<unsigned char> memory;  // aligned part, then guard
  unsigned char* shared = nullptr;
  Barrier barrier;
  std::vector<Warp> warps;
};

constexpr size_t kGuardBytes = 64;
constexpr unsigned char kPoison = 0xff, kGuard = 0xa5;

// The blocks that run now: a cluster, or all blocks of a cooperative launch.
struct Running {
  Launch launch;
  std::string kernel;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier cluster_barrier, grid_barrier;
  // Who can run, and in which order: always the first, so that some threads get as far ahead of
  // others as the barriers let them.
  using Turn = std::pair<unsigned, unsigned>;  // rank in the schedule, fiber
  std::priority_queue<Turn, std::vector<Turn>, std::greater<Turn>> ready;
  std::mt19937* random = nullptr;
  Fiber* current = nullptr;
  void* scheduler_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
};
Running* running = nullptr;

void make_ready(Fiber& fiber) {
  fiber.state = State::ready;
  unsigned rank = fiber.number;
  if (settings.schedule == Schedule::reverse) rank = ~rank;
  if (settings.schedule == Schedule::shuffled) rank = static_cast<unsigned>((*running->random)());
  running->ready.push({rank, fiber.number});
}

char* stack_for(size_t fiber) {
  static std::vector<char*> pool;
  while (pool.size() <= fiber) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) {
      std::perror("emulator: no memory for stacks");
      std::abort();
    }
    pool.push_back(static_cast<char*>(stack));
  }
  return pool[fiber];
}

void to_scheduler(bool ends) {
  Fiber* self = running->current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(ends ? nullptr : &self->fake_stack, running->scheduler_bottom,
                                 running->scheduler_size);
#endif
  (void)ends;
  emulator_switch(&self->stack_pointer, running->scheduler_stack);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self->fake_stack, nullptr, nullptr);
#endif
}

void to_fiber(Fiber& fiber) {
  running->current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = {fiber.block->index, 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
  emulator_switch(&running->scheduler_stack, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

std::string name_of(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string where(const Fiber& fiber) {
  return running->kernel + ", block " + std::to_string(fiber.block->index) + ", thread " +
         std::to_string(fiber.thread);
}

// Ends the launch: the scheduler sees the report and abandons all fibers.
void fail(const std::string& what) {
  if (report.empty()) report = what + " (" + where(*running->current) + ")";
  to_scheduler(false);
  std::abort();  // never reached: nobody switches back
}

void require_full(unsigned mask, Place place) {
  if (mask != 0xffffffffu) fail("warp operation without the full mask at " + name_of(place));
}

unsigned arrive(Barrier& barrier, unsigned& phase, Place place) {
  const unsigned mine = phase++;
  if (barrier.arrivals.size() <= mine) {
    barrier.arrivals.push_back(0);
    barrier.places.push_back(place);
  }
  const Place first = barrier.places[mine];
  if (first.line != place.line || std::strcmp(first.file, place.file) != 0) {
    fail(std::string("divergent ") + barrier.what + " barrier: one thread is at " + name_of(place) +
         ", another at " + name_of(first));
  }
  if (++barrier.arrivals[mine] == barrier.total) {
    for (Fiber& fiber : running->fibers) {
      if (fiber.state == State::waiting && fiber.awaited == &barrier &&
          fiber.awaited_phase == mine) {
        make_ready(fiber);
      }
    }
  }
  return mine;
}

void wait(Barrier& barrier, unsigned phase, Place place) {
  if (barrier.arrivals[phase] == barrier.total) return;
  Fiber& self = *running->current;
  self.state = State::waiting;
  self.awaited = &barrier;
  self.awaited_phase = phase;
  self.place = place;
  to_scheduler(false);
}

// Whether a test has switched off this visit to the barrier.
bool disabled(Place place) {
  Fiber& self = *running->current;
  const auto key = std::make_pair(std::string(place.file), place.line);
  auto found = site_index.find(key);
  if (found == site_index.end()) {
    found = site_index.emplace(key, static_cast<int>(sites.size())).first;
    sites.push_back({name_of(place), 0});
  }
  const size_t site = static_cast<size_t>(found->second);
  if (self.visits.size() <= site) self.visits.resize(site + 1, 0);
  const int visit = self.visits[site]++;
  sites[site].visits = std::max(sites[site].visits, visit + 1);
  return settings.disabled_site == found->second && settings.disabled_visit == visit;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &running->scheduler_bottom, &running->scheduler_size);
#endif
  running->launch.body(running->launch.context);
  running->current->state = State::done;
  to_scheduler(true);
  std::abort();
}

void start(Fiber& fiber) {
  fiber.stack = stack_for(fiber.number);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // an abandoned fiber may have been here
#endif
  // As emulator_switch leaves a stack: six registers, the address to go to, and a return address of
  // 0, which also makes the stack pointer 8 modulo 16, as a function expects it.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  make_ready(fiber);
}

void finish(Block& block) {
  const unsigned char* guard = block.shared + running->launch.shared_bytes;
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (guard[i] != kGuard && report.empty()) {
      report = "write behind the end of shared memory (" + where(*running->current) + ")";
    }
  }
  std::memset(block.shared, kPoison, running->launch.shared_bytes);
  block.finished = true;
}

std::string deadlock() {
  for (const Fiber& fiber : running->fibers) {
    if (fiber.state == State::waiting) {
      return std::string("divergent ") + fiber.awaited->what + " barrier: a thread waits at " +
             name_of(fiber.place) + " for threads that never come (" + where(fiber) + ")";
    }
  }
  return "deadlock";
}

// How many blocks are resident at once.
unsigned together(const Launch& launch) {
  return launch.cooperative ? launch.grid : launch.cluster;
}

// Whether the device has no room for that. It would know of registers too.
bool too_many_to_cooperate(const Launch& launch) {
  const DeviceModel& device = settings.device;
  const size_t per_sm = std::min(device.threads_per_sm / launch.threads,
                                 static_cast<unsigned>(static_cast<size_t>(device.shared_per_sm) /
                                                       (launch.shared_bytes + 1024)));
  return launch.cooperative && launch.grid > per_sm * kSms;
}

void run_together(const Launch& launch, const std::string& kernel, unsigned first_block,
                  std::mt19937& random) {
  Running now;
  running = &now;
  now.random = &random;
  now.launch = launch;
  now.kernel = kernel;
  now.cluster_barrier = {"cluster", launch.cluster * launch.threads, {}, {}};
  now.grid_barrier = {"grid", launch.grid * launch.threads, {}, {}};
  now.blocks.resize(together(launch));
  now.fibers.resize(now.blocks.size() * launch.threads);
  for (unsigned rank = 0; rank < now.blocks.size(); ++rank) {
    Block& block = now.blocks[rank];
    block.index = first_block + rank;
    block.rank = rank % launch.cluster;
    block.live = launch.threads;
    block.barrier = {"block", launch.threads, {}, {}};
    block.memory.resize(launch.shared_bytes + kGuardBytes + 15);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
    block.shared = block.memory.data() + (16 - address % 16) % 16;
    std::memset(block.shared, kPoison, launch.shared_bytes);
    std::memset(block.shared + launch.shared_bytes, kGuard, kGuardBytes);
    block.warps.resize((launch.threads + kWarp - 1) / kWarp);
    for (Warp& warp : block.warps) warp.barrier = {"warp", kWarp, {}, {}};
    for (unsigned thread = 0; thread < launch.threads; ++thread) {
      const unsigned number = rank * launch.threads + thread;
      Fiber& fiber = now.fibers[number];
      fiber.number = number;
      fiber.block = &block;
      fiber.warp = &block.warps[thread / kWarp];
      fiber.thread = thread;
      start(fiber);
    }
  }
  size_t live = now.fibers.size();
  while (live > 0 && report.empty()) {
    if (now.ready.empty()) {
      report = deadlock();
      break;
    }
    Fiber& fiber = now.fibers[now.ready.top().second];
    now.ready.pop();
    fiber.block->started = true;
    to_fiber(fiber);
    if (report.empty() && fiber.state == State::done) {
      --live;
      if (--fiber.block->live == 0) finish(*fiber.block);
    }
  }
  running = nullptr;
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = readable ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.find('('));
}

cudaError_t refuse(cudaError_t error) { return last_error = error; }

}  // namespace

unsigned char* shared_memory() { return running->current->block->shared; }

void block_barrier(Place place) {
  if (disabled(place)) return;
  Fiber& self = *running->current;
  Barrier& barrier = self.block->barrier;
  wait(barrier, arrive(barrier, self.block_phase, place), place);
}

void warp_barrier(Place place) {
  if (disabled(place)) return;
  Fiber& self = *running->current;
  Barrier& barrier = self.warp->barrier;
  wait(barrier, arrive(barrier, self.warp_phase, place), place);
}

void cluster_arrive(Place place) {
  Fiber& self = *running->current;
  if (self.arrived_at_cluster) fail("two arrivals at the cluster barrier without a wait between");
  self.arrived_at_cluster = true;
  arrive(running->cluster_barrier, self.cluster_phase, place);
}

void cluster_wait(Place place) {
  Fiber& self = *running->current;
  if (!self.arrived_at_cluster) fail("wait at the cluster barrier without an arrival");
  self.arrived_at_cluster = false;
  if (disabled(place)) return;
  wait(running->cluster_barrier, self.cluster_phase - 1, place);
}

void grid_barrier(Place place) {
  if (!running->launch.cooperative) fail("grid barrier in a launch that is not cooperative");
  if (disabled(place)) return;
  Fiber& self = *running->current;
  Barrier& barrier = running->grid_barrier;
  wait(barrier, arrive(barrier, self.grid_phase, place), place);
}

unsigned cluster_rank() { return running->current->block->rank; }
unsigned cluster_size() { return running->launch.cluster; }

void* map_shared(const void* pointer, unsigned rank) {
  const Block& own = *running->current->block;
  const auto* p = static_cast<const unsigned char*>(pointer);
  if (p < own.shared || p >= own.shared + running->launch.shared_bytes) {
    fail("a pointer that is not into shared memory was mapped to another block");
  }
  if (rank >= running->launch.cluster) fail("a block outside the cluster was asked for");
  const Block& other = running->blocks[rank];
  if (!other.started) fail("shared memory of a block that has not started");
  if (other.finished) fail("shared memory of a block that has ended");
  return other.shared + (p - own.shared);
}

uint64_t shuffle(uint64_t value, int source, unsigned mask, Place place) {
  require_full(mask, place);
  Fiber& self = *running->current;
  Warp& warp = *self.warp;
  // Slots by turns: whoever is one shuffle ahead writes the other ones.
  uint64_t* slots = warp.slots[self.warp_phase % 2];
  slots[self.thread % kWarp] = value;
  wait(warp.barrier, arrive(warp.barrier, self.warp_phase, place), place);
  return slots[source];
}

unsigned ballot(bool predicate, unsigned mask, Place place) {
  require_full(mask, place);
  Fiber& self = *running->current;
  Warp& warp = *self.warp;
  uint64_t* slots = warp.slots[self.warp_phase % 2];
  slots[self.thread % kWarp] = predicate;
  wait(warp.barrier, arrive(warp.barrier, self.warp_phase, place), place);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) bits |= static_cast<unsigned>(slots[lane]) << lane;
  return bits;
}

void count_read(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("misaligned read of " + std::to_string(bytes) + " bytes");
  }
  counters.read += static_cast<int64_t>(bytes);
}

void count_write(void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    fail("misaligned write of " + std::to_string(bytes) + " bytes");
  }
  counters.written += static_cast<int64_t>(bytes);
}

int launch(const Launch& launch) {
  if (launch.grid == 0 || launch.grid > INT32_MAX || launch.threads == 0 || launch.threads > 1024 ||
      launch.threads % kWarp != 0) {
    return refuse(cudaErrorInvalidConfiguration);
  }
  const auto limit = dynamic_limit.find(launch.kernel);
  if (launch.shared_bytes > (limit == dynamic_limit.end() ? 48 << 10 : limit->second)) {
    return refuse(cudaErrorInvalidValue);
  }
  const unsigned cluster = launch.cluster;
  if (cluster == 0 || cluster > 8 || (cluster & (cluster - 1)) != 0 || launch.grid % cluster != 0 ||
      (cluster > 1 && (launch.cooperative || !settings.device.clusters))) {
    return refuse(cudaErrorInvalidClusterSize);
  }
  if (too_many_to_cooperate(launch)) return refuse(cudaErrorCooperativeLaunchTooLarge);
  ++counters.launches;
  counters.blocks = launch.grid;
  counters.threads = launch.threads;
  counters.cluster = cluster;
  counters.shared_bytes = static_cast<int64_t>(launch.shared_bytes);
  counters.device = current_device;
  blockDim = dim3(launch.threads);
  gridDim = dim3(launch.grid);
  std::mt19937 random(settings.seed);
  std::vector<unsigned> first_blocks(launch.grid / together(launch));
  for (size_t i = 0; i < first_blocks.size(); ++i)
    first_blocks[i] = static_cast<unsigned>(i) * together(launch);
  if (settings.schedule == Schedule::reverse) {
    std::reverse(first_blocks.begin(), first_blocks.end());
  } else if (settings.schedule == Schedule::shuffled) {
    std::shuffle(first_blocks.begin(), first_blocks.end(), random);
  }
  report.clear();
  const std::string kernel = kernel_name(launch.kernel);
  for (const unsigned first : first_blocks) {
    run_together(launch, kernel, first, random);
    if (!report.empty()) return refuse(cudaErrorLaunchFailure);
  }
  return cudaSuccess;
}

}  // namespace emulator

using emulator::settings;

cudaError_t emulated_launch(const emulator::Launch& launch) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  return static_cast<cudaError_t>(emulator::launch(launch));
}

cudaError_t cudaGetDevice(int* device) {
  *device = emulator::current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= emulator::kDeviceCount) {
    return emulator::refuse(cudaErrorInvalidDevice);
  }
  emulator::current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = settings.device.shared_per_block;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = settings.device.shared_per_sm;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulator::kSms;
      break;
    case cudaDevAttrClusterLaunch:
      *value = settings.device.clusters;
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = settings.device.capability;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || value > settings.device.shared_per_block) {
    return emulator::refuse(cudaErrorInvalidValue);
  }
  emulator::dynamic_limit[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 0;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emulator::last_error;
  emulator::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorInvalidClusterSize:
      return "Invalid cluster size";
    case cudaErrorCooperativeLaunchTooLarge:
      return "too many blocks in cooperative launch";
    case cudaErrorLaunchFailure:
      return emulator::report.c_str();
  }
  return "unrecognized error code";
}

extern "C" {

__attribute__((visibility("default"))) bool emulator_set_device(int capability) {
  for (const emulator::DeviceModel& device : emulator::kDevices) {
    if (device.capability == capability) {
      settings.device = device;
      emulator::dynamic_limit.clear();
      return true;
    }
  }
  return false;
}

__attribute__((visibility("default"))) void emulator_set_schedule(int schedule, unsigned seed) {
  settings.schedule = static_cast<emulator::Schedule>(schedule);
  settings.seed = seed;
}

__attribute__((visibility("default"))) void emulator_disable_barrier(int site, int visit) {
  settings.disabled_site = site;
  settings.disabled_visit = visit;
}

// The name of a barrier that was reached since the last reset, or null behind the last one.
__attribute__((visibility("default"))) const char* emulator_barrier(int site, int* visits) {
  if (site < 0 || site >= static_cast<int>(emulator::sites.size())) return nullptr;
  *visits = emulator::sites[static_cast<size_t>(site)].visits;
  return emulator::sites[static_cast<size_t>(site)].name.c_str();
}

__attribute__((visibility("default"))) void emulator_reset_barriers() {
  emulator::sites.clear();
  emulator::site_index.clear();
}

__attribute__((visibility("default"))) void emulator_reset_counters() { emulator::counters = {}; }

__attribute__((visibility("default"))) emulator::Counters* emulator_counters() {
  return &emulator::counters;
}

__attribute__((visibility("default"))) int emulator_last_error() { return cudaGetLastError(); }
}
