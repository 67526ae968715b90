// Every path of the kernels under AddressSanitizer and UBSan, against plain loops, in every order
// of threads and blocks; and before that the proof that the shim notices what it promises to.
//
//   host_selftest                 runs everything; the exit status says whether all held
//   host_selftest --fatal INDEX   one of the deliberately broken kernels that must not survive
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "detectors_together.h"
#include "plain_loops.h"

#if !defined(__SANITIZE_ADDRESS__)
#error "build with -fsanitize=address,undefined: their reports are half of what is tested here"
#endif

// UBSan goes on after a report unless told otherwise.
extern "C" const char* __ubsan_default_options() {
  return "halt_on_error=1:print_stacktrace=1";
}

namespace fusednorm::host {
namespace {

constexpr double kEps = 1e-5;
constexpr double kLive = 0.75;
constexpr double kSlope = 0.1;
// Few enough SMs for tiny problems to fill, many enough for their reductions to be split; so little
// shared memory that their slices take one CTA, a cluster, or a share of a cooperative grid.
constexpr Device small_device(int shared, bool cooperative, int max_cluster) {
  Device device = kH200;
  device.num_sms = 4;
  device.shared_per_block = device.shared_per_sm = shared;
  device.cooperative = cooperative;
  device.max_cluster = max_cluster;
  return device;
}

// What a case is run by. On chip means wherever it fits: no other plan is faster than forever.
struct Way {
  const char* name;
  bool on_chip;
  bool counters;
  Device device;
};
constexpr Way kWays[] = {
    {"streaming", false, true, small_device(8192, false, 1)},
    {"streaming without counters", false, false, small_device(8192, false, 1)},
    {"on chip", true, true, small_device(200000, false, 1)},
    {"on chip in clusters", true, true, small_device(8192, false, 4)},
    {"on chip in a grid", true, true, small_device(8192, true, 1)},
};
int ways_run[std::size(kWays)] = {};

NormParams planned(NormParams p, const Case& c, Direction direction, const Way& way) {
  const bool reads_residual =
      p.residual != nullptr && !(direction == Direction::kBackward && p.mask);
  const Problem problem{
      p.geometry,     element_size(p.dtype), c.channels_last,        aligned(p), direction,
      reads_residual, p.mask != nullptr,     p.dresidual != nullptr, p.act};
  p.plan = plan_streaming(problem, way.device);
  if (way.on_chip) p.plan = plan_on_chip(problem, way.device, p.plan, 1e30);
  if (p.plan.path == Path::kStreaming) p.plan = limit_grid(p.plan, c.grid);
  ways_run[&way - kWays] += (p.plan.path == Path::kOnChip) == way.on_chip;
  return p;
}

// Numbers in [-1, 1) from a counter, the same everywhere.
double noise(uint64_t counter) {
  counter = (counter + 1) * 0x9e3779b97f4a7c15u;
  counter = (counter ^ counter >> 32) * 0xd6e8feb86659fd93u;
  return static_cast<double>((counter ^ counter >> 32) >> 11) * 0x1p-52 - 1;
}

// An activation tensor: exactly as long as needed, and what it holds in double and NCHW order.
template <typename T>
struct Activation {
  explicit Activation(const Case& c) : shift(c.shift), data(poisoned<T>(c.numel() + c.shift)) {}

  T* begin() const { return data.get() + shift; }

  template <typename F>
  std::vector<double> fill(const Case& c, const F& f) {
    for (int64_t i = 0; i < c.numel(); ++i) {
      narrow(static_cast<Accumulator<T>>(f(i)), begin()[c.place(i)]);
    }
    return read(c);
  }

  std::vector<double> read(const Case& c) const {
    std::vector<double> values(c.numel());
    for (int64_t i = 0; i < c.numel(); ++i) values[i] = widen(begin()[c.place(i)]);
    return values;
  }

  int64_t shift;
  std::unique_ptr<T[]> data;
};

template <typename T>
class Comparison {
 public:
  Comparison(const Case& c, DType dtype) : c_(c), dtype_(dtype) {}

  // |error| <= ulps * unit roundoff * (1 + |exact|), the sizes of all intermediate numbers being
  // near 1.
  template <typename U>
  void operator()(const char* what, const U* ours, const std::vector<Real>& exact, double ulps,
                  bool activation) {
    expect(!any_poison(ours, exact.size()), describe(what) + " has unwritten elements");
    double worst = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double value = widen(ours[activation ? c_.place(i) : i]);
      const double error =
          static_cast<double>(std::fabs(value - exact[i]) / (1 + std::fabs(exact[i])));
      // Not std::max, which would drop a NaN.
      if (!(error <= worst)) worst = error;
    }
    const double bound = ulps * unit<Accumulator<T>>() + (activation ? unit<T>() : 0);
    expect(worst <= bound,
           describe(what) + ": error " + std::to_string(worst / bound) + " times the bound");
  }

 private:
  // Half a unit in the last place of 1.
  template <typename U>
  static double unit() {
    if (std::is_same<U, double>::value) return 0x1p-53;
    if (std::is_same<U, float>::value) return 0x1p-24;
    return std::is_same<U, __half>::value ? 0x1p-11 : 0x1p-8;
  }

  std::string describe(const char* what) const {
    char text[200];
    std::snprintf(
        text, sizeof(text),
        "%s: N %d C %d S %d G %d per_sample %d dtype %d nhwc %d act %d residual %d affine %d "
        "shift %d grid %d",
        what, int(c_.samples), int(c_.channels), int(c_.spatial), int(c_.groups), c_.per_sample,
        int(dtype_), c_.channels_last, c_.act, c_.residual, c_.affine, c_.shift, int(c_.grid));
    return text;
  }

  const Case& c_;
  DType dtype_;
};

// Bytes of everything a run wrote, to be compared between orders.
template <typename U>
void append(std::string& bytes, const U* data, size_t count) {
  bytes.append(reinterpret_cast<const char*>(data), count * sizeof(U));
}

template <typename T>
void check_case(const Case& c, DType dtype, const Way& way) {
  using A = Accumulator<T>;
  Activation<T> x(c), dy(c), residual(c);
  Inputs in;
  // Alternating signs keep the variance of every cell near 4, however few elements it has.
  in.x = x.fill(c, [](int64_t i) { return 1 + 0.5 * noise(i); });
  in.x =
      x.fill(c, [&](int64_t i) { return in.x[i] + ((i / c.size() + i % c.size()) % 2 ? 2 : -2); });
  in.dy = dy.fill(c, [](int64_t i) { return noise(i + 1000000) + 0.25; });
  in.residual = residual.fill(c, [](int64_t i) { return noise(i + 2000000); });
  auto weight = poisoned<A>(c.channels), bias = poisoned<A>(c.channels);
  for (int64_t i = 0; i < c.channels; ++i) {
    in.weight.push_back(weight[i] = static_cast<A>(1 + 0.5 * noise(i + 3000000)));
    in.bias.push_back(bias[i] = static_cast<A>(noise(i + 4000000)));
  }
  const Outputs exact = plain_loops(c, in, kEps, kLive, kSlope);

  std::string first;
  for (const Ordered& order : kOrders) {
    schedule = order.schedule;
    Activation<T> y(c), again(c), dx(c), dresidual(c);
    auto mean = poisoned<A>(c.cells()), rstd = poisoned<A>(c.cells()), var = poisoned<A>(c.cells());
    auto dweight = poisoned<A>(c.channels), dbias = poisoned<A>(c.channels);
    NormParams p{};
    p.dtype = dtype;
    p.geometry = make_geometry(c.samples, c.channels, c.spatial, c.groups, c.per_sample);
    p.x = x.begin();
    p.residual = c.residual ? residual.begin() : nullptr;
    p.weight = c.affine ? weight.get() : nullptr;
    p.bias = c.affine ? bias.get() : nullptr;
    p.mean = mean.get();
    p.rstd = rstd.get();
    p.var = var.get();
    p.eps = kEps;
    p.live = kLive;
    p.slope = kSlope;
    p.act = c.act;
    p.out = y.begin();
    // The masks of both must agree; the one is written on chip where the other is not.
    const bool masked = c.act == kRelu && c.residual;
    const int64_t mask_bytes = ceil_div(c.numel(), 16 / int64_t(sizeof(T)));
    auto mask = poisoned<uint8_t>(mask_bytes), mask_again = poisoned<uint8_t>(mask_bytes);
    p.mask = masked ? mask.get() : nullptr;
    run(planned(p, c, Direction::kForward, way), Direction::kForward, way.counters,
        [](const NormParams& q) { forward(q); });
    p.out = again.begin();
    p.mask = masked ? mask_again.get() : nullptr;
    apply(planned(p, c, Direction::kApply, way));
    expect(std::memcmp(mask.get(), mask_again.get(), mask_bytes) == 0 || !masked, "the same masks");
    p.dy = dy.begin();
    p.out = dx.begin();
    p.dresidual = c.residual && c.act != kNone ? dresidual.begin() : nullptr;
    p.dweight = dweight.get();
    p.dbias = dbias.get();
    run(planned(p, c, Direction::kBackward, way), Direction::kBackward, way.counters,
        [](const NormParams& q) { backward(q); });

    std::string bytes;
    for (const T* tensor : {y.begin(), dx.begin(), dresidual.begin()}) {
      append(bytes, tensor, c.numel());
    }
    for (const A* tensor : {mean.get(), rstd.get(), var.get()}) append(bytes, tensor, c.cells());
    for (const A* tensor : {dweight.get(), dbias.get()}) append(bytes, tensor, c.channels);
    Comparison<T> compare(c, dtype);
    if (first.empty()) {
      first = bytes;
      // Sums of m rounded numbers of size 1 are off by about sqrt(m) roundings.
      const double sum = 8 * std::sqrt(double(c.numel() / c.channels));
      compare("y", y.begin(), exact.y, 32, true);
      compare("apply", again.begin(), exact.y, 32, true);
      compare("mean", mean.get(), exact.mean, 4, false);
      compare("var", var.get(), exact.var, 32, false);
      compare("rstd", rstd.get(), exact.rstd, 32, false);
      compare("dx", dx.begin(), exact.dx, 64, true);
      compare("dweight", dweight.get(), exact.dweight, 64 + sum, false);
      compare("dbias", dbias.get(), exact.dbias, 64 + sum, false);
      if (p.dresidual) compare("dresidual", dresidual.begin(), exact.dresidual, 64, true);
    }
    expect(bytes == first, std::string("the same bits in the order ") + order.name);
  }
}

void check(const Case& c) {
  // Half and bfloat16 differ in their conversions only, and double never stays on the chip.
  for (const Way& way : kWays) {
    check_case<float>(c, DType::kFloat32, way);
    check_case<__half>(c, DType::kFloat16, way);
    if (&way != kWays) continue;
    check_case<__nv_bfloat16>(c, DType::kBFloat16, way);
    check_case<double>(c, DType::kFloat64, way);
  }
}

// Every regime of groups against channels and positions, in both layouts, with statistics of the
// batch and of the sample. Activation, residual, affine, alignment and a short grid go round with
// odd periods, so that they meet both layouts; then all of them meet on one shape for each access
// pattern.
void check_kernels() {
  constexpr int64_t kShapes[][4] = {
      // N, C, S, G
      {4, 6, 5, 6},      // batch norm
      {3, 6, 7, 2},      // G divides C
      {2, 4, 12, 12},    // C divides G
      {2, 5, 6, 1},      // one group
      {3, 3, 4, 12},     // a group a position
      {2, 6, 5, 10},     // groups of 3 straddle channels of 5
      {3, 10, 2, 4},     // groups of 5 straddle channels of 2
      {5, 7, 1, 7},      // no positions
      {9, 1, 11, 1},     // one channel
      {3, 16, 24, 16},   // 16-byte accesses in every dtype and layout,
      {3, 16, 24, 48},   // also for parts of channels
      {3, 16, 24, 4},    // and for several
      {2, 136, 3, 136},  // more channels than a tile of columns, the last tile partly filled
      {3, 2, 1372, 2},   // runs long enough to be split among blocks, into unequal shares,
      {700, 5, 1, 5},    // and columns
  };
  int turn = 0;
  for (const auto& [n, c, s, g] : kShapes) {
    for (const bool per_sample : {false, true}) {
      if (per_sample && g == c * s) continue;  // cells of one element
      for (const bool channels_last : {false, true}) {
        check({n, c, s, g, per_sample, channels_last, turn % 5, turn % 3 == 1, turn % 7 != 3,
               turn % 9 == 4, turn % 13 < 4 ? 2 : kMaxGrid});
        ++turn;
      }
    }
  }
  // Blocks of several warps that take one tile after another.
  check({3, 2, 1372, 2, true, false, kNone, false, true, 0, 2});
  for (int options = 0; options < 5 * 2 * 2; ++options) {
    const int act = options % 5;
    const bool residual = options / 5 % 2 == 1, affine = options / 10 == 1;
    check({3, 16, 8, 4, false, false, act, residual, affine, 0, kMaxGrid});
    check({3, 16, 8, 4, false, true, act, residual, affine, 0, kMaxGrid});
    check({2, 6, 5, 10, false, true, act, residual, affine, 1, kMaxGrid});
  }
}

void check_update_running() {
  constexpr int64_t kGroups = 300, kCount = 12;
  for (const Ordered& order : kOrders) {
    for (const bool cumulative : {false, true}) {
      schedule = order.schedule;
      auto mean = poisoned<float>(kGroups), var = poisoned<float>(kGroups);
      auto running_mean = poisoned<float>(kGroups), running_var = poisoned<float>(kGroups);
      for (int64_t g = 0; g < kGroups; ++g) {
        running_mean[g] = running_var[g] = mean[g] = var[g] = static_cast<float>(g);
      }
      int64_t batches = 3;
      RunningParams p{};
      p.dtype = DType::kFloat32;
      p.running_mean = running_mean.get();
      p.running_var = running_var.get();
      p.num_batches_tracked = &batches;
      p.mean = mean.get();
      p.var = var.get();
      p.groups = kGroups;
      p.count = kCount;
      p.cumulative = cumulative;
      p.momentum = 0.5;
      update_running(p);
      expect(batches == 4, "a batch is counted once");
      const double factor = cumulative ? 0.25 : 0.5;
      for (int64_t g = 0; g < kGroups; ++g) {
        const double want = g * (1 - factor + factor * kCount / (kCount - 1));
        expect(running_mean[g] == static_cast<float>(g), "running mean");
        expect(std::fabs(running_var[g] - want) <= 4 * 0x1p-24 * want, "running variance");
      }
    }
  }
}

}  // namespace
}  // namespace fusednorm::host

int main(int argc, char** argv) {
  using namespace fusednorm::host;
  if (argc == 3 && std::string(argv[1]) == "--fatal") {
    const size_t index = std::atoi(argv[2]), plain = std::size(kFatal);
    (index < plain ? kFatal[index] : kFatalTogether[index - plain]).run();
    return 0;
  }
  check_detectors(argv[0]);
  check_together();
  check_fatal(argv[0], kFatalTogether, std::size(kFatalTogether), std::size(kFatal));
  check_kernels();
  for (const Way& way : kWays) expect(ways_run[&way - kWays] > 100, way.name);
  check_update_running();
  std::printf("%lld launches, %d failures\n", static_cast<long long>(launches), failures);
  return failures == 0 ? 0 : 1;
}
