#include "workspace.hpp"

#include <new>

namespace negengine {

void Buffer::release() {
  ::operator delete(data_, std::align_val_t(kVector));
  data_ = nullptr;
  bytes_ = 0;
}

void* Buffer::reserve(size_t count, size_t size) {
  if (count > SIZE_MAX / 2 / size) throw std::bad_alloc();
  const size_t wanted = (count * size + kVector - 1) / kVector * kVector;
  if (wanted > bytes_) {
    release();
    data_ = ::operator new(wanted, std::align_val_t(kVector));
    bytes_ = wanted;
  }
  return data_;
}

}  // namespace negengine
