// Everything that Python can see. Pointers, thread counts and sizes arrive as integers: this module
// knows no torch, so one build serves every torch version. Shapes were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace py = pybind11;

namespace convoxel {
namespace {

typedef uintptr_t Pointer;

// (N, C, K, groups, then per axis D, H, W: in, out, kernel, stride, padding, dilation, then x_last, y_last, the
// channels of x's parts, w_last, w_float, the algorithm, a tile's extents)
typedef std::array<int64_t, 34> ConvNumbers;

ConvGeometry geometry(const ConvNumbers& n) {
  ConvGeometry g{n[0], n[1], n[2], n[3], {}, n[22] != 0, n[23] != 0, {}, n[28] != 0, n[29] != 0, ConvAlgorithm(n[30]),
                 {}};
  for (int i = 0; i < kMostParts; ++i) g.parts[i] = n[24 + i];
  for (int a = 0; a < kAxes; ++a) {
    const int64_t* p = &n[4 + 6 * a];
    g.axis[a] = {p[0], p[1], p[2], p[3], p[4], p[5]}, g.tile[a] = int(n[31 + a]);
  }
  return g;
}

// The one that the algorithm has for this dtype on this ISA.
template <class F>
F kernel(F function) {
  if (!function)
    throw std::invalid_argument(std::string("conv: the ISA ") + active_isa().isa +
                                " has no such algorithm for this dtype: call again with the route of this ISA");
  return function;
}

// x, or its parts.
ConvCall conv_call(const ConvNumbers& numbers, const std::vector<Pointer>& x, Pointer w, Pointer b, Pointer y,
                   Pointer scratch, int threads) {
  auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
  ConvCall call{geometry(numbers), {}, at(w), at(b), at(y), at(scratch), threads};
  for (size_t i = 0; i < x.size() && i < size_t(kMostParts); ++i) call.x[i] = at(x[i]);
  return call;
}

// One Python function a kernel, and one for the scratch that it wants.
void bind_conv(py::module_& m, const char* name, ConvFunction (*function)(const ConvGeometry&, int),
               ConvScratch (*scratch)(const ConvGeometry&, int)) {
  m.def(
      name,
      [function](int dtype, const ConvNumbers& numbers, const std::vector<Pointer>& x, Pointer w, Pointer b, Pointer y,
                 Pointer scratch, int threads) {
        ConvCall call = conv_call(numbers, x, w, b, y, scratch, threads);
        kernel(function(call.g, dtype))(call);
      },
      py::arg("dtype"), py::arg("geometry"), py::arg("x"), py::arg("w"), py::arg("b"), py::arg("y"), py::arg("scratch"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def((std::string(name) + "_scratch").c_str(),
        [scratch](int dtype, const ConvNumbers& numbers, int threads) {
          ConvGeometry g = geometry(numbers);
          return kernel(scratch(g, dtype))(g, threads);
        },
        py::arg("dtype"), py::arg("geometry"), py::arg("threads"));
}

const ConvCorrelate& correlate(const ConvGeometry& g, int dtype) {
  const Kernels& k = active_isa();
  const ConvCorrelate* of[] = {k.conv_direct,  k.conv_winograd, k.conv_depthwise,
                               k.conv_columns, k.conv_amx,      k.conv_voxels};
  return of[g.algorithm][dtype];
}

const ConvKernel& weight_grad(const ConvGeometry& g, int dtype) {
  const Kernels& k = active_isa();
  const ConvKernel* of[] = {k.conv_weight_grad, k.conv_winograd_weight, k.conv_depthwise_weight, k.conv_columns_weight,
                            k.conv_amx_weight};
  return of[g.algorithm][dtype];
}

// With slots for the moments of y. `conv_forward_slots`: of an image; 0 where the algorithm gathers none.
void bind_conv_moments(py::module_& m) {
  m.def(
      "conv_forward_moments",
      [](int dtype, const ConvNumbers& numbers, const std::vector<Pointer>& x, Pointer w, Pointer b, Pointer y,
         Pointer moments, Pointer scratch, int threads) {
        ConvCall call = conv_call(numbers, x, w, b, y, scratch, threads);
        call.moments = reinterpret_cast<double*>(moments);
        kernel(correlate(call.g, dtype).forward)(call);
      },
      py::arg("dtype"), py::arg("geometry"), py::arg("x"), py::arg("w"), py::arg("b"), py::arg("y"), py::arg("moments"),
      py::arg("scratch"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "conv_forward_slots",
      [](int dtype, const ConvNumbers& numbers) {
        ConvGeometry g = geometry(numbers);
        ConvSlots slots = correlate(g, dtype).slots;
        return slots ? slots(g) : int64_t(0);
      },
      py::arg("dtype"), py::arg("geometry"));
}

// (N, K, P, groups, over_batch, last)
void bind_moments(py::module_& m) {
  typedef std::array<int64_t, 6> Numbers;
  auto call = [](const Numbers& n, int threads) {
    MomentsCall c{};
    c.N = n[0], c.K = n[1], c.P = n[2], c.groups = n[3], c.over_batch = n[4], c.last = n[5], c.threads = threads;
    return c;
  };
  m.def(
      "moments_slots",
      [call](int dtype, const Numbers& numbers) { return active_isa().moments[dtype].of_image(call(numbers, 1)); },
      py::arg("dtype"), py::arg("numbers"));
  m.def(
      "moments_scratch",
      [call](int dtype, const Numbers& numbers, int threads) {
        return active_isa().moments[dtype].scratch(call(numbers, threads));
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("threads"));
  m.def(
      "gather_moments",
      [call](int dtype, const Numbers& numbers, Pointer y, Pointer slots, Pointer scratch, int threads) {
        MomentsCall c = call(numbers, threads);
        c.y = reinterpret_cast<void*>(y), c.slots = reinterpret_cast<double*>(slots);
        c.scratch = reinterpret_cast<void*>(scratch);
        active_isa().moments[dtype].gather(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("y"), py::arg("slots"), py::arg("scratch"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "combine_moments",
      [call](int dtype, const Numbers& numbers, Pointer slots, int64_t of_image, Pointer mean, Pointer var,
             int threads) {
        MomentsCall c = call(numbers, threads);
        c.slots = reinterpret_cast<double*>(slots), c.of_image = of_image;
        c.mean = reinterpret_cast<double*>(mean), c.var = reinterpret_cast<double*>(var);
        return active_isa().moments[dtype].combine(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("slots"), py::arg("of_image"), py::arg("mean"), py::arg("var"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_resample(py::module_& m) {
  py::class_<ResampleGeometry>(m, "ResampleGeometry")
      .def(py::init([](int64_t images, int64_t inner, int mode, bool align_corners, std::array<int64_t, kAxes> in,
                       std::array<int64_t, kAxes> out, std::array<double, kAxes> scale) {
             ResampleGeometry g{images, inner, mode, align_corners, {}};
             for (int a = 0; a < kAxes; ++a) g.axis[a] = {in[a], out[a], scale[a]};
             return g;
           }),
           py::arg("images"), py::arg("inner"), py::arg("mode"), py::arg("align_corners"), py::arg("in_size"),
           py::arg("out_size"), py::arg("scale"));
  m.def(
      "resample_scratch",
      [](int dtype, const ResampleGeometry& g, bool adjoint, int threads) {
        const Resample& r = active_isa().resample[dtype];
        return (adjoint ? r.input_grad_scratch : r.forward_scratch)(g, threads);
      },
      py::arg("dtype"), py::arg("geometry"), py::arg("adjoint"), py::arg("threads"));
  m.def(
      "resample",
      [](int dtype, const ResampleGeometry& g, bool adjoint, Pointer src, Pointer dst, Pointer scratch, int threads) {
        auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
        const Resample& r = active_isa().resample[dtype];
        (adjoint ? r.input_grad : r.forward)({g, at(src), at(dst), at(scratch), threads});
      },
      py::arg("dtype"), py::arg("geometry"), py::arg("adjoint"), py::arg("src"), py::arg("dst"), py::arg("scratch"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

// (N, C, P, groups, over_batch, fixed, last)
NormCall norm_call(const std::array<int64_t, 7>& n, double eps, int threads) {
  NormCall c{};
  c.N = n[0], c.C = n[1], c.P = n[2], c.groups = n[3];
  c.over_batch = n[4], c.fixed = n[5], c.last = n[6], c.eps = eps, c.threads = threads;
  return c;
}

void bind_norm(py::module_& m) {
  typedef std::array<int64_t, 7> Numbers;
  auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
  m.def(
      "norm_scratch",
      [](int dtype, const Numbers& numbers, int threads) {
        return active_isa().norm[dtype].scratch(norm_call(numbers, 0, threads));
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("threads"));
  m.def(
      "norm",
      [at](int dtype, const Numbers& numbers, double eps, Pointer x, Pointer w, Pointer b, Pointer y, Pointer mean,
           Pointer var, Pointer scratch, int threads) {
        NormCall c = norm_call(numbers, eps, threads);
        c.x = at(x), c.w = at(w), c.b = at(b), c.y = at(y), c.scratch = at(scratch);
        c.mean = static_cast<double*>(at(mean)), c.var = static_cast<double*>(at(var));
        active_isa().norm[dtype].forward(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("eps"), py::arg("x"), py::arg("w"), py::arg("b"), py::arg("y"),
      py::arg("mean"), py::arg("var"), py::arg("scratch"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "norm_backward",
      [at](int dtype, const Numbers& numbers, double eps, Pointer dy, Pointer x, Pointer w, Pointer mean, Pointer var,
           Pointer dx, Pointer dw, Pointer db, Pointer scratch, int threads) {
        NormCall c = norm_call(numbers, eps, threads);
        c.dy = at(dy), c.x = at(x), c.w = at(w), c.dx = at(dx), c.dw = at(dw), c.db = at(db), c.scratch = at(scratch);
        c.mean = static_cast<double*>(at(mean)), c.var = static_cast<double*>(at(var));
        active_isa().norm[dtype].backward(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("eps"), py::arg("dy"), py::arg("x"), py::arg("w"), py::arg("mean"),
      py::arg("var"), py::arg("dx"), py::arg("dw"), py::arg("db"), py::arg("scratch"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
}

NormActCall norm_act_call(const std::array<int64_t, 7>& n, double eps, int threads) {
  NormActCall c{};
  static_cast<NormCall&>(c) = norm_call(n, eps, threads);
  return c;
}

void bind_norm_act(py::module_& m) {
  typedef std::array<int64_t, 7> Numbers;
  auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
  m.def(
      "norm_act_scratch",
      [](int dtype, const Numbers& numbers, int threads) {
        return active_isa().norm_act[dtype].scratch(norm_act_call(numbers, 0, threads));
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("threads"));
  m.def(
      "norm_act",
      [at](int dtype, const Numbers& numbers, double eps, int kind, double alpha, Pointer x, Pointer w, Pointer b,
           Pointer slopes, Pointer residual, Pointer y, Pointer mean, Pointer var, Pointer scratch, int threads) {
        NormActCall c = norm_act_call(numbers, eps, threads);
        c.kind = kind, c.alpha = alpha, c.x = at(x), c.w = at(w), c.b = at(b), c.slopes = at(slopes);
        c.residual = at(residual), c.y = at(y), c.scratch = at(scratch);
        c.mean = static_cast<double*>(at(mean)), c.var = static_cast<double*>(at(var));
        active_isa().norm_act[dtype].forward(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("eps"), py::arg("kind"), py::arg("alpha"), py::arg("x"),
      py::arg("w"), py::arg("b"), py::arg("slopes"), py::arg("residual"), py::arg("y"), py::arg("mean"), py::arg("var"),
      py::arg("scratch"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "norm_act_backward",
      [at](int dtype, const Numbers& numbers, double eps, int kind, double alpha, Pointer dy, Pointer x, Pointer w,
           Pointer b, Pointer slopes, Pointer residual, Pointer mean, Pointer var, Pointer dx, Pointer dw, Pointer db,
           Pointer dslopes, Pointer dresidual, Pointer scratch, int threads) {
        NormActCall c = norm_act_call(numbers, eps, threads);
        c.kind = kind, c.alpha = alpha, c.dy = at(dy), c.x = at(x), c.w = at(w), c.b = at(b);
        c.slopes = at(slopes), c.residual = at(residual), c.dx = at(dx), c.dw = at(dw), c.db = at(db);
        c.dslopes = at(dslopes), c.dresidual = at(dresidual), c.scratch = at(scratch);
        c.mean = static_cast<double*>(at(mean)), c.var = static_cast<double*>(at(var));
        active_isa().norm_act[dtype].backward(c);
      },
      py::arg("dtype"), py::arg("numbers"), py::arg("eps"), py::arg("kind"), py::arg("alpha"), py::arg("dy"),
      py::arg("x"), py::arg("w"), py::arg("b"), py::arg("slopes"), py::arg("residual"), py::arg("mean"), py::arg("var"),
      py::arg("dx"), py::arg("dw"), py::arg("db"), py::arg("dslopes"), py::arg("dresidual"), py::arg("scratch"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_activation(py::module_& m) {
  auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
  m.def(
      "activation",
      [at](int dtype, int64_t n, bool relu, double slope, Pointer x, Pointer y, int threads) {
        active_isa().activation[dtype].forward({n, relu, slope, at(x), nullptr, at(y), threads});
      },
      py::arg("dtype"), py::arg("n"), py::arg("relu"), py::arg("slope"), py::arg("x"), py::arg("y"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "activation_backward",
      [at](int dtype, int64_t n, bool relu, double slope, Pointer dy, Pointer x, Pointer dx, int threads) {
        active_isa().activation[dtype].backward({n, relu, slope, at(x), at(dy), at(dx), threads});
      },
      py::arg("dtype"), py::arg("n"), py::arg("relu"), py::arg("slope"), py::arg("dy"), py::arg("x"), py::arg("dx"),
      py::arg("threads"), py::call_guard<py::gil_scoped_release>());
}

void bind_cat(py::module_& m) {
  m.def(
      "cat",
      [](const std::vector<Pointer>& parts, const std::vector<int64_t>& bytes, int64_t rows, Pointer whole, bool split,
         int threads) {
        auto* at = reinterpret_cast<void* const*>(parts.data());
        active_isa().concatenate(
            {rows, int64_t(parts.size()), at, bytes.data(), reinterpret_cast<void*>(whole), split, threads});
      },
      py::arg("parts"), py::arg("bytes"), py::arg("rows"), py::arg("whole"), py::arg("split"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
}

// (N, C, then per axis D, H, W: in, out, kernel, stride, padding, dilation, then the rest of PoolCall's numbers)
typedef std::array<int64_t, 25> PoolNumbers;

PoolCall pool_call(const PoolNumbers& n) {
  PoolCall c{};
  c.N = n[0], c.C = n[1];
  for (int a = 0; a < kAxes; ++a) {
    const int64_t* p = &n[2 + 6 * a];
    c.axis[a] = {p[0], p[1], p[2], p[3], p[4], p[5]};
  }
  c.adaptive = n[20], c.last = n[21], c.wide = n[22], c.count_padding = n[23], c.divisor = n[24];
  return c;
}

void bind_pool(py::module_& m) {
  m.def(
      "pool_scratch", [](const PoolNumbers& numbers) { return active_isa().max_pool->scratch(pool_call(numbers)); },
      py::arg("geometry"));
  auto bind = [&m](const char* name, PoolFunction (*function)(const Kernels&, int)) {
    m.def(
        name,
        [function](int dtype, const PoolNumbers& numbers, Pointer x, Pointer y, Pointer codes, Pointer scratch,
                   int threads) {
          auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
          PoolCall call = pool_call(numbers);
          call.x = at(x), call.y = at(y), call.codes = at(codes), call.scratch = at(scratch), call.threads = threads;
          function(active_isa(), dtype)(call);
        },
        py::arg("dtype"), py::arg("geometry"), py::arg("x"), py::arg("y"), py::arg("codes"), py::arg("scratch"),
        py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  };
  bind("max_pool", [](const Kernels& k, int t) { return k.max_pool[t].forward; });
  bind("max_pool_input_grad", [](const Kernels& k, int t) { return k.max_pool[t].input_grad; });
  bind("max_pool_pick", [](const Kernels& k, int t) { return k.max_pool[t].pick; });
  bind("max_pool_indices", [](const Kernels& k, int t) { return k.max_pool[t].indices; });
  bind("avg_pool", [](const Kernels& k, int t) { return k.avg_pool[t].forward; });
  bind("avg_pool_input_grad", [](const Kernels& k, int t) { return k.avg_pool[t].input_grad; });
}

// rows, between, low, high, t, values: addresses of arrays, as ScoreOutput and its neighbours have them.
void bind_scores(py::module_& m) {
  typedef std::array<int64_t, kAxes> Axes;
  auto floats = [](Pointer p) { return reinterpret_cast<float*>(p); };
  auto rows_at = [](Pointer p) { return reinterpret_cast<float* const*>(p); };
  m.def(
      "score_add",
      [=](int64_t W, int64_t K, Axes extent, Axes stride, int64_t first, Pointer y, Pointer weights, Pointer rows,
          int threads) {
        ScoreAdd c{W, K, {}, {}, first, floats(y), floats(weights), rows_at(rows), threads};
        for (int a = 0; a < kAxes; ++a) c.extent[a] = extent[a], c.stride[a] = stride[a];
        active_isa().scores->add(c);
      },
      py::arg("W"), py::arg("K"), py::arg("extent"), py::arg("stride"), py::arg("first"), py::arg("y"),
      py::arg("weights"), py::arg("rows"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "score_divide",
      [=](int64_t W, int64_t K, int64_t count, Pointer rows, int threads) {
        return active_isa().scores->divide({W, K, count, rows_at(rows), threads});
      },
      py::arg("W"), py::arg("K"), py::arg("count"), py::arg("rows"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());
  m.def(
      "score_output",
      [=](int64_t W, int64_t K, int64_t count, int64_t width, Pointer rows, Pointer between, Pointer low, Pointer high,
          Pointer t, Pointer values, int kind, bool wide, Pointer y, Pointer scratch, int threads) {
        auto sizes = [](Pointer p) { return reinterpret_cast<const int64_t*>(p); };
        active_isa().scores->output({W, K, count, width, rows_at(rows), floats(between), sizes(low), sizes(high),
                                     floats(t), reinterpret_cast<const int32_t*>(values), kind, wide,
                                     reinterpret_cast<void*>(y), floats(scratch), threads});
      },
      py::arg("W"), py::arg("K"), py::arg("count"), py::arg("width"), py::arg("rows"), py::arg("between"),
      py::arg("low"), py::arg("high"), py::arg("t"), py::arg("values"), py::arg("kind"), py::arg("wide"), py::arg("y"),
      py::arg("scratch"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "score_output_scratch",
      [](int64_t W, int64_t K, int threads) { return active_isa().scores->output_scratch(W, K, threads); },
      py::arg("W"), py::arg("K"), py::arg("threads"));
}

// A tensor as a DLPack capsule; one that nobody consumed gives its block back itself.
py::capsule new_capsule(int code, int bits, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  DLManagedTensor* tensor;
  {
    py::gil_scoped_release release;
    tensor = new_tensor({uint8_t(code), uint8_t(bits), 1}, shape, strides);
  }
  return py::capsule(tensor, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* t = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    t->deleter(t);
  });
}

void bind_memory(py::module_& m) {
  m.def("new_tensor", &new_capsule, py::arg("code"), py::arg("bits"), py::arg("shape"), py::arg("strides"));
  m.def("release_memory", &release_memory, py::call_guard<py::gil_scoped_release>());
  m.def("set_memory_limit", &set_memory_limit, py::arg("bytes"), py::call_guard<py::gil_scoped_release>());
  m.def("memory_statistics", [] {
    MemoryStatistics s = memory_statistics();
    return std::map<std::string, int64_t>{
        {"in_use", s.in_use},           {"held", s.held},    {"peak", s.peak}, {"limit", s.limit},
        {"allocations", s.allocations}, {"reused", s.reused}};
  });
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
      m, "conv_forward", [](const ConvGeometry& g, int t) { return correlate(g, t).forward; },
      [](const ConvGeometry& g, int t) { return correlate(g, t).forward_scratch; });
  bind_conv(
      m, "conv_input_grad", [](const ConvGeometry& g, int t) { return correlate(g, t).input_grad; },
      [](const ConvGeometry& g, int t) { return correlate(g, t).input_grad_scratch; });
  bind_conv(
      m, "conv_weight_grad", [](const ConvGeometry& g, int t) { return weight_grad(g, t).run; },
      [](const ConvGeometry& g, int t) { return weight_grad(g, t).scratch; });
  bind_conv(
      m, "conv_bias_grad", [](const ConvGeometry&, int t) { return active_isa().conv_bias_grad[t].run; },
      [](const ConvGeometry&, int t) { return active_isa().conv_bias_grad[t].scratch; });
  bind_conv_moments(m);
  bind_moments(m);
  bind_norm(m);
  bind_norm_act(m);
  bind_activation(m);
  bind_resample(m);
  bind_pool(m);
  bind_cat(m);
  bind_scores(m);
  bind_memory(m);
}

}  // namespace convoxel
