// What a call of the library is given, in every instruction set.
#pragma once
#include <cstdint>

extern "C" {

// A convolution of 3 x 3, stride 1, padding 1. Channels of a pixel lie together in groups of `group`
// (all of them in NHWC, 16 in blocks); `*_pixel` and `*_group` are the steps from one pixel, and one
// group, to the next, in floats.
struct fastres_convolution {
  std::int64_t images, height, width, channels, outputs;
  const float* x;
  std::int64_t x_pixel, x_group;
  const float* residual;  // or nullptr
  std::int64_t residual_pixel, residual_group;
  float* y;
  std::int64_t y_pixel, y_group;
  const float* weight;  // [outputs][channels][3][3]
  const float* bias;    // [outputs]
  const float* prepared;
  std::int32_t relu;
  std::int32_t tile;     // m of F(m x m, 3 x 3)
  std::int32_t shared;   // one block of tiles at a time, whose outputs the threads share
  std::int32_t threads;
  std::int64_t block;    // tiles that are transformed together
  std::int64_t chunk;    // panels of outputs that a thread takes at a time, where shared
};
}

struct Kernels {
  std::int64_t (*prepared_size)(int tile, std::int64_t channels, std::int64_t outputs);
  void (*prepare)(int tile, std::int64_t channels, std::int64_t outputs, const float* weight,
                  float* prepared);
  int (*convolve)(const fastres_convolution& given);
};

extern const Kernels avx2_kernels, avx512_kernels;
