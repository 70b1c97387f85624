#include "kernels.h"

extern const Kernels avx2_kernels = {avx2::prepared_size, avx2::prepare, avx2::convolve};
