// The table of what is compiled for one instruction set; its name says which.
#pragma once
#include "winograd.h"

namespace FASTRES_ISA {

inline Index prepared_size(int tile, Index channels, Index outputs) {
  return tile == 4 ? Convolution<4>::prepared_size(channels, outputs)
                   : Convolution<2>::prepared_size(channels, outputs);
}

inline void prepare(int tile, Index channels, Index outputs, const float* weight, float* prepared) {
  if (tile == 4) Convolution<4>::prepare(channels, outputs, weight, prepared);
  else Convolution<2>::prepare(channels, outputs, weight, prepared);
}

inline int convolve(const fastres_convolution& given) {
  return given.tile == 4 ? Convolution<4>{given}.run() : Convolution<2>{given}.run();
}

}  // namespace FASTRES_ISA
