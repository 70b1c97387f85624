// The product that all convolutions here are made of: rows of values times a panel of weights.
#pragma once
#include "simd.h"

namespace FASTRES_ISA {

// Where the second of a panel's two vectors lies after the first, in [K/16][rows][16].
inline Index second(Index step) { return LANES == BLOCK ? step : LANES; }

// d[r][k] = sum over c of a[c/16][r][c%16] * b[c][k], for R rows and one panel of outputs.
//
// `part` channels are added up in registers; then the sum goes to where the result will be, and the
// next part begins with nothing: chains of additions stay short, and with them the error.
template <int R>
void rows_times_panel(const float* a, Index a_step, const float* b, Index channels, float* d,
                      Index d_step, Index part, const float* next) {
  V sum0[R], sum1[R];
  const Index other = second(d_step);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) sum0[r] = sum1[r] = all(0.0f);
  bool kept = false;
  auto fold = [&](bool last) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      float* to = d + r * BLOCK;
      if (kept) {
        sum0[r] = add(sum0[r], load(to));
        sum1[r] = add(sum1[r], load(to + other));
      }
      store(to, sum0[r]);
      store(to + other, sum1[r]);
      if (!last) sum0[r] = sum1[r] = all(0.0f);
    }
    kept = true;
  };
  for (Index c0 = 0; c0 < channels; c0 += BLOCK, a += a_step) {
    if (c0 && c0 % part == 0) fold(false);
    const Index count = channels - c0 < BLOCK ? channels - c0 : BLOCK;
#pragma GCC unroll 2
    for (Index c = 0; c < count; c++, b += PANEL) {
      const V b0 = load(b), b1 = load(b + LANES);
      for (Index line = 0; line < PANEL; line += 16) {  // the next panel, on its way to the L2
        _mm_prefetch(reinterpret_cast<const char*>(next + line), _MM_HINT_T1);
      }
      next += PANEL;
#pragma GCC unroll 16
      for (int r = 0; r < R; r++) {
        const V x = all(a[r * BLOCK + c]);
        sum0[r] = madd(x, b0, sum0[r]);
        sum1[r] = madd(x, b1, sum1[r]);
      }
    }
  }
  fold(true);
}

using Rows = void (*)(const float*, Index, const float*, Index, float*, Index, Index, const float*);

template <int R>
constexpr void fill(Rows* table) {
  table[R] = rows_times_panel<R>;
  if constexpr (R > 1) fill<R - 1>(table);
}

// Any number of rows, in groups of nearly equal size.
inline void times_panel(const float* a, Index a_step, Index rows, const float* b, Index channels,
                        float* d, Index d_step, Index part, const float* next) {
  static const struct Table {
    Rows of[ROWS + 1] = {};
    Table() { fill<ROWS>(of); }
  } table;
  const Index groups = (rows + ROWS - 1) / ROWS;
  for (Index i = 0, r = 0; i < groups; i++) {
    const Index until = rows * (i + 1) / groups;
    const float* ahead = i == 0 ? next : b;  // once is enough
    table.of[until - r](a + r * BLOCK, a_step, b, channels, d + r * BLOCK, d_step, part, ahead);
    r = until;
  }
}

}  // namespace FASTRES_ISA
