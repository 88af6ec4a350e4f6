// Memory that is kept between calls: fresh pages cost more than the search of a small call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "kernels.hpp"
#include "pool.hpp"

namespace negengine {

// Aligned bytes that grow on demand and keep nothing when they do.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { release(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  // At least n elements; throws std::bad_alloc.
  template <class T>
  T* get(int64_t n) {
    return static_cast<T*>(reserve(static_cast<size_t>(n < 1 ? 1 : n), sizeof(T)));
  }
  void release();
  size_t bytes() const { return bytes_; }

 private:
  void* reserve(size_t count, size_t size);

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace negengine

struct negengine_workspace {
  enum Use {
    panels, weights, offsets, constants, columns, norms, hashes, hard, centre,  // of the columns
    scratch, pointers, candidates, rows, shifts,                                // of each thread
    cosines, indices, gates, readers, snapshot, partials,                       // of the call
    uses
  };

  negengine::Buffer buffers[uses];
  negengine::Pool pool;
  mutable std::mutex mutex;  // held during a call
  size_t limit = 0;
  size_t peak = 0;

  size_t bytes() const {
    size_t total = 0;
    for (const negengine::Buffer& buffer : buffers) total += buffer.bytes();
    return total;
  }
  void release() {
    for (negengine::Buffer& buffer : buffers) buffer.release();
  }
};
