// What goes wrong in a kernel, and where: the exception that synchronize() throws, and places in the kernel's source.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>

// The last parameters of whatever may be reported: the caller's place in the source, known without a macro at the call.
#define CUDA_ON_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace cuda_on_host {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One operation at one place of the source: what a thread waits in, and what threads that meet must agree upon.
struct Site {
  const char* operation = "nothing";
  const char* file = "";
  int line = 0;

  bool operator==(const Site& other) const {
    auto same = [](const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; };
    return line == other.line && same(operation, other.operation) && same(file, other.file);
  }
};

inline std::string text(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  const std::string file = slash ? slash + 1 : site.file;
  return std::string(site.operation) + (file.empty() ? "" : " at " + file + ":" + std::to_string(site.line));
}

}  // namespace cuda_on_host
