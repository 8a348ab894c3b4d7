// Products with NF4 weights, which dequantize to the very bits that training used.
#pragma once

#include <cstring>
#include <type_traits>

#include "abi.h"
#include "simd.h"

namespace {

constexpr int kColumns = 32;        // output columns of one work item
constexpr int kStrip = 2 * kLanes;  // output columns whose sums are in registers at once
constexpr int kRows = kRegisters == 32 ? 12 : 6;     // rows that share a pass over a strip: kRows x 2 sums in registers
constexpr int kTile = kRegisters == 32 ? 256 : 128;  // depth of a dequantized tile, which stays in the nearest cache
constexpr int kGroup = 64;       // NF4: weights per absmax
constexpr int kNested = 256;     // absmax values per absmax of absmax (double quantization)

// bitsandbytes' NF4 table (QLoRA, arXiv:2305.14314, appendix E).
alignas(64) constexpr float kNf4[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

void dequantized_absmax(const Linear& w, int column, int group, float* out) {  // for 32 columns
  const int64_t groups = w.k / kGroup, first = column * groups + group;
  if (!w.absmax) {
    for (int i = 0; i < kColumns; i++) out[i] = w.nested_absmax[first + i * groups];
    return;
  }
  for (int i = 0; i < kColumns; i++) {
    int64_t at = first + i * groups;
    out[i] = w.nested_code[w.absmax[at]] * w.nested_absmax[at / kNested];
  }
  asm volatile("" : : "r"(out) : "memory");  // round the product before the sum, as bitsandbytes does: no FMA here
  for (int i = 0; i < kColumns; i++) out[i] += w.offset;
}

// ---- c[m][32] += x[m][k0 .. k0 + depth] . weights ------------------------------------------------------------------

#if HAVE_BF16_DOT
constexpr bool kPairs = true;
using Vec = __m512;

// 16 outputs x 2 inputs as bfloat16, bit for bit what dequantization gives.
struct Dequantizer {
  __m512 table = _mm512_load_ps(kNf4), low[2], high[2];
  void absmax(const float* values) {  // of 32 outputs
    const __m512i twice = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i upper = _mm512_add_epi32(twice, _mm512_set1_epi32(8));
    for (int v = 0; v < 2; v++) {
      __m512 a = _mm512_loadu_ps(values + 16 * v);
      low[v] = _mm512_permutexvar_ps(twice, a);
      high[v] = _mm512_permutexvar_ps(upper, a);
    }
  }
  __m512bh operator()(const uint8_t* codes, int v) const {
    __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + 16 * v)));
    __m512 b = _mm512_mul_ps(_mm512_permutexvar_ps(byte, table), low[v]);
    __m512 a = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table), high[v]);
    return _mm512_cvtne2ps_pbh(a, b);
  }
};

inline __m512bh pair(const bf16* p) {
  int32_t bits;
  std::memcpy(&bits, p, 4);
  return (__m512bh)_mm512_set1_epi32(bits);
}

template <int R>
void multiply_codes(const Linear& w, int column, const bf16* x, int64_t stride, float* c) {
  __m512 acc[R][2];
  for (int m = 0; m < R; m++) acc[m][0] = acc[m][1] = _mm512_setzero_ps();
  const uint8_t* codes = w.codes + int64_t(column) * (w.k / 2);
  Dequantizer dequantize;
  for (int k = 0; k < w.k; k += kGroup) {
    float absmax[kColumns];
    dequantized_absmax(w, column, k / kGroup, absmax);
    dequantize.absmax(absmax);
    for (int j = k; j < k + kGroup; j += 2, codes += 32) {
      __m512bh w0 = dequantize(codes, 0), w1 = dequantize(codes, 1);
#pragma GCC unroll 12
      for (int m = 0; m < R; m++) {
        __m512bh a = pair(x + m * stride + j);
        acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, a);
        acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, a);
      }
    }
  }
  for (int m = 0; m < R; m++)
    for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + m * kColumns + 16 * v, acc[m][v]);
}

template <int R>
void multiply_tile(const bf16* tile, int depth, const bf16* x, int64_t stride, float* c) {
  __m512 acc[R][2];
  for (int m = 0; m < R; m++)
    for (int v = 0; v < 2; v++) acc[m][v] = _mm512_loadu_ps(c + m * kColumns + 16 * v);
  for (int j = 0; j < depth; j += 2) {
    __m512bh w0 = (__m512bh)_mm512_load_si512(tile + j * kColumns);
    __m512bh w1 = (__m512bh)_mm512_load_si512(tile + j * kColumns + 32);
#pragma GCC unroll 12
    for (int m = 0; m < R; m++) {
      __m512bh a = pair(x + m * stride + j);
      acc[m][0] = _mm512_dpbf16_ps(acc[m][0], w0, a);
      acc[m][1] = _mm512_dpbf16_ps(acc[m][1], w1, a);
    }
  }
  for (int m = 0; m < R; m++)
    for (int v = 0; v < 2; v++) _mm512_storeu_ps(c + m * kColumns + 16 * v, acc[m][v]);
}

void fill_tile(const Linear& w, int column, int k0, int depth, bf16* tile) {
  const uint8_t* codes = w.codes + int64_t(column) * (w.k / 2) + int64_t(k0 / 2) * 32;
  Dequantizer dequantize;
  for (int k = 0; k < depth; k += kGroup) {
    float absmax[kColumns];
    dequantized_absmax(w, column, (k0 + k) / kGroup, absmax);
    dequantize.absmax(absmax);
    for (int j = k; j < k + kGroup; j += 2, codes += 32)
      for (int v = 0; v < 2; v++)
        _mm512_store_si512(tile + j * kColumns + 32 * v, (__m512i)dequantize(codes, v));
  }
}
#else
constexpr bool kPairs = false;
#endif

// The same for float, and for bfloat16 on a CPU without its dot product: tiles of float, [32 / kStrip][depth][kStrip].
template <class T>
void fill_tile(const Linear& w, int column, int k0, int depth, float* tile, T type) {
  const uint8_t* codes = w.codes + int64_t(column) * (w.k / 2) + int64_t(k0 / 2) * 32;
  for (int k = 0; k < depth; k += kGroup) {
    float absmax[kColumns];
    dequantized_absmax(w, column, (k0 + k) / kGroup, absmax);
    for (int j = k; j < k + kGroup; j += 2, codes += 32)
      for (int unit = 0; unit < kColumns; unit += 16) {  // 16 outputs x 2 inputs
        auto put = [&](int odd, int first, fvec weights) {
          const int at = unit + first;
          float* to = tile + (at / kStrip * depth + j + odd) * kStrip + at % kStrip;
          store(to, round_weight(weights * load(absmax + at), type));
        };
#if defined(__AVX512F__)
        const __m512 table = _mm512_load_ps(kNf4);
        const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + unit)));
        const __m512 low = _mm512_permutexvar_ps(byte, table);
        const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table);
        put(0, 0, (fvec)_mm512_permutex2var_ps(low, even, high));
        put(1, 0, (fvec)_mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high));
#elif defined(__AVX2__)
        const __m256 lower = _mm256_load_ps(kNf4), upper = _mm256_load_ps(kNf4 + 8);
        const __m256i four = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(codes + unit)));
        auto value = [&](__m256i index, __m256i top_bit) {  // table[index & 15]; the top bit is that of 8
          return (fvec)_mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index),
                                        _mm256_castsi256_ps(top_bit));
        };
        put(0, 0, value(four, _mm256_slli_epi32(four, 28)));
        put(0, 8, value(_mm256_srli_epi32(four, 4), _mm256_slli_epi32(four, 24)));
        put(1, 0, value(_mm256_srli_epi32(four, 8), _mm256_slli_epi32(four, 20)));
        put(1, 8, value(_mm256_srli_epi32(four, 12), _mm256_slli_epi32(four, 16)));
#else
        float row[2][16];
        for (int lane = 0; lane < 16; lane++) {
          row[lane % 2][lane / 2] = kNf4[codes[unit + lane] & 15];
          row[lane % 2][lane / 2 + 8] = kNf4[codes[unit + lane] >> 4];
        }
        for (int odd = 0; odd < 2; odd++)
          for (int first = 0; first < 16; first += kLanes) put(odd, first, load(row[odd] + first));
#endif
      }
  }
}

template <int R, class T>
void multiply_tile(const float* tile, int depth, const T* x, int64_t stride, float* c) {
  for (int strip = 0; strip < kColumns; strip += kStrip, tile += depth * kStrip) {
    fvec acc[R][2];
    for (int m = 0; m < R; m++)
      for (int v = 0; v < 2; v++) acc[m][v] = load(c + m * kColumns + strip + v * kLanes);
    for (int j = 0; j < depth; j++) {
      fvec w0 = load(tile + j * kStrip), w1 = load(tile + j * kStrip + kLanes);
#pragma GCC unroll 12
      for (int m = 0; m < R; m++) {
        fvec a = splat(to_float(x[m * stride + j]));
        acc[m][0] += w0 * a;
        acc[m][1] += w1 * a;
      }
    }
    for (int m = 0; m < R; m++)
      for (int v = 0; v < 2; v++) store(c + m * kColumns + strip + v * kLanes, acc[m][v]);
  }
}

// Call f<R>() with R = rows, 1 to kRows.
template <class F>
void with_rows(int rows, F f) {
  switch (rows) {
#define CASE(R) case R: if constexpr (R <= kRows) f(std::integral_constant<int, R>()); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

// c [rows, 32] = x [rows, k] . weights of outputs column ... column + 31
template <class T>
void matmul(const Linear& w, int column, const T* x, int rows, float* c, void* tile_memory) {
#if HAVE_BF16_DOT
  if constexpr (std::is_same_v<T, bf16>) {
    if (rows <= kRows) {
      with_rows(rows, [&](auto r) { multiply_codes<r.value>(w, column, x, w.k, c); });
      return;
    }
    bf16* tile = static_cast<bf16*>(tile_memory);
    std::memset(c, 0, sizeof(float) * rows * kColumns);
    for (int k = 0; k < w.k; k += kTile) {
      int depth = w.k - k < kTile ? w.k - k : kTile;
      fill_tile(w, column, k, depth, tile);
      for (int m = 0; m < rows; m += kRows)
        with_rows(rows - m < kRows ? rows - m : kRows, [&](auto r) {
          multiply_tile<r.value>(tile, depth, x + int64_t(m) * w.k + k, w.k, c + m * kColumns);
        });
    }
    return;
  }
#endif
  float* tile = static_cast<float*>(tile_memory);
  std::memset(c, 0, sizeof(float) * rows * kColumns);
  for (int k = 0; k < w.k; k += kTile) {
    int depth = w.k - k < kTile ? w.k - k : kTile;
    fill_tile(w, column, k, depth, tile, T{});
    for (int m = 0; m < rows; m += kRows)
      with_rows(rows - m < kRows ? rows - m : kRows, [&](auto r) {
        multiply_tile<r.value>(tile, depth, x + int64_t(m) * w.k + k, w.k, c + m * kColumns);
      });
  }
}

template <class T>
void dequantize(const Linear& w, float* out) {  // [n, k], for tests
  float* tile = static_cast<float*>(allocate(sizeof(float) * kTile * kColumns));
  for (int column = 0; column < w.n; column += kColumns)
    for (int k = 0; k < w.k; k += kTile) {
      int depth = w.k - k < kTile ? w.k - k : kTile;
#if HAVE_BF16_DOT
      if constexpr (std::is_same_v<T, bf16>) {
        fill_tile(w, column, k, depth, reinterpret_cast<bf16*>(tile));
        for (int n = 0; n < kColumns; n++)
          for (int j = 0; j < depth; j++)
            out[int64_t(column + n) * w.k + k + j] =
                to_float(reinterpret_cast<bf16*>(tile)[j / 2 * 2 * kColumns + n * 2 + j % 2]);
        continue;
      }
#endif
      fill_tile(w, column, k, depth, tile, T{});
      for (int n = 0; n < kColumns; n++)
        for (int j = 0; j < depth; j++)
          out[int64_t(column + n) * w.k + k + j] = tile[(n / kStrip * depth + j) * kStrip + n % kStrip];
    }
  std::free(tile);
}

}  // namespace
