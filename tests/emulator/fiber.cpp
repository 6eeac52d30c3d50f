#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#if defined(MTP_SANITIZE)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the context switch is written for x86-64"
#endif

// It jumps back instead of returning: the processor predicts that a return leads to the last call,
// and that was made on the other stack.
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
  popq %rcx
  jmpq *%rcx
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 256 << 10;  // touched pages only; the sanitizers need more than most
constexpr size_t kStacksAtOnce = 256;
// Stacks begin at different offsets in a page: at the same one they would share a few cache sets.
constexpr size_t kColours = 32, kColourBytes = 128;

std::vector<char*> free_stacks;

void allocate_stacks() {
  void* memory = mmap(nullptr, kStacksAtOnce * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("emulator: no memory for stacks");
    std::abort();
  }
  for (size_t i = kStacksAtOnce; i-- > 0;) {
    free_stacks.push_back(static_cast<char*>(memory) + i * kStackBytes);
  }
}

size_t usable_bytes(const void* stack) {
  const size_t colour = reinterpret_cast<size_t>(stack) / kStackBytes % kColours;
  return kStackBytes - colour * kColourBytes;
}

}  // namespace

void start_fiber(Fiber& fiber, void (*entry)()) {
  if (free_stacks.empty()) allocate_stacks();
  char* stack = free_stacks.back();
  free_stacks.pop_back();
  fiber.stack = stack;
  fiber.stack_bytes = usable_bytes(stack);
  // As emulator_switch leaves a stack: six registers, the address to go to, and a return address of
  // 0, which also makes the stack pointer 8 modulo 16, as a function expects it.
  void** top = reinterpret_cast<void**>(stack + fiber.stack_bytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

void release_fiber(Fiber& fiber) {
  char* stack = const_cast<char*>(static_cast<const char*>(fiber.stack));
#if defined(MTP_SANITIZE)
  // What was called and never returned has left its marks.
  char* pointer = static_cast<char*>(fiber.stack_pointer);
  __asan_unpoison_memory_region(pointer, static_cast<size_t>(stack + fiber.stack_bytes - pointer));
#endif
  free_stacks.push_back(stack);
  fiber.stack = nullptr;
}

}  // namespace emulator
