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

// What all pointers of a call have in common.
struct Problem {
  DType dtype;
  bool channels_last;
  Geometry geometry;
  int sms;

  // The plan depends on addresses, so it is made when they are known.
  NormParams planned(NormParams params) const {
    params.dtype = dtype;
    params.geometry = geometry;
    params.plan =
        make_plan(geometry, element_size(dtype), channels_last, host::aligned(params), sms);
    return params;
  }
};

Problem make_problem(const std::string& dtype, bool channels_last, int64_t samples,
                     int64_t channels, int64_t spatial, int64_t num_groups, bool per_sample,
                     int sms) {
  return {dtype_of(dtype), channels_last,
          make_geometry(samples, channels, spatial, num_groups, per_sample), sms};
}

void norm_forward(const Problem& problem, Pointer x, Pointer weight, Pointer bias, Pointer residual,
                  Pointer y, Pointer mean, Pointer rstd, Pointer var, double eps, int act,
                  double slope) {
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
  host::run_forward(problem.planned(p));
}

void norm_apply(const Problem& problem, Pointer x, Pointer mean, Pointer rstd, Pointer weight,
                Pointer bias, Pointer residual, Pointer y, int act, double slope) {
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
  apply(problem.planned(p));
}

void norm_backward(const Problem& problem, Pointer dy, Pointer x, Pointer mean, Pointer rstd,
                   Pointer weight, Pointer bias, Pointer residual, Pointer dx, Pointer dweight,
                   Pointer dbias, Pointer dresidual, double live, int act, double slope) {
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
  host::run_backward(problem.planned(p));
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

// (offset, channel, cell) of the first `limit` elements that a thread of a block visits, without
// touching memory: for shapes of any size. The element type only has to fit the plan's vector.
std::vector<std::array<int64_t, 3>> walk(const Geometry& geometry, const Plan& plan, int64_t block,
                                         unsigned thread, size_t limit) {
  std::vector<std::array<int64_t, 3>> visited;
  const DType dtype = plan.vector == 8   ? DType::kFloat16
                      : plan.vector == 4 ? DType::kFloat32
                                         : DType::kFloat64;
  dispatch_tile(dtype, plan, [&](auto type) {
    using Tile = typename decltype(type)::type;
    host::launch(1, plan.block, [&] {
      if (threadIdx.x != thread) return;
      const Tile tile(geometry, plan, block);
      for (Cursor cursor = tile.cursor(); cursor.more() && visited.size() < limit; cursor.step()) {
        for (int v = 0; v < Tile::kVector; ++v) {
          const int w = v % Tile::kWidth;
          visited.push_back({cursor.offset + v, tile.channel(w), tile.cell(w)});
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
      .value("columns", Pattern::kColumns);
  py::class_<Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("geometry"), py::arg("element_size"),
           py::arg("channels_last"), py::arg("aligned"), py::arg("num_sms"))
      .def_readonly("pattern", &Plan::pattern)
      .def_readonly("vector", &Plan::vector)
      .def_readonly("block", &Plan::block)
      .def_readonly("lanes", &Plan::lanes)
      .def_readonly("combine_block", &Plan::combine_block)
      .def_readonly("tiles", &Plan::tiles)
      .def_readonly("column_tiles", &Plan::column_tiles)
      .def_readonly("ranges", &Plan::ranges)
      .def_readwrite("splits", &Plan::splits)
      .def_readonly("grid", &Plan::grid)
      .def_property_readonly("blocks", &Plan::blocks);
  m.def("forward_workspace_bytes", &forward_workspace_bytes);
  m.def("backward_workspace_bytes", &backward_workspace_bytes);

  m.def("walk", &walk, py::arg("geometry"), py::arg("plan"), py::arg("block"), py::arg("thread"),
        py::arg("limit"));

  py::class_<Problem>(m, "Problem")
      .def(py::init(&make_problem), py::kw_only(), py::arg("dtype"), py::arg("channels_last"),
           py::arg("samples"), py::arg("channels"), py::arg("spatial"), py::arg("num_groups"),
           py::arg("per_sample"), py::arg("sms"));
  m.def("set_order", &set_order, py::arg("order"), py::arg("seed"));
  m.def("launches", [] { return host::launches; }, "Kernels launched since the module was loaded.");
  m.def("forward", &norm_forward);
  m.def("apply", &norm_apply);
  m.def("backward", &norm_backward);
  m.def("update_running", &norm_update_running);
}
