// What tests set and read, and what the emulated runtime and the scheduler know of each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

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

struct Settings {
  DeviceModel device = kDevices[1];
  Schedule schedule = Schedule::forward;
  unsigned seed = 0;
  bool list_barriers = false;  // what is listed can be disabled
  int disabled_site = -1, disabled_visit = -1;
};

struct Counters {  // as in __init__.py
  int64_t launches, read, written, blocks, threads, cluster, shared_bytes, device;
};

// A barrier that tests can disable: a line, and the how-manieth time that a thread is there (from
// 0), since one line of a helper serves several callers.
struct BarrierSite {
  Place place;
  std::string name;  // file:line
  int visits;        // the most that a thread has made
};

inline Settings settings;
inline Counters counters{};
inline std::vector<BarrierSite> sites;
inline std::map<const void*, size_t> dynamic_limit;  // bytes of shared memory, of a kernel
inline std::string report;                           // of the last launch: what was wrong
inline int current_device = 0;

}  // namespace emulator
