// optima_fast._bandit: the arithmetic of the policies that have some. optima_fast/bandit has a file
// of the same name for each header here; it names the policies, checks settings, documents the
// formulas, and does the same in Python, step by step and bit by bit.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "generator.h"
#include "scale_free.h"
#include "structured.h"
#include "thompson.h"

PYBIND11_MODULE(_bandit, m) {
  using namespace optima_fast;
  using namespace pybind11::literals;
  using Seed = std::uint64_t;

  m.doc() = "C++ implementation of the policies of optima_fast.bandit.";
  m.attr("ABI") = 4;  // bandit/core.py refuses a stale build of another number
  m.def("philox4x32", &philox4x32, "counter"_a, "key"_a, "Philox4x32-10 block.");
  m.def("uniform", &uniform, "seed"_a, "index"_a, "lane"_a, "stream"_a,
        "Odd multiple of 2**-53 in (0, 1).");
  m.def("logarithm", &logarithm, "x"_a, "log x, 0 < x.");
  m.def("normal_quantile", &normal_quantile, "p"_a, "Inverse of the normal CDF, 0 < p < 1.");

  py::class_<Core>(m, "Core", "What every policy can do.")
      .def("select", &Core::select, "Index of the arm to pull next.")
      .def("update", &Core::update, "arm"_a, "reward"_a, "Record a finite reward of an arm.")
      .def("state", &Core::state, "Everything update changes.")
      .def("restore", &Core::restore, "state"_a, "Take over a checked state.")
      .def_property_readonly("round", &Core::round)
      .def_property_readonly("count", py::overload_cast<>(&Core::count, py::const_))
      .def_property_readonly("mean", &Core::mean)
      .def_property_readonly("spread", &Core::spread)
      .def_property_readonly("warm_up", &Core::warm_up);
  py::class_<ThompsonCore, Core>(m, "ThompsonCore")
      .def(py::init<std::size_t, double, std::size_t, double, Seed>(), "arms"_a, "gamma"_a,
           "init_rounds"_a, "variance_scale"_a, "seed"_a);
  py::class_<ScaleFreeUcbCore, Core>(m, "ScaleFreeUcbCore")
      .def(py::init<std::size_t, double, double, double, double, std::size_t, std::size_t, Seed>(),
           "arms"_a, "gamma"_a, "width"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a,
           "seed"_a);
  py::class_<StructuredUcbCore, Core>(m, "StructuredUcbCore")
      .def(py::init<std::vector<Numbers>, double, double, double, double, std::size_t, std::size_t,
                    Seed>(),
           "features"_a, "gamma"_a, "width"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a,
           "seed"_a);
}
