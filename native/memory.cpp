#include <sys/mman.h>

#include <chrono>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace turborank {

constexpr size_t kHugePage = size_t{2} << 20;

uint64_t nanoseconds() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

void Buffer::reserve(size_t bytes) {
    if (bytes <= size_) return;
    release();
    const size_t alignment = bytes >= kHugePage / 2 ? kHugePage : 4096;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    void* data = std::aligned_alloc(alignment, (rounded + alignment - 1) / alignment * alignment);
    if (!data) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (alignment == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // optional: failure affects only the speed
#endif
    std::memset(data, 0, rounded);
    data_ = data, size_ = rounded;
}

void Buffer::release() {
    std::free(data_);
    data_ = nullptr, size_ = 0;
}

}  // namespace turborank
