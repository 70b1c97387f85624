// How work is shared among threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

// Calls f(context, 0) to f(context, threads - 1), maybe at once, and returns when all have ended.
void run_in_parallel(int threads, void (*f)(void* context, int thread), void* context);

template <class F>
void in_parallel(int threads, F&& f) {
  run_in_parallel(threads, [](void* context, int t) { (*static_cast<F*>(context))(t); }, &f);
}

// Pieces of work for some threads: each takes its own share in order, so that what it wrote in the
// step before is still in its cache, and then what others have not begun.
class Shares {
 public:
  Shares(std::int64_t pieces, int threads)
      : pieces_(pieces), threads_(threads), taken_(new Counter[threads]) {}

  // The next piece for a thread, or -1.
  std::int64_t take(int thread) {
    for (int i = 0; i < threads_; i++) {
      const int owner = (thread + i) % threads_;
      const std::int64_t from = pieces_ * owner / threads_;
      const std::int64_t until = pieces_ * (owner + 1) / threads_;
      auto& taken = taken_[owner].value;
      if (from + taken.load(std::memory_order_relaxed) >= until) continue;
      const std::int64_t piece = from + taken.fetch_add(1, std::memory_order_relaxed);
      if (piece < until) return piece;
    }
    return -1;
  }

 private:
  struct alignas(64) Counter {
    std::atomic<std::int64_t> value{0};
  };
  std::int64_t pieces_;
  int threads_;
  std::unique_ptr<Counter[]> taken_;
};

// At least so many floats of this thread's own, kept until it ends; nullptr where there are none.
float* scratch(std::int64_t floats);
