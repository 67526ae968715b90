// The ops as plain loops in NCHW order, straight from the equations, with more digits than any
// kernel has: what the self-test measures by.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/pipeline.cuh"

namespace fusednorm::host {

using Real = long double;

struct Case {
  int64_t samples, channels, spatial, groups;
  bool per_sample, channels_last;
  int act;
  bool residual, affine;
  int shift;     // elements past an aligned address
  int64_t grid;  // most blocks of a launch: too few for its work make them stride

  int64_t size() const { return channels * spatial; }
  int64_t numel() const { return samples * size(); }
  int64_t cells() const { return (per_sample ? samples : 1) * groups; }
  int64_t count() const { return numel() / cells(); }
  int64_t channel(int64_t i) const { return i % size() / spatial; }
  int64_t cell(int64_t i) const {
    const int64_t group = i % size() / (size() / groups);
    return per_sample ? i / size() * groups + group : group;
  }
  // Where element i of NCHW order lies in memory.
  int64_t place(int64_t i) const {
    const int64_t d = i % size();
    return channels_last ? i - d + d % spatial * channels + d / spatial : i;
  }
};

struct Inputs {
  std::vector<double> x, dy, residual, weight, bias;
};

struct Outputs {
  std::vector<Real> y, mean, rstd, var, dx, dresidual, dweight, dbias;
};

inline Real activation(int act, Real slope, Real z) {
  switch (act) {
    case kRelu:
      return z > 0 ? z : 0;
    case kSilu:
      return z / (1 + std::exp(-z));
    case kGelu:
      return z / 2 * std::erfc(-z / std::sqrt(Real(2)));
    case kLeakyRelu:
      return z > 0 ? z : slope * z;
    default:
      return z;
  }
}

inline Real activation_slope(int act, Real slope, Real z) {
  const Real logistic = 1 / (1 + std::exp(-z));
  switch (act) {
    case kRelu:
      return z > 0 ? 1 : 0;
    case kSilu:
      return logistic + z * logistic * (1 - logistic);
    case kGelu:
      return std::erfc(-z / std::sqrt(Real(2))) / 2 +
             z * std::exp(-z * z / 2) / std::sqrt(2 * std::acos(Real(-1)));
    case kLeakyRelu:
      return z > 0 ? 1 : slope;
    default:
      return 1;
  }
}

inline Outputs plain_loops(const Case& c, const Inputs& in, Real eps, Real live, Real slope) {
  Outputs out;
  out.mean.assign(c.cells(), 0);
  out.var.assign(c.cells(), 0);
  out.rstd.resize(c.cells());
  for (int64_t i = 0; i < c.numel(); ++i) out.mean[c.cell(i)] += in.x[i] / c.count();
  for (int64_t i = 0; i < c.numel(); ++i) {
    const Real centred = in.x[i] - out.mean[c.cell(i)];
    out.var[c.cell(i)] += centred * centred / c.count();
  }
  for (int64_t k = 0; k < c.cells(); ++k) out.rstd[k] = 1 / std::sqrt(out.var[k] + eps);

  std::vector<Real> m0(c.cells(), 0), m1(c.cells(), 0), xhat(c.numel());
  out.y.resize(c.numel());
  out.dx.resize(c.numel());
  out.dresidual.resize(c.numel());
  out.dweight.assign(c.channels, 0);
  out.dbias.assign(c.channels, 0);
  const auto weight = [&](int64_t i) { return c.affine ? Real(in.weight[c.channel(i)]) : 1; };
  for (int64_t i = 0; i < c.numel(); ++i) {
    const int64_t k = c.cell(i);
    xhat[i] = (in.x[i] - out.mean[k]) * out.rstd[k];
    const Real z = xhat[i] * weight(i) + (c.affine ? in.bias[c.channel(i)] : 0) +
                   (c.residual ? in.residual[i] : 0);
    const Real h = activation_slope(c.act, slope, z) * in.dy[i];
    out.y[i] = activation(c.act, slope, z);
    out.dresidual[i] = h;
    out.dbias[c.channel(i)] += h;
    out.dweight[c.channel(i)] += h * xhat[i];
    m0[k] += weight(i) * h / c.count();
    m1[k] += weight(i) * h * xhat[i] / c.count();
  }
  for (int64_t i = 0; i < c.numel(); ++i) {
    const int64_t k = c.cell(i);
    out.dx[i] =
        out.rstd[k] * (weight(i) * out.dresidual[i] - live * m0[k] - live * xhat[i] * m1[k]);
  }
  return out;
}

}  // namespace fusednorm::host
