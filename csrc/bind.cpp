// Everything that Python can see. Pointers, thread counts and sizes arrive as integers: this module
// knows no torch, so one build serves every torch version. Shapes were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "isa.h"

namespace py = pybind11;

namespace convoxel {
namespace {

typedef uintptr_t Pointer;

// (N, C, K, groups, then per axis D, H, W: in, out, kernel, stride, padding, dilation, x_last, y_last)
typedef std::array<int64_t, 24> ConvNumbers;

ConvGeometry geometry(const ConvNumbers& n) {
  ConvGeometry g{n[0], n[1], n[2], n[3], {}, n[22] != 0, n[23] != 0};
  for (int a = 0; a < kAxes; ++a) {
    const int64_t* p = &n[4 + 6 * a];
    g.axis[a] = {p[0], p[1], p[2], p[3], p[4], p[5]};
  }
  return g;
}

// One Python function a kernel, and one for the scratch that it wants.
void bind_conv(py::module_& m, const char* name, ConvFunction (*function)(const Kernels&, int),
               ConvScratch (*scratch)(const Kernels&, int)) {
  m.def(
      name,
      [function](int dtype, const ConvNumbers& numbers, Pointer x, Pointer w, Pointer b, Pointer y, Pointer scratch,
                 int threads) {
        auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
        function(active_isa(), dtype)({geometry(numbers), at(x), at(w), at(b), at(y), at(scratch), threads});
      },
      py::arg("dtype"), py::arg("geometry"), py::arg("x"), py::arg("w"), py::arg("b"), py::arg("y"), py::arg("scratch"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def((std::string(name) + "_scratch").c_str(),
        [scratch](int dtype, const ConvNumbers& numbers, int threads) {
          return scratch(active_isa(), dtype)(geometry(numbers), threads);
        },
        py::arg("dtype"), py::arg("geometry"), py::arg("threads"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "convoxel's kernels: pointers in, numbers out";
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Kernels* k : available_isas()) names.push_back(k->isa);
    return names;
  });
  m.def("isa", [] { return std::string(active_isa().isa); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def(
      "fma_peak", [](int64_t rounds, int threads) { return active_isa().fma_peak(rounds, threads); }, py::arg("rounds"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  bind_conv(
      m, "conv_forward", [](const Kernels& k, int t) { return k.conv_direct[t].forward; },
      [](const Kernels& k, int t) { return k.conv_direct[t].forward_scratch; });
  bind_conv(
      m, "conv_input_grad", [](const Kernels& k, int t) { return k.conv_direct[t].input_grad; },
      [](const Kernels& k, int t) { return k.conv_direct[t].input_grad_scratch; });
  bind_conv(
      m, "conv_weight_grad", [](const Kernels& k, int t) { return k.conv_weight_grad[t].weight_grad; },
      [](const Kernels& k, int t) { return k.conv_weight_grad[t].weight_grad_scratch; });
  bind_conv(
      m, "conv_bias_grad", [](const Kernels& k, int t) { return k.conv_weight_grad[t].bias_grad; },
      [](const Kernels& k, int t) { return k.conv_weight_grad[t].bias_grad_scratch; });
}

}  // namespace convoxel
