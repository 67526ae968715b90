// Element types, their accumulation types, and 16-byte accesses to memory.
//
// A Vec<T, N> with N > 1 is 16 bytes at an address aligned to 16; the launch plan asks for it only
// where every address a kernel forms is. N = 1 is the scalar path. Half and bfloat16 are storage
// only: all arithmetic is in float.
#pragma once

#include <cstring>

#include "platform.cuh"

namespace fusednorm {

template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

FUSEDNORM_DEVICE float widen(float value) {
  return value;
}
FUSEDNORM_DEVICE double widen(double value) {
  return value;
}
FUSEDNORM_DEVICE float widen(__half value) {
  return __half2float(value);
}
FUSEDNORM_DEVICE float widen(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

FUSEDNORM_DEVICE void narrow(float value, float& out) {
  out = value;
}
FUSEDNORM_DEVICE void narrow(double value, double& out) {
  out = value;
}
FUSEDNORM_DEVICE void narrow(float value, __half& out) {
  out = __float2half_rn(value);
}
FUSEDNORM_DEVICE void narrow(float value, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(value);
}

constexpr int kVectorBytes = 16;

template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  static_assert(N == 1 || N * sizeof(T) == kVectorBytes, "scalar, or exactly one 16-byte access");
  T at[N];
};

// 16 bytes or a scalar. kLast says that nothing else will read them: they leave the caches first.
template <int N, bool kLast = false, typename T>
FUSEDNORM_DEVICE Vec<T, N> load(const T* base, int64_t offset) {
  Vec<T, N> packed;
  if constexpr (N == 1) {
    packed.at[0] = base[offset];
  } else {
    const Bits16* address = reinterpret_cast<const Bits16*>(base + offset);
    const Bits16 bits = kLast ? load_bits_last(address) : load_bits(address);
    std::memcpy(&packed, &bits, sizeof(bits));
  }
  return packed;
}

template <typename T, int N>
FUSEDNORM_DEVICE Vec<T, N> pack(const Accumulator<T> (&values)[N]) {
  Vec<T, N> packed;
  FUSEDNORM_UNROLL
  for (int v = 0; v < N; ++v) narrow(values[v], packed.at[v]);
  return packed;
}

template <typename T, int N>
FUSEDNORM_DEVICE void store(T* base, int64_t offset, const Vec<T, N>& packed) {
  if constexpr (N == 1) {
    base[offset] = packed.at[0];
  } else {
    Bits16 bits;
    std::memcpy(&bits, &packed, sizeof(bits));
    store_bits(reinterpret_cast<Bits16*>(base + offset), bits);
  }
}

// A mask has a byte for 16 bytes of y in memory order; bit j says whether element j is positive.
template <typename T>
constexpr int kMaskWidth = kVectorBytes / int(sizeof(T));

template <typename T, int N>
FUSEDNORM_DEVICE unsigned positive(const Vec<T, N>& y) {
  unsigned bits = 0;
  FUSEDNORM_UNROLL
  for (int v = 0; v < N; ++v) bits |= unsigned(widen(y.at[v]) > 0) << v;
  return bits;
}

// values[v] <- 0 where the mask's bit is. offset is that of values[0] in memory order.
template <typename T, int N>
FUSEDNORM_DEVICE void keep_positive(const uint8_t* mask, int64_t offset,
                                    Accumulator<T> (&values)[N]) {
  constexpr int kWidth = kMaskWidth<T>;
  const unsigned bits = unsigned(mask[offset / kWidth]) >> (N == 1 ? offset % kWidth : 0);
  FUSEDNORM_UNROLL
  for (int v = 0; v < N; ++v) {
    if (!(bits >> v & 1u)) values[v] = 0;
  }
}

}  // namespace fusednorm
