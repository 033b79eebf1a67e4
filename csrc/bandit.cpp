// optima_fast._bandit: the arithmetic of the bandit policies. optima_fast/bandit/_cores is the
// same in Python, step by step and bit by bit; optima_fast/bandit names policies, checks settings
// and documents the formulas.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "averaging.h"
#include "generator.h"
#include "scale_free.h"
#include "structured.h"

PYBIND11_MODULE(_bandit, m) {
  using namespace optima_fast;
  using namespace pybind11::literals;
  using Seed = std::uint64_t;

  m.doc() = "C++ implementation of the policies of optima_fast.bandit.";
  m.attr("ABI") = 3;  // bandit/backend.py refuses a stale build of another number
  m.def("philox4x32", &philox4x32, "counter"_a, "key"_a, "Philox4x32-10 block.");
  m.def("uniform", &uniform, "seed"_a, "index"_a, "lane"_a, "stream"_a,
        "Odd multiple of 2**-53 in (0, 1).");
  m.def("logarithm", &logarithm, "x"_a, "log x, 0 < x.");
  m.def("exponential", &exponential, "x"_a, "e**x, -700 <= x <= 700.");
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
  py::class_<GaussianThompson, Core>(m, "GaussianThompson")
      .def(py::init<std::size_t, double, std::size_t, double, Seed>(), "arms"_a, "gamma"_a,
           "init_rounds"_a, "variance_scale"_a, "seed"_a);
  py::class_<Random, Core>(m, "Random").def(py::init<std::size_t, Seed>(), "arms"_a, "seed"_a);
  py::class_<Fixed, Core>(m, "Fixed")
      .def(py::init<std::size_t, std::size_t>(), "arms"_a, "arm"_a);
  py::class_<RoundRobin, Core>(m, "RoundRobin").def(py::init<std::size_t>(), "arms"_a);
  py::class_<Exp3S, Core>(m, "Exp3S")
      .def(py::init<std::size_t, double, double, Seed>(), "arms"_a, "mix"_a, "share"_a, "seed"_a);
  py::class_<ScaleFreeThompson, Core>(m, "ScaleFreeThompson")
      .def(py::init<std::size_t, double, double, double, double, std::size_t, std::size_t, Seed>(),
           "arms"_a, "gamma"_a, "width"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a,
           "seed"_a);
  py::class_<ScaleFreeUcb, Core>(m, "ScaleFreeUcb")
      .def(py::init<std::size_t, double, double, double, double, std::size_t, std::size_t, Seed>(),
           "arms"_a, "gamma"_a, "width"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a,
           "seed"_a);
  py::class_<SlidingWindowUcb, Core>(m, "SlidingWindowUcb")
      .def(py::init<std::size_t, std::size_t, double, double, std::size_t, std::size_t, Seed>(),
           "arms"_a, "window"_a, "width"_a, "prior"_a, "passes"_a, "warm_up"_a, "seed"_a);
  py::class_<EpsilonGreedy, Core>(m, "EpsilonGreedy")
      .def(py::init<std::size_t, double, double, double, double, std::size_t, std::size_t, Seed>(),
           "arms"_a, "epsilon"_a, "gamma"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a, "seed"_a);
  py::class_<DiscountBank, Core>(m, "DiscountBank")
      .def(py::init<std::size_t, Numbers, double, double, double, double, std::size_t, std::size_t,
                    Seed>(),
           "arms"_a, "gammas"_a, "width"_a, "prior"_a, "trend"_a, "forget"_a, "passes"_a,
           "warm_up"_a, "seed"_a);
  py::class_<StructuredUcb, Core>(m, "StructuredUcb")
      .def(py::init<std::vector<Numbers>, double, double, double, double, std::size_t, std::size_t,
                    Seed>(),
           "features"_a, "gamma"_a, "width"_a, "prior"_a, "trend"_a, "passes"_a, "warm_up"_a,
           "seed"_a);
}
