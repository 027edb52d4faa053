include_guard(GLOBAL)
# torch's stable ABI: headers and two libraries. torch's own CMake package is not used, because it
# requires a CUDA toolkit if torch has CUDA.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_root OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
if(NOT EXISTS "${torch_root}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "vmoe_routers needs torch >= 2.11 to build, and found "
                      "'${torch_root}': pip install 'torch>=2.11', or build with isolation")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE
  "${torch_root}/include" "${torch_root}/include/torch/csrc/api/include")
# With the stable ABI of 2.11, one binary serves torch 2.11 and every later version.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_compile_options(torch_stable INTERFACE "-ffile-prefix-map=${torch_root}/include/=")
target_link_libraries(torch_stable INTERFACE "${torch_root}/lib/libtorch_cpu.so")
