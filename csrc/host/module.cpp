// The kernels' own source as a Python module: pointers in, what a CPU makes of it out. Imported by
// tests only; the package never sees it. Argument order is that of the ops, 0 standing for an
// absent tensor.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "buffers.h"
#include "plan_checks.h"

namespace py = pybind11;
using namespace fusednorm;

namespace {

using Pointer = uintptr_t;

void* at(Pointer address) {
  return reinterpret_cast<void*>(address);
}

void set_order(const std::string& order, uint64_t seed) {
  using host::Order;
  if (order == "forward") {
    host::schedule = {Order::kForward, 0};
  } else if (order == "reversed") {
    host::schedule = {Order::kReversed, 0};
  } else if (order == "shuffled") {
    host::schedule = {Order::kShuffled, seed};
  } else {
    throw std::invalid_argument("order must be forward, reversed or shuffled, got " + order);
  }
}

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "float16") return DType::kFloat16;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float64") return DType::kFloat64;
  throw std::invalid_argument("dtype must be float32, float16, bfloat16 or float64, got " + name);
}

// Nanoseconds that no plan takes.
constexpr double kForever = 1e30;

Direction direction_of(const std::string& name) {
  if (name == "forward") return Direction::kForward;
  if (name == "backward") return Direction::kBackward;
  if (name == "apply") return Direction::kApply;
  throw std::invalid_argument("direction must be forward, backward or apply, got " + name);
}

// What all calls on a tensor have in common, and which plan they are to take.
struct Call {
  DType dtype;
  bool channels_last;
  Geometry geometry;
  Device device;
  std::string path;  // streaming, on_chip wherever it fits, or auto: what the operators take
  bool counters;     // whether the call has them
  int64_t max_grid;

  // The plan depends on addresses, so it is made when they are known.
  NormParams planned(NormParams params, Direction direction) const {
    params.dtype = dtype;
    params.geometry = geometry;
    const bool backward = direction == Direction::kBackward;
    const ::fusednorm::Problem problem{geometry,
                                       element_size(dtype),
                                       channels_last,
                                       host::aligned(params),
                                       direction,
                                       params.residual != nullptr && !(backward && params.mask),
                                       params.mask != nullptr,
                                       params.dresidual != nullptr,
                                       params.act};
    Plan plan = plan_streaming(problem, device);
    if (path == "on_chip") plan = plan_on_chip(problem, device, plan, kForever);
    if (path == "auto") plan = make_plan(problem, device);
    params.plan = plan.path == Path::kStreaming ? limit_grid(plan, max_grid) : plan;
    return params;
  }

  // Runs it, and returns the plan it ran.
  template <typename Op>
  Plan run(const NormParams& params, Direction direction, const Op& op) const {
    const NormParams p = planned(params, direction);
    // A device of any size grants static arrays their 48 KB.
    host::limits = {device.num_sms,
                    device.threads_per_sm,
                    32,
                    std::max(device.shared_per_sm, 49 * 1024),
                    std::max(device.shared_per_block, 48 * 1024),
                    device.max_cluster};
    host::run(p, direction, counters || p.plan.path == Path::kOnChip, op);
    return p.plan;
  }
};

Call make_call(const std::string& dtype, bool channels_last, int64_t samples, int64_t channels,
               int64_t spatial, int64_t num_groups, bool per_sample, const Device& device,
               const std::string& path, bool counters, int64_t max_grid) {
  return {dtype_of(dtype),
          channels_last,
          make_geometry(samples, channels, spatial, num_groups, per_sample),
          device,
          path,
          counters,
          max_grid};
}

Plan norm_forward(const Call& call, Pointer x, Pointer weight, Pointer bias, Pointer residual,
                  Pointer y, Pointer mean, Pointer rstd, Pointer var, double eps, int act,
                  double slope, Pointer mask, Pointer running_mean, Pointer running_var,
                  Pointer num_batches_tracked, double momentum) {
  NormParams p{};
  p.x = at(x);
  p.weight = at(weight);
  p.bias = at(bias);
  p.residual = at(residual);
  p.out = at(y);
  p.mean = at(mean);
  p.rstd = at(rstd);
  p.var = at(var);
  p.eps = eps;
  p.act = act;
  p.slope = slope;
  p.mask = static_cast<uint8_t*>(at(mask));
  p.running_mean = at(running_mean);
  p.running_var = at(running_var);
  p.num_batches_tracked = static_cast<int64_t*>(at(num_batches_tracked));
  p.momentum = momentum;
  return call.run(p, Direction::kForward, [](const NormParams& q) { forward(q); });
}

Plan norm_apply(const Call& call, Pointer x, Pointer mean, Pointer rstd, Pointer weight,
                Pointer bias, Pointer residual, Pointer y, int act, double slope, Pointer mask) {
  NormParams p{};
  p.x = at(x);
  p.mean = at(mean);
  p.rstd = at(rstd);
  p.weight = at(weight);
  p.bias = at(bias);
  p.residual = at(residual);
  p.out = at(y);
  p.act = act;
  p.slope = slope;
  p.mask = static_cast<uint8_t*>(at(mask));
  return call.run(p, Direction::kApply, [](const NormParams& q) { apply(q); });
}

Plan norm_backward(const Call& call, Pointer dy, Pointer x, Pointer mean, Pointer rstd,
                   Pointer weight, Pointer bias, Pointer residual, Pointer dx, Pointer dweight,
                   Pointer dbias, Pointer dresidual, double live, int act, double slope,
                   Pointer mask) {
  NormParams p{};
  p.dy = at(dy);
  p.x = at(x);
  p.mean = at(mean);
  p.rstd = at(rstd);
  p.weight = at(weight);
  p.bias = at(bias);
  p.residual = at(residual);
  p.out = at(dx);
  p.dweight = at(dweight);
  p.dbias = at(dbias);
  p.dresidual = at(dresidual);
  p.live = live;
  p.act = act;
  p.slope = slope;
  p.mask = static_cast<uint8_t*>(at(mask));
  return call.run(p, Direction::kBackward, [](const NormParams& q) { backward(q); });
}

void norm_update_running(const std::string& dtype, Pointer running_mean, Pointer running_var,
                         Pointer num_batches_tracked, Pointer mean, Pointer var, int64_t groups,
                         std::optional<double> momentum, int64_t count) {
  RunningParams p{};
  p.dtype = dtype_of(dtype);
  p.running_mean = at(running_mean);
  p.running_var = at(running_var);
  p.num_batches_tracked = static_cast<int64_t*>(at(num_batches_tracked));
  p.mean = at(mean);
  p.var = at(var);
  p.groups = groups;
  p.count = count;
  p.cumulative = !momentum.has_value();
  p.momentum = momentum.value_or(0.0);
  update_running(p);
}

// (offset, channel, cell) of the first `limit` elements that a thread visits in a job, without
// touching memory: for shapes of any size. The element type only has to fit the plan's vector.
std::vector<std::array<int64_t, 3>> walk(const Geometry& geometry, const Plan& plan, int64_t job,
                                         unsigned thread, size_t limit, bool back) {
  std::vector<std::array<int64_t, 3>> visited;
  const DType dtype = plan.vector == 8   ? DType::kFloat16
                      : plan.vector == 4 ? DType::kFloat32
                                         : DType::kFloat64;
  dispatch_tile(dtype, plan, [&](auto type) {
    using Tile = typename decltype(type)::type;
    host::launch(1, plan.block, [&] {
      if (threadIdx.x != thread) return;
      const Tile tile(geometry, plan, job);
      for (Cursor cursor = tile.cursor(back); cursor.more() && visited.size() < limit;
           cursor.step()) {
        for (int v = 0; v < Tile::kVector; ++v) {
          const int piece = tile.local(v % Tile::kWidth);
          visited.push_back({cursor.offset + v, tile.channel(piece), tile.cell(piece)});
        }
      }
    });
  });
  return visited;
}

}  // namespace

PYBIND11_MODULE(fusednorm_host, m) {
  py::class_<Geometry>(m, "Geometry")
      .def(py::init(&make_geometry), py::arg("samples"), py::arg("channels"), py::arg("spatial"),
           py::arg("num_groups"), py::arg("per_sample"))
      .def_readonly("sets", &Geometry::sets)
      .def_readonly("size", &Geometry::size)
      .def_readonly("group_size", &Geometry::group_size)
      .def_readonly("pieces", &Geometry::pieces)
      .def_readonly("even", &Geometry::even)
      .def_property_readonly("cells", &Geometry::cells)
      .def_property_readonly("pooled", &Geometry::pooled)
      .def_property_readonly("count", &Geometry::count)
      .def("piece_of", &Geometry::piece_of)
      .def("piece_start", &Geometry::piece_start)
      .def("channel_of", &Geometry::channel_of);

  py::enum_<Pattern>(m, "Pattern")
      .value("runs", Pattern::kRuns)
      .value("columns", Pattern::kColumns)
      .value("frames", Pattern::kFrames);
  py::enum_<Path>(m, "Path").value("streaming", Path::kStreaming).value("on_chip", Path::kOnChip);
  py::enum_<Tier>(m, "Tier")
      .value("block", Tier::kBlock)
      .value("cluster", Tier::kCluster)
      .value("grid", Tier::kGrid);

  py::class_<Device>(m, "Device", "A GPU; without arguments an H200.")
      .def(py::init([](int num_sms, int shared_per_block, int shared_per_sm, int registers_per_sm,
                       int threads_per_sm, int capability, bool cooperative, int max_cluster,
                       int64_t l2_bytes) {
             return Device{num_sms,          shared_per_block, shared_per_sm,
                           registers_per_sm, threads_per_sm,   capability,
                           cooperative,      max_cluster,      l2_bytes};
           }),
           py::kw_only(), py::arg("num_sms") = kH200.num_sms,
           py::arg("shared_per_block") = kH200.shared_per_block,
           py::arg("shared_per_sm") = kH200.shared_per_sm,
           py::arg("registers_per_sm") = kH200.registers_per_sm,
           py::arg("threads_per_sm") = kH200.threads_per_sm,
           py::arg("capability") = kH200.capability, py::arg("cooperative") = kH200.cooperative,
           py::arg("max_cluster") = kH200.max_cluster, py::arg("l2_bytes") = kH200.l2_bytes)
      .def_readonly("num_sms", &Device::num_sms)
      .def_readonly("shared_per_block", &Device::shared_per_block)
      .def_readonly("shared_per_sm", &Device::shared_per_sm)
      .def_readonly("registers_per_sm", &Device::registers_per_sm)
      .def_readonly("threads_per_sm", &Device::threads_per_sm)
      .def_readonly("capability", &Device::capability)
      .def_readonly("cooperative", &Device::cooperative)
      .def_readonly("max_cluster", &Device::max_cluster);

  using PlanProblem = ::fusednorm::Problem;
  py::class_<PlanProblem>(m, "Problem")
      .def(py::init([](const Geometry& geometry, int element_size, bool channels_last, bool aligned,
                       const std::string& direction, bool residual, bool mask, bool dresidual,
                       int act) {
             return PlanProblem{
                 geometry, element_size, channels_last, aligned, direction_of(direction),
                 residual, mask,         dresidual,     act};
           }),
           py::arg("geometry"), py::kw_only(), py::arg("element_size"), py::arg("channels_last"),
           py::arg("aligned") = true, py::arg("direction") = "forward", py::arg("residual") = false,
           py::arg("mask") = false, py::arg("dresidual") = false, py::arg("act") = 0)
      .def_readonly("geometry", &PlanProblem::geometry);

  py::class_<Plan>(m, "Plan")
      .def_readonly("path", &Plan::path)
      .def_readonly("tier", &Plan::tier)
      .def_readonly("pattern", &Plan::pattern)
      .def_readonly("vector", &Plan::vector)
      .def_readonly("block", &Plan::block)
      .def_readonly("lanes", &Plan::lanes)
      .def_readonly("combine_block", &Plan::combine_block)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("column_tiles", &Plan::column_tiles)
      .def_readonly("ranges", &Plan::ranges)
      .def_readonly("even", &Plan::even)
      .def_readonly("pieces_per_tile", &Plan::pieces_per_tile)
      .def_readonly("pieces_per_cell", &Plan::pieces_per_cell)
      .def_readonly("cells_per_tile", &Plan::cells_per_tile)
      .def_readonly("tiles_per_cell", &Plan::tiles_per_cell)
      .def_readonly("rows_of_tile", &Plan::rows_of_tile)
      .def_readonly("rows_per_sample", &Plan::rows_per_sample)
      .def_readwrite("splits", &Plan::splits)
      .def_readonly("grid", &Plan::grid)
      .def_readonly("nodes", &Plan::nodes)
      .def_readonly("ctas_per_sm", &Plan::ctas_per_sm)
      .def_readonly("folded", &Plan::folded)
      .def_readonly("fan", &Plan::fan)
      .def_readonly("fans", &Plan::fans)
      .def_readonly("counters", &Plan::counters)
      .def_readonly("cluster", &Plan::cluster)
      .def_readonly("ctas_per_group", &Plan::ctas_per_group)
      .def_readonly("slices", &Plan::slices)
      .def_readonly("jobs", &Plan::jobs)
      .def_readonly("jobs_per_cta", &Plan::jobs_per_cta)
      .def_readonly("slots", &Plan::slots)
      .def_readonly("tensors", &Plan::tensors)
      .def_readonly("shared_bytes", &Plan::shared_bytes)
      .def_property_readonly("blocks", &Plan::blocks)
      .def_property_readonly("rows", &Plan::rows)
      .def_property_readonly("two_levels", &Plan::two_levels);
  m.attr("REGISTERS") = kRegisters;
  m.def("make_plan", py::overload_cast<const PlanProblem&, const Device&>(&make_plan),
        py::arg("problem"), py::arg("device"));
  m.def("plan_streaming", &plan_streaming, py::arg("problem"), py::arg("device"));
  m.def(
      "plan_on_chip",
      [](const PlanProblem& problem, const Device& device) {
        return plan_on_chip(problem, device, plan_streaming(problem, device), kForever);
      },
      py::arg("problem"), py::arg("device"), "The best on-chip plan, streaming if none fits.");
  m.def("workspace_bytes", &workspace_bytes, py::arg("problem"), py::arg("plan"));
  m.def("planned_bytes", &planned_bytes, py::arg("problem"), py::arg("plan"));

  m.def("check_plans", &host::check_plans, py::arg("seed"), py::arg("count"), py::arg("depth"));
  m.def(
      "check_plan",
      [](const PlanProblem& problem, const Device& device, const Plan& plan, int depth,
         uint64_t seed) {
        std::mt19937_64 random(seed);
        host::check_plan({problem, device, plan}, depth, random);
      },
      py::arg("problem"), py::arg("device"), py::arg("plan"), py::arg("depth"), py::arg("seed"));

  m.def("walk", &walk, py::arg("geometry"), py::arg("plan"), py::arg("job"), py::arg("thread"),
        py::arg("limit"), py::arg("back") = false);

  py::class_<Call>(m, "Call").def(py::init(&make_call), py::kw_only(), py::arg("dtype"),
                                  py::arg("channels_last"), py::arg("samples"), py::arg("channels"),
                                  py::arg("spatial"), py::arg("num_groups"), py::arg("per_sample"),
                                  py::arg("device"), py::arg("path") = "streaming",
                                  py::arg("counters") = true, py::arg("max_grid") = kMaxGrid);
  m.def("set_order", &set_order, py::arg("order"), py::arg("seed"));
  m.def("launches", [] { return host::launches; }, "Kernels launched since the module was loaded.");
  m.def("forward", &norm_forward);
  m.def("apply", &norm_apply);
  m.def("backward", &norm_backward);
  m.def("update_running", &norm_update_running);
}
