// Runs calls of the kernels that come on standard input, for the tests: compiled for another
// processor, it runs in an emulator (make arm). A call comes as a Header, its arguments, and the
// memory that they point into; its status and that memory go back.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../pag_retrofit/kernels/src/interface.h"

struct Header {
  int64_t kind, bytes, segments, threads;
};

struct Segment {
  uint64_t address;  // where the caller has it
  int64_t bytes;
  char* here;
};

static bool take(void* to, size_t bytes) { return fread(to, 1, bytes, stdin) == bytes; }

static void give(const void* from, size_t bytes) {
  if (fwrite(from, 1, bytes, stdout) != bytes) exit(1);
}

int main() {
  Header header;
  while (take(&header, sizeof header)) {
    std::vector<uint64_t> arguments((header.bytes + 7) / 8);
    if (!take(arguments.data(), header.bytes)) return 1;
    std::vector<Segment> segments(header.segments);
    for (Segment& segment : segments) {
      if (!take(&segment.address, 8) || !take(&segment.bytes, 8)) return 1;
      segment.here = static_cast<char*>(aligned_alloc(64, segment.bytes / 64 * 64 + 64));
      if (!segment.here || !take(segment.here, segment.bytes)) return 1;
    }
    for (uint64_t& word : arguments)  // no number in the arguments is as large as an address
      for (const Segment& segment : segments)
        if (word >= segment.address && word < segment.address + segment.bytes) {
          word = reinterpret_cast<uint64_t>(segment.here) + (word - segment.address);
          break;
        }
    const pag_call call = {header.kind, arguments.data()};
    const int64_t status = pag_run(&call, 1, (int)header.threads);
    give(&status, sizeof status);
    for (const Segment& segment : segments) {
      give(segment.here, segment.bytes);
      free(segment.here);
    }
    fflush(stdout);
  }
}
