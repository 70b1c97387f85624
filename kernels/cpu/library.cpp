// What is called from Python: C functions, which choose the instruction set.
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>
#include <tbb/task_arena.h>

#include <cstdlib>

#include "convolution.h"
#include "parallel.h"

void run_in_parallel(int threads, void (*f)(void*, int), void* context) {
  // isolated: a thread that waits here must not begin another call, which has the same scratch
  tbb::this_task_arena::isolate([=] {
    tbb::parallel_for(
        0, threads, [=](int thread) { f(context, thread); }, tbb::simple_partitioner());
  });
}

float* scratch(std::int64_t floats) {
  static thread_local struct Memory {
    float* at = nullptr;
    std::int64_t floats = 0;
    ~Memory() { std::free(at); }
  } own;
  if (own.floats < floats) {
    std::free(own.at);
    const std::size_t page = 1 << 21;  // of the large kind
    const std::size_t bytes = (floats * sizeof(float) + page - 1) / page * page;
    own.at = static_cast<float*>(std::aligned_alloc(page, bytes));
    own.floats = own.at ? floats : 0;
  }
  return own.at;
}

#define API __attribute__((visibility("default")))

extern "C" {

// 0: none that the library has kernels for, 1: AVX2 and FMA, 2: AVX-512.
API int fastres_instructions() {
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1 : 0;
}

static const Kernels& kernels(int instructions) {
  return instructions == 2 ? avx512_kernels : avx2_kernels;
}

API std::int64_t fastres_prepared_size(int instructions, int tile, std::int64_t channels,
                                   std::int64_t outputs) {
  return kernels(instructions).prepared_size(tile, channels, outputs);
}

API void fastres_prepare(int instructions, int tile, std::int64_t channels, std::int64_t outputs,
                     const float* weight, float* prepared) {
  kernels(instructions).prepare(tile, channels, outputs, weight, prepared);
}

// 0 where there is no memory.
API int fastres_convolve(int instructions, const fastres_convolution* given) {
  return kernels(instructions).convolve(*given);
}
}
