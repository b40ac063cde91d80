#include "error.h"

#include <pthread.h>

#include <cstdio>
#include <cstdlib>
#include <new>
#include <system_error>

namespace qigen::runtime {
namespace {

constexpr size_t kMessageBytes = 768;

// The message of each thread. Not thread_local: that would make model.so need the dynamic linker by
// name (for __tls_get_addr), and the only libraries that it may need are those of C and C++. The
// destructor is free of the C library, so threads may end after model.so was unloaded.
class Messages {
 public:
  Messages() : usable_(pthread_key_create(&key_, std::free) == 0) {}
  ~Messages() {
    if (!usable_) return;
    std::free(pthread_getspecific(key_));
    pthread_key_delete(key_);
  }

  const char* get() const {
    const void* message = usable_ ? pthread_getspecific(key_) : nullptr;
    return message ? static_cast<const char*>(message) : "";
  }

  void set(const char* text) {
    if (!usable_) return;
    auto* message = static_cast<char*>(pthread_getspecific(key_));
    if (!message) {
      message = static_cast<char*>(std::malloc(kMessageBytes));
      if (!message || pthread_setspecific(key_, message) != 0) return std::free(message);
    }
    std::snprintf(message, kMessageBytes, "%s", text);
  }

 private:
  pthread_key_t key_;
  bool usable_;
};

Messages messages;

}  // namespace

Failure::Failure(qigen_status status, const char* format, ...) : status_(status) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message_, sizeof message_, format, arguments);
  va_end(arguments);
}

const char* last_error() { return messages.get(); }

qigen_status report_current_exception() noexcept {
  try {
    throw;
  } catch (const Failure& failure) {
    messages.set(failure.what());
    return failure.status();
  } catch (const std::bad_alloc&) {
    messages.set("out of memory; use a smaller session or fewer of them");
    return QIGEN_NO_MEMORY;
  } catch (const std::system_error& error) {
    messages.set(error.what());
    return QIGEN_NO_MEMORY;
  } catch (const std::exception& error) {
    messages.set(error.what());
    return QIGEN_INTERNAL;
  } catch (...) {
    messages.set("unknown exception; please report this as a defect of qigen");
    return QIGEN_INTERNAL;
  }
}

}  // namespace qigen::runtime
