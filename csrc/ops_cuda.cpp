// ops_cuda -- the Python module _C_cuda. _C_cuda is separate from _C because it links
// libtorch_cuda, which a CPU-only torch lacks. _C_cuda is imported only if torch has CUDA.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Registers the CUDA kernels of vmoe_routers with torch's dispatcher.";
}
