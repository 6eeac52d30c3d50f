// What a launcher returns: success, or the text of what went wrong. bindings.cpp turns it into an
// exception; kernels and launchers never throw.
#pragma once

namespace mtp {

struct Status {
  const char* error = nullptr;  // static storage; null means success

  bool ok() const { return error == nullptr; }
};

}  // namespace mtp
