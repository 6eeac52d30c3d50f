// Finds the OpenMP runtime that torch brought into the process (see parallel.h).
#include "common/parallel.h"

#include <dlfcn.h>
#include <link.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace mtp {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using OmpGet = int (*)();

struct Runtime {
  GompParallel parallel = nullptr;
  OmpGet thread_number = nullptr, thread_count = nullptr;  // inside of parallel
  std::string path = "std::thread";
};

int consider_library(dl_phdr_info* info, size_t, void* pointer) {
  auto& found = *static_cast<Runtime*>(pointer);
  const char* path = info->dlpi_name;
  if (path == nullptr || (strstr(path, "libgomp") == nullptr && strstr(path, "libomp") == nullptr &&
                          strstr(path, "libiomp5") == nullptr)) {
    return 0;
  }
  void* library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  const auto parallel = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
  const auto number = reinterpret_cast<OmpGet>(dlsym(library, "omp_get_thread_num"));
  const auto count = reinterpret_cast<OmpGet>(dlsym(library, "omp_get_num_threads"));
  if (parallel != nullptr && number != nullptr && count != nullptr) {
    found = {parallel, number, count, path};
  }
  dlclose(library);
  // Other packages may bring runtimes of their own; the one inside torch's folder is torch's.
  return found.parallel != nullptr && strstr(path, "torch") != nullptr ? 1 : 0;
}

const Runtime& runtime() {
  static const Runtime instance = [] {
    Runtime found;
    dl_iterate_phdr(consider_library, &found);
    return found;
  }();
  return instance;
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int, int), void* context) {
  if (const GompParallel parallel = runtime().parallel) {
    struct Job {
      void (*body)(void*, int, int);
      void* context;
    } job{body, context};
    const auto run = [](void* pointer) {
      const Job& j = *static_cast<Job*>(pointer);
      j.body(j.context, runtime().thread_number(), runtime().thread_count());
    };
    parallel(run, &job, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> team;
  for (int i = 1; i < threads; ++i) team.emplace_back(body, context, i, threads);
  body(context, 0, threads);
  for (std::thread& thread : team) thread.join();
}

const char* thread_source() { return runtime().path.c_str(); }

}  // namespace mtp
