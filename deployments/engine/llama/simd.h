// The vectors of this machine, bfloat16, and arithmetic on both.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAVE_BF16_DOT 1
#else
#define HAVE_BF16_DOT 0
#endif

namespace {

using bf16 = uint16_t;

// Floats of one register. Wider vectors would compile too, but into scalar code.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif
typedef float fvec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t hvec __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline fvec splat(float x) { return x - fvec{}; }
inline fvec load(const float* p) { return *reinterpret_cast<const fvec*>(p); }
inline void store(float* p, fvec x) { *reinterpret_cast<fvec*>(p) = x; }
inline fvec load(const bf16* p) {
  return (fvec)(__builtin_convertvector(*reinterpret_cast<const hvec*>(p), uvec) << 16);
}
inline uvec rounded_to_bf16(fvec x) {  // to nearest, ties to even; bfloat16 in the upper half of each lane
  uvec bits = (uvec)x;
  uvec rounded = bits + 0x7fff + ((bits >> 16) & 1);
  uvec is_nan = (uvec)(x != x);
  return ((rounded & ~is_nan) | (is_nan & 0x7fc00000)) & 0xffff0000;
}
inline void store(bf16* p, fvec x) {
  *reinterpret_cast<hvec*>(p) = __builtin_convertvector(rounded_to_bf16(x) >> 16, hvec);
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline fvec round_weight(fvec x, float) { return x; }
inline fvec round_weight(fvec x, bf16) { return (fvec)rounded_to_bf16(x); }
inline float sum(fvec x) {
  float s[kLanes];
  store(s, x);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) s[i] += s[i + half];
  return s[0];
}

// e^x, relative error below 2e-7 (Cephes' polynomial); NaN stays NaN.
inline fvec vexp(fvec x) {
  const fvec lowest = splat(-87.0f), highest = splat(88.0f);
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const fvec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  fvec shifted = x * 1.44269504088896341f + magic;
  fvec n = shifted - magic;
  fvec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  fvec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec exponent = ((ivec)shifted - (ivec)magic + 127) << 23;
  return p * (fvec)exponent;
}

inline void* allocate(size_t bytes) { return std::aligned_alloc(64, (bytes + 63) / 64 * 64); }

}  // namespace
