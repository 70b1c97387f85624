// The three linear maps of Winograd's convolution F(m x m, 3 x 3), for tiles of m + 2 values.
//
// With n = m + 2 points p of interpolation, the last of them infinity, y = A^T [(G g) * (B^T d)]:
//   A^T[k][i] = p_i^k,  G[i][k] = p_i^k / N_i,  N_i = product over j != i of (p_i - p_j),
//   B^T[i]    = coefficients of the product over j != i of (x - p_j),
// and for infinity A^T[m-1] = G[2] = 1 and the product over all finite points. Two-dimensional
// tiles have it along both axes (Lavin and Gray, arXiv:1509.09308; Blahut, Fast Algorithms).
//
// F(4) has the points 0, ±5/8, ±3/2: rounding errors grow with the size of the entries of all three
// maps, and those of the usual ±1, ±2 are larger (docs/cpu-kernels.md has the measurement).
#pragma once
#include "simd.h"

namespace FASTRES_ISA {

template <int M>
struct Winograd;

template <>
struct Winograd<4> {
  static constexpr int N = 6;
  static constexpr double P = 5.0 / 8, Q = 3.0 / 2;
  static constexpr double POINTS[] = {0, P, -P, Q, -Q};

  static inline void input(const V* d, V* o) {
    const V p = all(P), q = all(Q), pp = all(P * P), qq = all(Q * Q);
    const V sum = all(P * P + Q * Q), product = all(P * P * Q * Q);
    o[0] = madd(product, d[0], nmadd(sum, d[2], d[4]));
    o[5] = madd(product, d[1], nmadd(sum, d[3], d[5]));
    const V even_p = nmadd(qq, d[2], d[4]), odd_p = nmadd(qq, d[1], d[3]);
    o[1] = madd(p, odd_p, even_p);
    o[2] = nmadd(p, odd_p, even_p);
    const V even_q = nmadd(pp, d[2], d[4]), odd_q = nmadd(pp, d[1], d[3]);
    o[3] = madd(q, odd_q, even_q);
    o[4] = nmadd(q, odd_q, even_q);
  }

  static inline void output(const V* m, V* y) {
    const V even_p = add(m[1], m[2]), odd_p = sub(m[1], m[2]);
    const V even_q = add(m[3], m[4]), odd_q = sub(m[3], m[4]);
    y[0] = add(m[0], add(even_p, even_q));
    y[1] = madd(all(P), odd_p, mul(all(Q), odd_q));
    y[2] = madd(all(P * P), even_p, mul(all(Q * Q), even_q));
    y[3] = add(m[5], madd(all(P * P * P), odd_p, mul(all(Q * Q * Q), odd_q)));
  }
};

template <>
struct Winograd<2> {
  static constexpr int N = 4;
  static constexpr double POINTS[] = {0, 1, -1};

  static inline void input(const V* d, V* o) {
    o[0] = sub(d[2], d[0]);
    o[1] = add(d[2], d[1]);
    o[2] = sub(d[2], d[1]);
    o[3] = sub(d[3], d[1]);
  }

  static inline void output(const V* m, V* y) {
    y[0] = add(m[0], add(m[1], m[2]));
    y[1] = add(m[3], sub(m[1], m[2]));
  }
};

// u = G g G^T of one filter of 3 x 3, in double precision.
template <int M>
void filter(const float* g, double u[Winograd<M>::N][Winograd<M>::N]) {
  constexpr int n = Winograd<M>::N;
  double map[n][3] = {};
  for (int i = 0; i < n - 1; i++) {
    double scale = 1;
    for (int j = 0; j < n - 1; j++) {
      if (j != i) scale *= Winograd<M>::POINTS[i] - Winograd<M>::POINTS[j];
    }
    double power = 1;
    for (int k = 0; k < 3; k++, power *= Winograd<M>::POINTS[i]) map[i][k] = power / scale;
  }
  map[n - 1][2] = 1;
  double half[n][3] = {};
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < 3; j++) {
      for (int k = 0; k < 3; k++) half[i][j] += map[i][k] * g[3 * k + j];
    }
  }
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < n; j++) {
      u[i][j] = half[i][0] * map[j][0] + half[i][1] * map[j][1] + half[i][2] * map[j][2];
    }
  }
}

}  // namespace FASTRES_ISA
