// Convolutions of 3 x 3 with fewer multiplications: F(4 x 4, 3 x 3) and F(2 x 2, 3 x 3).
//
// The map is cut into tiles of M x M outputs, which overlap in their N x N inputs, N = M + 2. Tiles
// are taken in blocks that fit into the cache: inputs are transformed, N * N products of matrices
// follow (tiles times channels times outputs), and the sums are transformed back.
#pragma once
#include <cstring>

#include "convolution.h"
#include "panel.h"
#include "parallel.h"
#include "transforms.h"

namespace FASTRES_ISA {

inline Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }
inline Index smaller(Index a, Index b) { return a < b ? a : b; }

// Channels that are added up in one chain: about half of what a short one has, 64 at most.
inline Index part_of(Index channels) { return channels <= 64 ? 32 : 64; }

// A step between matrices that is an odd number of cache lines: theirs else meet in the same sets.
inline Index apart(Index floats) { return (ceil_div(floats, 16) | 1) * 16; }

template <int M>
struct Convolution {
  static constexpr int N = Winograd<M>::N;
  const fastres_convolution& given;
  const Index down = ceil_div(given.height, M), across = ceil_div(given.width, M);
  const Index tiles = given.images * down * across;
  const Index inputs = ceil_div(given.channels, BLOCK);       // blocks of channels
  const Index panels = ceil_div(given.outputs, PANEL);
  const Index outputs = panels * PANEL / BLOCK;               // blocks of outputs in a whole panel

  struct Place {
    Index image, y, x;
  };
  Place place(Index tile) const {
    const Index q = tile % (down * across);
    return {tile / (down * across), q / across * M, q % across * M};
  }

  const float* panel(Index point, Index p) const {
    return given.prepared + (point * panels + p) * given.channels * PANEL;
  }

  // 16 channels of a pixel's group, the missing ones as 0.
  static void pixel(const float* from, Index count, float* to) {
    for (Index v = 0; v < BLOCK; v += LANES) {
      const Index n = count - v < 0 ? 0 : smaller(count - v, LANES);
      store(to + v, n == LANES ? load(from + v) : n ? load_some(from + v, n) : all(0.0f));
    }
  }

  static void transform(const float* from, Index row, Index pixel, float* to, Index step) {
    for (Index v = 0; v < BLOCK; v += LANES) {
      V half[N][N];
#pragma GCC unroll 8
      for (int j = 0; j < N; j++) {
        V d[N], o[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) d[i] = load(from + v + i * row + j * pixel);
        Winograd<M>::input(d, o);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) half[i][j] = o[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; i++) {
        V o[N];
        Winograd<M>::input(half[i], o);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) store(to + v + (i * N + j) * step, o[j]);
      }
    }
  }

  // Some tiles' inputs, of some blocks of channels: to[point * step + block][tile][16].
  void read(Index t0, Index t1, Index b0, Index b1, float* to, Index rows, Index step) const {
    alignas(64) float edge[N * N * BLOCK];
    for (Index t = t0; t < t1; t++) {
      const auto [image, y, x] = place(t);
      const Index top = y - 1, left = x - 1;
      const Index i0 = top < 0, i1 = smaller(given.height - top, N);
      const Index j0 = left < 0, j1 = smaller(given.width - left, N);
      const bool inside = !i0 && !j0 && i1 == N && j1 == N;
      const float* from =
          given.x + ((image * given.height + top) * given.width + left) * given.x_pixel;
      const Index row = given.width * given.x_pixel;
      if (!inside) std::memset(edge, 0, sizeof edge);
      for (Index b = b0; b < b1; b++) {
        float* out = to + (b * rows + t - t0) * BLOCK;
        const float* own = from + b * given.x_group;
        const Index count = given.channels - b * BLOCK;
        if (inside && count >= BLOCK) {
          transform(own, row, given.x_pixel, out, step);
          continue;
        }
        for (Index i = i0; i < i1; i++) {
          for (Index j = j0; j < j1; j++) {
            pixel(own + i * row + j * given.x_pixel, count, edge + (i * N + j) * BLOCK);
          }
        }
        transform(edge, N * BLOCK, BLOCK, out, step);
      }
    }
  }

  // All points' products for some panels: sums[point * step + block of outputs][row][16].
  void multiply(Index count, Index p0, Index p1, const float* values, Index values_step, float* sums,
                Index sums_step, Index rows) const {
    const Index part = part_of(given.channels);
    for (Index point = 0; point < N * N; point++) {
      for (Index p = p0; p < p1; p++) {
        const bool last = p + 1 == p1;
        const float* next = panel(last ? (point + 1) % (N * N) : point, last ? p0 : p + 1);
        float* to = sums + point * sums_step + (p - p0) * (PANEL / LANES) * rows * LANES;
        times_panel(values + point * values_step, rows * BLOCK, count, panel(point, p),
                    given.channels, to, rows * BLOCK, part, next);
      }
    }
  }

  // What is in tiles that hold NaN or infinities: a transform spreads those over all of a tile.
  void directly(Index image, Index y, Index x, Index k) const {
    const float* own = given.weight + k * given.channels * 9;
    float sum = 0;
    for (Index c = 0; c < given.channels; c++) {
      const float* plane = given.x + c / BLOCK * given.x_group + c % BLOCK;
      for (Index i = 0; i < 3; i++) {
        for (Index j = 0; j < 3; j++) {
          const Index row = y + i - 1, column = x + j - 1;
          if (row < 0 || row >= given.height || column < 0 || column >= given.width) continue;
          const Index at = (image * given.height + row) * given.width + column;
          sum += plane[at * given.x_pixel] * own[c * 9 + i * 3 + j];
        }
      }
    }
    const Index at = (image * given.height + y) * given.width + x;
    const Index block = k / BLOCK, lane = k % BLOCK;
    sum += given.bias[k];
    if (given.residual) {
      sum += given.residual[at * given.residual_pixel + block * given.residual_group + lane];
    }
    if (given.relu && sum < 0) sum = 0;
    given.y[at * given.y_pixel + block * given.y_group + lane] = sum;
  }

  // Some tiles' results, of some outputs that begin with a block.
  void write(Index t0, Index t1, Index k0, Index k1, const float* sums, Index rows,
             Index step) const {
    const V least = all(given.relu ? 0.0f : -__builtin_inff());
    for (Index t = t0; t < t1; t++) {
      const auto [image, y, x] = place(t);
      const Index high = smaller(given.height - y, M), wide = smaller(given.width - x, M);
      const Index first = (image * given.height + y) * given.width + x;
      for (Index k = k0; k < k1; k += LANES) {
        const Index count = smaller(k1 - k, LANES);
        const float* own = sums + (k - k0) / BLOCK * rows * BLOCK + (t - t0) * BLOCK + k % BLOCK;
        V half[M][N];
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
          V m[N], o[M];
#pragma GCC unroll 8
          for (int i = 0; i < N; i++) m[i] = load(own + (i * N + j) * step);
          Winograd<M>::output(m, o);
#pragma GCC unroll 8
          for (int i = 0; i < M; i++) half[i][j] = o[i];
        }
        const Index block = k / BLOCK, lane = k % BLOCK;
        const V bias = count == LANES ? load(given.bias + k) : load_some(given.bias + k, count);
        bool finite = true;
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
          if (i >= high) break;
          V o[M];
          Winograd<M>::output(half[i], o);
#pragma GCC unroll 8
          for (int j = 0; j < M; j++) {
            if (j >= wide) break;
            const Index at = first + i * given.width + j;
            V sum = add(o[j], bias);
            finite &= all_finite(sum);
            if (given.residual) {
              const float* from = given.residual + at * given.residual_pixel +
                                  block * given.residual_group + lane;
              sum = add(sum, count == LANES ? load(from) : load_some(from, count));
            }
            sum = larger(least, sum);
            float* to = given.y + at * given.y_pixel + block * given.y_group + lane;
            if (count == LANES) store(to, sum);
            else store_some(to, sum, count);
          }
        }
        if (finite) continue;
        for (Index i = 0; i < high; i++) {
          for (Index j = 0; j < wide; j++) {
            for (Index lane = 0; lane < count; lane++) directly(image, y + i, x + j, k + lane);
          }
        }
      }
    }
  }

  // Threads take blocks of tiles, each from its inputs to its results.
  bool by_tiles() const {
    const Index wanted = ceil_div(tiles, given.block);
    const Index blocks = smaller(tiles, ceil_div(wanted, given.threads) * given.threads);
    const Index rows = ceil_div(tiles, blocks);
    const Index in = apart(rows * inputs * BLOCK), out = apart(rows * outputs * BLOCK);
    Shares shares(blocks, given.threads);
    std::atomic<bool> enough{true};
    in_parallel(given.threads, [&](int thread) {
      float* values = scratch(N * N * (in + out));
      if (!values) {
        enough = false;
        return;
      }
      float* sums = values + N * N * in;
      for (Index b; (b = shares.take(thread)) >= 0;) {
        const Index t0 = tiles * b / blocks, t1 = tiles * (b + 1) / blocks;
        read(t0, t1, 0, inputs, values, rows, in);
        multiply(t1 - t0, 0, panels, values, in, sums, out, rows);
        write(t0, t1, 0, given.outputs, sums, rows, out);
      }
    });
    return enough;
  }

  // One block of tiles after the other; threads take blocks of channels, then panels of outputs.
  bool by_outputs() const {
    const Index blocks = ceil_div(tiles, given.block), rows = ceil_div(tiles, blocks);
    const Index chunks = ceil_div(panels, given.chunk);
    const Index in = apart(rows * inputs * BLOCK), out = apart(rows * given.chunk * PANEL);
    float* values = scratch(N * N * (in + out));
    if (!values) return false;
    std::atomic<bool> enough{true};
    for (Index b = 0; b < blocks; b++) {
      const Index t0 = tiles * b / blocks, t1 = tiles * (b + 1) / blocks;
      Shares reads(inputs, given.threads), products(chunks, given.threads);
      in_parallel(given.threads, [&](int thread) {
        for (Index i; (i = reads.take(thread)) >= 0;) read(t0, t1, i, i + 1, values, rows, in);
      });
      in_parallel(given.threads, [&](int thread) {
        float* own = scratch(N * N * (in + out));  // the first thread's begins with what all read
        if (!own) {
          enough = false;
          return;
        }
        float* sums = own + N * N * in;
        for (Index i; (i = products.take(thread)) >= 0;) {
          const Index p0 = i * given.chunk, p1 = smaller(p0 + given.chunk, panels);
          multiply(t1 - t0, p0, p1, values, in, sums, out, rows);
          write(t0, t1, p0 * PANEL, smaller(p1 * PANEL, given.outputs), sums, rows, out);
        }
      });
    }
    return enough;
  }

  // false where there is no memory
  bool run() const { return tiles == 0 || (given.shared ? by_outputs() : by_tiles()); }

  static Index prepared_size(Index channels, Index outputs) {
    return N * N * ceil_div(outputs, PANEL) * channels * PANEL + 2 * PANEL;
  }

  // weight [outputs][channels][3][3] → [point][panel][channels][PANEL]
  static void prepare(Index channels, Index outputs, const float* weight, float* prepared) {
    const Index panels = ceil_div(outputs, PANEL);
    std::memset(prepared, 0, prepared_size(channels, outputs) * sizeof(float));
    for (Index k = 0; k < outputs; k++) {
      for (Index c = 0; c < channels; c++) {
        double u[N][N];
        filter<M>(weight + (k * channels + c) * 9, u);
        for (Index point = 0; point < N * N; point++) {
          const Index panel = point * panels + k / PANEL;
          prepared[(panel * channels + c) * PANEL + k % PANEL] = float(u[point / N][point % N]);
        }
      }
    }
  }
};

}  // namespace FASTRES_ISA
