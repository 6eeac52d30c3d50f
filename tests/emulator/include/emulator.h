// Runs CUDA kernels on the CPU, one thread of this process: each CUDA thread is a fiber that runs
// until it waits for others. What a GPU leaves to chance is an order here (the lowest thread that
// can run, the highest, or any), what it leaves undefined is an error with a place: barriers that
// not all threads reach, shuffles without the full warp, shared memory of blocks that are not
// there, misaligned vectors, launches that the device would refuse. Shared memory starts poisoned
// (0xff bytes: NaN).
//
// It cannot see races between barriers, bank conflicts, spills, or how approximate instructions
// round.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// Where a kernel waits: the line of the barrier.
struct Place {
  const char* file;
  int line;
};

unsigned char* shared_memory();

void block_barrier(Place place);
void warp_barrier(Place place);
void cluster_arrive(Place place);
void cluster_wait(Place place);
void grid_barrier(Place place);
unsigned cluster_rank();
unsigned cluster_size();
void* map_shared(const void* pointer, unsigned rank);

// The value that lane `source` of the warp passed; every lane must call.
uint64_t shuffle(uint64_t value, int source, unsigned mask, Place place);
// Bit i is lane i's predicate.
unsigned ballot(bool predicate, unsigned mask, Place place);

void count_read(const void* pointer, size_t bytes);
void count_write(void* pointer, size_t bytes);

using Body = void (*)(void* context);

struct Launch {
  unsigned grid, threads, cluster;
  bool cooperative;
  size_t shared_bytes;
  const void* kernel;
  Body body;  // runs one CUDA thread
  void* context;
};

// A cudaError_t.
int launch(const Launch& launch);

}  // namespace emulator
