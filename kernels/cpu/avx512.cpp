#include "kernels.h"

extern const Kernels avx512_kernels = {avx512::prepared_size, avx512::prepare, avx512::convolve};
