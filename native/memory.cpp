#if defined(_WIN32)
#include <malloc.h>
#else
#include <sys/mman.h>
#endif

#include <chrono>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace turborank {

constexpr size_t kHugePage = size_t{2} << 20;

namespace {

#if defined(_WIN32)
void* allocate(size_t alignment, size_t bytes) { return _aligned_malloc(bytes, alignment); }
void give_back(void* data) { _aligned_free(data); }
#else
void* allocate(size_t alignment, size_t bytes) { return std::aligned_alloc(alignment, bytes); }
void give_back(void* data) { std::free(data); }
#endif

}  // namespace

uint64_t nanoseconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

void Buffer::reserve(size_t bytes) {
    if (bytes <= size_) return;
    release();
    const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 4096;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    void* data = allocate(alignment, (rounded + alignment - 1) / alignment * alignment);
    if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // optional: failure affects only the speed
#endif
    std::memset(data, 0, rounded);
    data_ = data, size_ = rounded;
}

void Buffer::release() {
    give_back(data_);
    data_ = nullptr, size_ = 0;
}

}  // namespace turborank
