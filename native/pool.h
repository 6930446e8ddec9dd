// Threads of one model: a pool that sleeps between calls, and teams of threads that process a group of pairs together.
#pragma once

#include <atomic>
#include <cstdint>
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

// Threads that run phases together. A phase is a number of tasks, taken in order by whichever thread is free; it ends when
// all are done, and only threads that compute a task are waited for: a thread that starts late, because it had to be woken or
// another process uses its core, skips the phases that ended before. Each thread has a Team of its own on the same Shared, and all
// call the same phases.
class Team {
public:
    class Shared {
        friend class Team;
        std::atomic<uint64_t> next_{0};  // the phase, and in the lower half the next task to take
        std::atomic<int> done_{0};       // tasks of the phase
        std::atomic<unsigned> phase_{0};  // follows next_; to wait for
    };

    explicit Team(Shared& shared) : shared_(shared) {}

    template <class Task>
    void phase(int tasks, const Task& task) {
        if (tasks == 0) return;
        const uint64_t mine = at_++;
        for (uint64_t next; (next = shared_.next_.load(std::memory_order_acquire)) >> 32 == mine;) {
            const int i = static_cast<int>(next & 0xffffffffu);
            if (i >= tasks) {
                wait_change(shared_.phase_, static_cast<unsigned>(mine));
            } else if (shared_.next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) {
                task(i);
                if (shared_.done_.fetch_add(1, std::memory_order_acq_rel) + 1 == tasks) finish(mine + 1);
            }
        }
    }

private:
    void finish(uint64_t following) {
        shared_.done_.store(0, std::memory_order_relaxed);
        shared_.next_.store(following << 32, std::memory_order_release);
        shared_.phase_.store(static_cast<unsigned>(following), std::memory_order_release);
        shared_.phase_.notify_all();
    }

    Shared& shared_;
    uint64_t at_ = 0;
};

class Pool {
public:
    Pool() = default;
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool() {
        wanted_.store(-1, std::memory_order_relaxed);
        call();
        for (auto& t : threads_) t.join();
    }

    // Runs work(0) on this thread and, on as many of the others as come before it returns, work(1) .. work(count - 1);
    // returns when all that began are done. A thread may run its part twice. `work` must not throw.
    void run(int count, const std::function<void(int)>& work) {
        while (static_cast<int>(threads_.size()) < count - 1) {
            const int id = static_cast<int>(threads_.size()) + 1;
            threads_.emplace_back([this, id, seen = generation_.load()] { serve(id, seen); });
        }
        work_ = &work;
        wanted_.store(count, std::memory_order_relaxed);
        inside_.store(0, std::memory_order_release);
        call();
        work(0);
        for (unsigned left = inside_.fetch_or(kClosed, std::memory_order_acq_rel) | kClosed; left != kClosed; left = inside_.load(std::memory_order_acquire))
            wait_change(inside_, left);
    }

private:
    static constexpr unsigned kClosed = 1u << 31;

    void call() {
        generation_.fetch_add(1, std::memory_order_release);
        generation_.notify_all();
    }

    bool enter() {
        unsigned inside = inside_.load(std::memory_order_relaxed);
        while (!(inside & kClosed))
            if (inside_.compare_exchange_weak(inside, inside + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void serve(int id, unsigned seen) {
        for (;;) {
            wait_change(generation_, seen);
            seen = generation_.load(std::memory_order_acquire);
            if (wanted_.load(std::memory_order_relaxed) < 0) return;
            if (!enter()) continue;
            if (id < wanted_.load(std::memory_order_relaxed)) (*work_)(id);
            if (inside_.fetch_sub(1, std::memory_order_acq_rel) == (kClosed | 1)) inside_.notify_all();
        }
    }

    std::vector<std::thread> threads_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<unsigned> generation_{0}, inside_{kClosed};  // threads that run work_; with kClosed no other may begin
    std::atomic<int> wanted_{0};
};

}  // namespace turborank
