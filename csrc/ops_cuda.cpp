// ops_cuda -- the Python module _C_cuda. It is apart from _C because it links
// libtorch_cuda, which a CPU-only torch has not: imported where torch has CUDA.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "Registers the CUDA kernels of vmoe_routers with torch's dispatcher.";
}
