// The two 16-bit storage types of CUDA, with their conversions: round to nearest even, overflow to
// infinity, subnormals kept, every NaN becomes 0x7fff. Storage only: kernels compute in float, so
// there is no arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

struct __nv_bfloat16 {
  uint16_t bits;
};

namespace fusednorm::host {

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace fusednorm::host

inline float __half2float(__half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t exponent = (h.bits >> 10) & 0x1fu;
  const uint32_t mantissa = h.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  // 112 = 127 - 15, the difference of the exponent biases.
  const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
  return fusednorm::host::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

inline __half __float2half_rn(float value) {
  const uint32_t bits = fusednorm::host::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    return {0x7fff};
  } else if (magnitude >= 0x477ff000u) {
    // 65520 lies half way between the largest half and 2^16: it and all above round to infinity.
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the spacing is a constant 2^-24, so rounding is that of an integer. A carry out
    // of the mantissa gives the smallest normal number, as it should.
    half = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline __half __float2half(float value) {
  return __float2half_rn(value);
}

inline float __bfloat162float(__nv_bfloat16 b) {
  return fusednorm::host::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = fusednorm::host::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16(float value) {
  return __float2bfloat16_rn(value);
}
