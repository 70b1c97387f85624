// Vectors of floats, in the namespace of the instruction set that this file is compiled for.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(__AVX512F__)
#define FASTRES_ISA avx512
#else
#define FASTRES_ISA avx2
#endif

namespace FASTRES_ISA {

using Index = std::int64_t;

constexpr Index BLOCK = 16;  // channels that lie together in scratch memory, whatever the vectors are

#if defined(__AVX512F__)
using V = __m512;
constexpr Index LANES = 16;
constexpr int ROWS = 14;  // of a panel: 2 * 14 sums, 2 weights and a value fill 32 registers
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V load_some(const float* p, Index n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline void store_some(float* p, V x, Index n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, x); }
inline V all(float x) { return _mm512_set1_ps(x); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline V nmadd(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }            // b where one is NaN
inline bool all_finite(V x) {  // of x - x alone what is finite gives 0
  V zero = _mm512_setzero_ps();
  return _mm512_cmp_ps_mask(_mm512_sub_ps(x, x), zero, _CMP_EQ_OQ) == 0xffff;
}
#else
using V = __m256;
constexpr Index LANES = 8;
constexpr int ROWS = 6;  // 2 * 6 sums, 2 weights and a value of 16 registers
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline __m256i first(Index n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V load_some(const float* p, Index n) { return _mm256_maskload_ps(p, first(n)); }
inline void store_some(float* p, V x, Index n) { _mm256_maskstore_ps(p, first(n), x); }
inline V all(float x) { return _mm256_set1_ps(x); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V nmadd(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline bool all_finite(V x) {
  V zero = _mm256_setzero_ps();
  return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_sub_ps(x, x), zero, _CMP_EQ_OQ)) == 0xff;
}
#endif

constexpr Index PANEL = 2 * LANES;  // outputs of a panel of weights

}  // namespace FASTRES_ISA
