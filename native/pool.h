// Threads of one model: a pool that sleeps between calls, and teams of threads that process a group of pairs together.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace turborank {

inline void spin_pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // takes about ten nanoseconds; yield takes none
#endif
}

// Waits until `value` differs from `old`. Spins for about 0.1 ms, because the next phase or call usually follows within
// microseconds, then sleeps.
inline void wait_change(const std::atomic<unsigned>& value, unsigned old) {
    for (int i = 0; i < 8000; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        spin_pause();
    }
    value.wait(old, std::memory_order_acquire);
}

// `size` threads that run phases. A phase is a number of tasks, taken in order by whichever thread is free, then a barrier.
class Team {
public:
    explicit Team(int size) : size_(static_cast<unsigned>(size)) {}

    template <class Task>
    void phase(int tasks, const Task& task) {
        for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
        const unsigned now = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            next_.store(0, std::memory_order_relaxed);
            phase_.store(now + 1, std::memory_order_release);
            if (size_ > 1) phase_.notify_all();
        } else {
            wait_change(phase_, now);
        }
    }

private:
    const unsigned size_;
    std::atomic<unsigned> arrived_{0}, phase_{0};
    std::atomic<int> next_{0};
};

class Pool {
public:
    Pool() = default;
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool() {
        wanted_.store(-1, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        for (auto& t : threads_) t.join();
    }

    // Runs work(0) on this thread and work(1) .. work(count - 1) on others; returns when all are done. `work` must not throw.
    void run(int count, const std::function<void(int)>& work) {
        while (static_cast<int>(threads_.size()) < count - 1) {
            const int id = static_cast<int>(threads_.size()) + 1;
            threads_.emplace_back([this, id, seen = generation_.load()] { serve(id, seen); });
        }
        work_ = &work;
        busy_.store(static_cast<unsigned>(threads_.size()), std::memory_order_relaxed);
        wanted_.store(count, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
        work(0);
        for (unsigned left; (left = busy_.load(std::memory_order_acquire)) != 0;) wait_change(busy_, left);
    }

private:
    void serve(int id, unsigned seen) {
        for (;;) {
            wait_change(generation_, seen);
            seen = generation_.load(std::memory_order_acquire);
            const int wanted = wanted_.load(std::memory_order_relaxed);
            if (wanted < 0) return;
            if (id < wanted) (*work_)(id);
            if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_.notify_all();
        }
    }

    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<unsigned> generation_{0}, busy_{0};
    std::atomic<int> wanted_{0};
};

}  // namespace turborank
