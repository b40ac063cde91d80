// Failures inside the runtime are exceptions; at the C interface each becomes a status and a
// sentence.
#pragma once

#include <cstdarg>
#include <exception>

#include "qigen.h"

namespace qigen::runtime {

class Failure : public std::exception {
 public:
  Failure(qigen_status status, const char* format, ...) __attribute__((format(printf, 3, 4)));
  const char* what() const noexcept override { return message_; }
  qigen_status status() const { return status_; }

 private:
  qigen_status status_;
  char message_[768];
};

const char* last_error();

// Stores the message of the exception that is being handled for qigen_last_error and returns its
// status.
qigen_status report_current_exception() noexcept;

// Runs the body of a C function.
template <class Body>
qigen_status guarded(Body body) noexcept {
  try {
    body();
    return QIGEN_OK;
  } catch (...) {
    return report_current_exception();
  }
}

}  // namespace qigen::runtime
