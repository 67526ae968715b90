// The fused activations and their derivatives, on an array of values at a time.
//
// act is the same for the whole launch and known only at run time: one switch for an array of
// values, and five loops behind it, instead of five times as many kernels.
//   relu'(0) = 0, leaky_relu'(0) = slope, as in torch. NaN stays NaN.
#pragma once

#include <cmath>

#include "platform.cuh"

namespace fusednorm {

enum Activation : int { kNone = 0, kRelu = 1, kSilu = 2, kGelu = 3, kLeakyRelu = 4 };
constexpr int kActivations = 5;

FUSEDNORM_DEVICE float exponential(float x) {
  return expf(x);
}
FUSEDNORM_DEVICE double exponential(double x) {
  return exp(x);
}
FUSEDNORM_DEVICE float error_function(float x) {
  return erff(x);
}
FUSEDNORM_DEVICE double error_function(double x) {
  return erf(x);
}

template <typename A>
FUSEDNORM_DEVICE A normal_cdf(A z) {
  return A(0.5) * (A(1) + error_function(z * A(0.70710678118654752440)));
}

template <typename A>
FUSEDNORM_DEVICE A normal_pdf(A z) {
  return A(0.39894228040143267794) * exponential(A(-0.5) * z * z);
}

// z[i] <- act(z[i])
template <typename A, int M>
FUSEDNORM_DEVICE void activate(int act, A slope, A (&z)[M]) {
  switch (act) {
    case kRelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) z[i] = z[i] < 0 ? A(0) : z[i];
      break;
    case kSilu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) z[i] = z[i] / (A(1) + exponential(-z[i]));
      break;
    case kGelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) z[i] = z[i] * normal_cdf(z[i]);
      break;
    case kLeakyRelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) z[i] = z[i] > 0 ? z[i] : z[i] * slope;
      break;
    default:
      break;
  }
}

// h[i] <- act'(z[i]) * h[i]
template <typename A, int M>
FUSEDNORM_DEVICE void activate_backward(int act, A slope, const A (&z)[M], A (&h)[M]) {
  switch (act) {
    case kRelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) h[i] = z[i] <= 0 ? A(0) : h[i];
      break;
    case kSilu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) {
        const A s = A(1) / (A(1) + exponential(-z[i]));
        h[i] *= s * (A(1) + z[i] * (A(1) - s));
      }
      break;
    case kGelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) h[i] *= normal_cdf(z[i]) + z[i] * normal_pdf(z[i]);
      break;
    case kLeakyRelu:
      FUSEDNORM_UNROLL
      for (int i = 0; i < M; ++i) h[i] = z[i] > 0 ? h[i] : h[i] * slope;
      break;
    default:
      break;
  }
}

}  // namespace fusednorm
