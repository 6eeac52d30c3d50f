// The scheduler behind emulator.h: threads, blocks and clusters, and what they wait for.
#include "emulator.h"

#include <cuda_runtime.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "ready.h"
#include "settings.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;

struct Warp;
struct Block;
struct Thread;

// One phase after the other; a phase ends when `total` threads have arrived. Two are in flight
// where a test has let threads pass a barrier without waiting.
struct Barrier {
  struct Phase {
    unsigned arrived = 0;
    Place first{};              // of the first to arrive
    Thread* waiting = nullptr;  // the last to wait; Thread::next_waiting leads to the others
  };
  const char* what = "";
  unsigned total = 0, ended = 0;
  Phase phases[2];
};

struct Thread : Fiber {
  Block* block = nullptr;
  Warp* warp = nullptr;
  Thread* next_waiting = nullptr;
  unsigned number = 0, in_block = 0;
  const Barrier* awaited = nullptr;
  Place place{};  // where it waits
  unsigned cluster_phase = 0;
  bool arrived_at_cluster = false, ended = false;
  std::vector<int> visits;  // of each barrier site
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
  Running(const Launch& launch, unsigned blocks, std::mt19937& random)
      : launch(launch),
        blocks(blocks),
        threads(blocks * launch.threads),
        ready(blocks * launch.threads, settings.schedule, random) {}

  const Launch& launch;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  Barrier cluster_barrier, grid_barrier;
  Ready ready;
  Fiber scheduler;
  Thread* current = nullptr;
  Fiber* previous = nullptr;  // which switched to it
};
Running* running = nullptr;

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string name = readable ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.find('('));
}

std::string name_of(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

std::string where(const Thread& thread) {
  return kernel_name(running->launch.kernel) + ", block " + std::to_string(thread.block->index) +
         ", thread " + std::to_string(thread.in_block);
}

// Ends the launch: the scheduler sees the report and abandons all threads.
void fail(const std::string& what) {
  if (report.empty()) report = what + " (" + where(*running->current) + ")";
  switch_fiber(*running->current, running->scheduler);
  std::abort();  // never reached: nobody switches back
}

bool operator==(Place a, Place b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void require_full(unsigned mask, Place place) {
  if (mask != 0xffffffffu) fail("warp operation without the full mask at " + name_of(place));
}

void thread_main() {
  switched_from(*running->previous);
  running->launch.body(running->launch.context);
  running->current->ended = true;
  switch_fiber(*running->current, running->scheduler, true);
  std::abort();  // never reached
}

// Goes on with the next thread that can run.
void run_next(Fiber& from) {
  Thread& next = running->threads[running->ready.take()];
  if (next.stack == nullptr) start_fiber(next, thread_main);
  next.block->started = true;
  running->current = &next;
  running->previous = &from;
  threadIdx = {next.in_block, 0, 0};
  blockIdx = {next.block->index, 0, 0};
  switch_fiber(from, next);
}

void arrive(Barrier& barrier, unsigned phase, Place place) {
  Barrier::Phase& now = barrier.phases[phase % 2];
  if (now.arrived == 0) now.first = place;
  if (!(now.first == place)) {
    fail(std::string("divergent ") + barrier.what + " barrier: one thread is at " + name_of(place) +
         ", another at " + name_of(now.first));
  }
  if (++now.arrived == barrier.total) {
    for (Thread* thread = now.waiting; thread != nullptr; thread = thread->next_waiting) {
      thread->awaited = nullptr;
      running->ready.add(thread->number);
    }
    now = {};
    ++barrier.ended;
  }
}

void wait(Barrier& barrier, unsigned phase, Place place) {
  if (barrier.ended > phase) return;
  Barrier::Phase& now = barrier.phases[phase % 2];
  Thread& self = *running->current;
  self.awaited = &barrier;
  self.place = place;
  self.next_waiting = now.waiting;
  now.waiting = &self;
  if (running->ready.none()) {
    switch_fiber(self, running->scheduler);
  } else {
    run_next(self);
  }
}

// Arrives and waits: then one phase is in flight at a time.
void pass(Barrier& barrier, Place place) {
  const unsigned phase = barrier.ended;
  arrive(barrier, phase, place);
  wait(barrier, phase, place);
}

// Whether a test has switched off this visit to the barrier.
bool disabled(Place place) {
  if (!settings.list_barriers) return false;
  size_t site = 0;
  while (site < sites.size() && !(sites[site].place == place)) ++site;
  if (site == sites.size()) sites.push_back({place, name_of(place), 0});
  std::vector<int>& visits = running->current->visits;
  visits.resize(std::max(visits.size(), site + 1), 0);
  const int visit = visits[site]++;
  sites[site].visits = std::max(sites[site].visits, visit + 1);
  return settings.disabled_site == static_cast<int>(site) && settings.disabled_visit == visit;
}

// All threads of the block have ended.
void finish(Block& block) {
  const size_t bytes = running->launch.shared_bytes;
  const unsigned char* guard = block.shared + bytes;
  if (!std::all_of(guard, guard + kGuardBytes, [](unsigned char x) { return x == kGuard; })) {
    report = "write behind the end of shared memory (" + where(*running->current) + ")";
  }
  std::memset(block.shared, kPoison, bytes);
  block.finished = true;
}

std::string deadlock() {
  for (const Thread& thread : running->threads) {
    if (thread.awaited != nullptr) {
      return std::string("divergent ") + thread.awaited->what + " barrier: a thread waits at " +
             name_of(thread.place) + " for threads that never come (" + where(thread) + ")";
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

// Block `rank` of those that run together, before its first thread runs.
void begin(Block& block, unsigned index, unsigned rank) {
  const Launch& launch = running->launch;
  block.index = index;
  block.rank = rank % launch.cluster;
  block.live = launch.threads;
  block.started = block.finished = false;
  block.memory.resize(launch.shared_bytes + kGuardBytes + 15);
  const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
  block.shared = block.memory.data() + (16 - address % 16) % 16;
  std::memset(block.shared, kPoison, launch.shared_bytes);
  std::memset(block.shared + launch.shared_bytes, kGuard, kGuardBytes);
  block.barrier = {"block", launch.threads, 0, {}};
  block.warps.resize(launch.threads / kWarp);
  for (Warp& warp : block.warps) warp.barrier = {"warp", kWarp, 0, {}};
  for (unsigned i = 0; i < launch.threads; ++i) {
    const unsigned number = rank * launch.threads + i;
    Thread& thread = running->threads[number];
    thread = {};
    thread.block = &block;
    thread.warp = &block.warps[i / kWarp];
    thread.number = number;
    thread.in_block = i;
    running->ready.add(number);
  }
}

// Runs the blocks from `first_block` on that run together.
void run_together(unsigned first_block) {
  const Launch& launch = running->launch;
  running->cluster_barrier = {"cluster", launch.cluster * launch.threads, 0, {}};
  running->grid_barrier = {"grid", launch.grid * launch.threads, 0, {}};
  for (unsigned rank = 0; rank < running->blocks.size(); ++rank) {
    begin(running->blocks[rank], first_block + rank, rank);
  }
  size_t live = running->threads.size();
  while (live > 0 && report.empty()) {
    if (running->ready.none()) {
      report = deadlock();
      break;
    }
    run_next(running->scheduler);
    Thread& thread = *running->current;
    if (!thread.ended) continue;
    release_fiber(thread);
    --live;
    if (--thread.block->live == 0) finish(*thread.block);
  }
  for (Thread& thread : running->threads) {
    if (thread.stack != nullptr) release_fiber(thread);
  }
}

}  // namespace

unsigned char* shared_memory() { return running->current->block->shared; }

void block_barrier(Place place) {
  if (disabled(place)) return;
  pass(running->current->block->barrier, place);
}

void warp_barrier(Place place) {
  if (disabled(place)) return;
  pass(running->current->warp->barrier, place);
}

void cluster_arrive(Place place) {
  Thread& self = *running->current;
  if (self.arrived_at_cluster) fail("two arrivals at the cluster barrier without a wait between");
  self.arrived_at_cluster = true;
  arrive(running->cluster_barrier, self.cluster_phase++, place);
}

void cluster_wait(Place place) {
  Thread& self = *running->current;
  if (!self.arrived_at_cluster) fail("wait at the cluster barrier without an arrival");
  self.arrived_at_cluster = false;
  if (disabled(place)) return;
  wait(running->cluster_barrier, self.cluster_phase - 1, place);
}

void grid_barrier(Place place) {
  if (!running->launch.cooperative) fail("grid barrier in a launch that is not cooperative");
  if (disabled(place)) return;
  pass(running->grid_barrier, place);
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
  Thread& self = *running->current;
  Warp& warp = *self.warp;
  // Slots by turns: whoever is one shuffle ahead writes the other ones.
  uint64_t* slots = warp.slots[warp.barrier.ended % 2];
  slots[self.in_block % kWarp] = value;
  pass(warp.barrier, place);
  return slots[source];
}

unsigned ballot(bool predicate, unsigned mask, Place place) {
  require_full(mask, place);
  Thread& self = *running->current;
  Warp& warp = *self.warp;
  uint64_t* slots = warp.slots[warp.barrier.ended % 2];
  slots[self.in_block % kWarp] = predicate;
  pass(warp.barrier, place);
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
    return cudaErrorInvalidConfiguration;
  }
  const auto limit = dynamic_limit.find(launch.kernel);
  if (launch.shared_bytes > (limit == dynamic_limit.end() ? 48 << 10 : limit->second)) {
    return cudaErrorInvalidValue;
  }
  const unsigned cluster = launch.cluster;
  if (cluster == 0 || cluster > 8 || (cluster & (cluster - 1)) != 0 || launch.grid % cluster != 0 ||
      (cluster > 1 && (launch.cooperative || !settings.device.clusters))) {
    return cudaErrorInvalidClusterSize;
  }
  if (too_many_to_cooperate(launch)) return cudaErrorCooperativeLaunchTooLarge;
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
  for (unsigned i = 0; i < first_blocks.size(); ++i) first_blocks[i] = i * together(launch);
  if (settings.schedule == Schedule::reverse) {
    std::reverse(first_blocks.begin(), first_blocks.end());
  } else if (settings.schedule == Schedule::shuffled) {
    std::shuffle(first_blocks.begin(), first_blocks.end(), random);
  }
  report.clear();
  Running now(launch, together(launch), random);
  running = &now;
  for (const unsigned first : first_blocks) {
    run_together(first);
    if (!report.empty()) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace emulator
