// The one pybind11 file: each launcher becomes a Python function of ints (addresses, sizes) and floats; a CUDA error becomes an
// exception. A launcher needs its declaration and a place in LAUNCHERS, both in launchers.h, and nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <cuda_runtime_api.h>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#include "launchers.h"

namespace py = pybind11;

template <class T> struct Python { using type = std::conditional_t<std::is_pointer_v<T>, uintptr_t, T>; };

template <class... A> void bind(py::module_& m, const char* name, int (*launcher)(A...)) {
  m.def(name, [name, launcher](typename Python<A>::type... args) {
    const int code = [&] {
      py::gil_scoped_release others;   // a launch that never returns must not hold up the timer that ends the run
      return launcher(((A)args)...);
    }();
    if (code != 0) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString((cudaError_t)code));
  });
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "CUDA kernels of ect_kernels; see csrc/.";
#define BIND(name) bind(m, #name, name);
  LAUNCHERS(BIND)
  m.def("probe", [] {   // why no kernel can be loaded on the current device, or an empty text
    const int code = probe();
    return code ? "CUDA error " + std::to_string(code) + ", " + cudaGetErrorString((cudaError_t)code) : std::string();
  });
  // (compute capability of each cubin, of each PTX or 0), e.g. [(80, 0), (90, 90)]
  m.def("archs", [] { return std::vector<std::pair<int, int>>{ECT_ARCHS}; });
  m.attr("sources") = ECT_SOURCES;  // a digest of csrc/: another one's launchers may take other arguments
}
