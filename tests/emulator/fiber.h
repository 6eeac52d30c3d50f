// Stacks of their own for the emulated threads, and the switch from one to another.
#pragma once

#include <cstddef>

#if defined(MTP_SANITIZE)
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers and the stack pointer, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);

namespace emulator {

// What runs on a stack; while it does not, where it stopped.
struct Fiber {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;  // its lowest address; null: it has none yet
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// Gives `fiber` a stack, on which it will begin with entry(), which calls switched_from first and
// never returns.
void start_fiber(Fiber& fiber, void (*entry)());
// Takes the stack back, from a fiber that has ended or that will not be continued.
void release_fiber(Fiber& fiber);

// Goes on with `to`, until somebody switches back to `from`; if that ends here, nobody may.
inline void switch_fiber(Fiber& from, Fiber& to, bool ends = false) {
#if defined(MTP_SANITIZE)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
  (void)ends;
  emulator_switch(&from.stack_pointer, to.stack_pointer);
#if defined(MTP_SANITIZE)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// In a fiber that begins: where `from`, which switched to it, has its stack.
inline void switched_from(Fiber& from) {
#if defined(MTP_SANITIZE)
  __sanitizer_finish_switch_fiber(nullptr, &from.stack, &from.stack_bytes);
#endif
  (void)from;
}

}  // namespace emulator
