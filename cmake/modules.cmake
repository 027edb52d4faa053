# The Python modules _C and _C_cuda.
include(cmake/torch.cmake)
find_package(pybind11 CONFIG REQUIRED)

# Export only the function that Python calls: names of the standard library and of pybind11 must not replace
# the same names in another module.
function(export_init_only module)
  if(APPLE)
    target_link_options(${module} PRIVATE -Wl,-exported_symbol,_PyInit_${module})
  elseif(UNIX)
    set(map "${CMAKE_CURRENT_SOURCE_DIR}/cmake/exports.map")
    target_link_options(${module} PRIVATE "-Wl,--version-script=${map}")
    set_property(TARGET ${module} APPEND PROPERTY LINK_DEPENDS "${map}")
  endif()
endfunction()

# Most of the time to compile a binding is spent in torch's headers.
function(precompile_bindings module)
  target_precompile_headers(${module} PRIVATE csrc/torch/tensor.h)
endfunction()
set_source_files_properties(csrc/ops.cpp csrc/ops_cuda.cpp PROPERTIES SKIP_PRECOMPILE_HEADERS ON)

# CUDA needs a torch with CUDA and a toolkit that compiles C++20. FindCUDAToolkit finds nvcc, because it
# searches more places (CUDA_PATH, /usr/local/cuda) than CMake's search for a compiler.
set(cuda_built OFF)
set(torch_has_cuda OFF)
torch_library(torch_cuda)
if(EXISTS "${torch_cuda}")
  set(torch_has_cuda ON)
endif()
if(torch_has_cuda AND NOT VMOE_CUDA STREQUAL "OFF")
  find_package(CUDAToolkit 12.0 QUIET)
  if(CUDAToolkit_FOUND)
    if(NOT DEFINED ENV{CUDACXX} AND CUDAToolkit_NVCC_EXECUTABLE)
      set(ENV{CUDACXX} "${CUDAToolkit_NVCC_EXECUTABLE}")
    endif()
    include(CheckLanguage)
    check_language(CUDA)
  endif()
  if(CUDAToolkit_FOUND AND CMAKE_CUDA_COMPILER)
    set(cuda_built ON)
  else()
    unset(CMAKE_CUDA_COMPILER CACHE)  # the next configuration searches again
  endif()
endif()
if(VMOE_CUDA STREQUAL "ON" AND NOT cuda_built)
  message(FATAL_ERROR "VMOE_CUDA=ON needs a torch with CUDA (${torch_root} has CUDA: ${torch_has_cuda}) and "
                      "nvcc >= 12.0 with a host compiler that nvcc supports (CUDACXX chooses nvcc)")
endif()

if(cuda_built)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80 90)
    if(CUDAToolkit_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100 120)
    endif()
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA_STANDARD 20)
  list(TRANSFORM OPS REPLACE "(.+)" "csrc/torch/\\1.cpp" OUTPUT_VARIABLE cuda_bindings)
  add_library(core_cuda STATIC ${cuda_sources})
  target_include_directories(core_cuda PUBLIC csrc)
  pybind11_add_module(_C_cuda MODULE csrc/ops_cuda.cpp ${cuda_bindings})
  target_compile_definitions(_C_cuda PRIVATE VMOE_DEVICE_CUDA USE_CUDA)
  # Link libtorch_cuda even if the linker sees no symbol of it in use.
  target_link_options(_C_cuda PRIVATE -Wl,--no-as-needed)
  target_link_libraries(_C_cuda PRIVATE core_cuda torch_stable
    "${torch_cuda}" CUDA::cudart_static)
  precompile_bindings(_C_cuda)
  export_init_only(_C_cuda)
  install(TARGETS _C_cuda DESTINATION vmoe_routers)
  message(STATUS "vmoe_routers: CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}")
else()
  set(CMAKE_CUDA_ARCHITECTURES "")  # no CUDA kernel is compiled
  message(STATUS "vmoe_routers: CPU only (VMOE_CUDA=${VMOE_CUDA})")
endif()

list(TRANSFORM OPS REPLACE "(.+)" "csrc/torch/\\1.cpp" OUTPUT_VARIABLE cpu_bindings)
# GCC puts random names into objects for link-time optimization, unless it gets a seed for each source.
foreach(source IN ITEMS csrc/ops.cpp csrc/ops_cuda.cpp "${CMAKE_SOURCE_DIR}/csrc/common/isa.cpp" LISTS cpu_bindings)
  cmake_path(GET source FILENAME seed)
  set_property(SOURCE ${source} APPEND PROPERTY COMPILE_OPTIONS $<$<CXX_COMPILER_ID:GNU>:-frandom-seed=${seed}>)
endforeach()
pybind11_add_module(_C MODULE csrc/ops.cpp ${cpu_bindings})
list(JOIN CMAKE_CUDA_ARCHITECTURES " " cuda_architectures)
target_compile_definitions(_C PRIVATE
  VMOE_CUDA_BUILT=$<IF:$<BOOL:${cuda_built}>,true,false>
  "VMOE_CUDA_ARCHITECTURES=\"${cuda_architectures}\"")
target_link_libraries(_C PRIVATE core torch_stable)
precompile_bindings(_C)
export_init_only(_C)
if(CMAKE_COMPILE_WARNING_AS_ERROR)
  target_link_options(_C PRIVATE -Werror)  # warnings of the link-time optimization become errors
endif()
option(VMOE_MANYLINUX "Let _C load with glibc 2.28 and libstdc++ of GCC 8 (csrc/manylinux.cpp)" OFF)
if(VMOE_MANYLINUX)
  add_library(manylinux OBJECT csrc/manylinux.cpp)  # without the link-time optimization of _C
  target_sources(_C PRIVATE $<TARGET_OBJECTS:manylinux>)
  target_link_options(_C PRIVATE -Wl,--wrap=exp,--wrap=log,--wrap=dlsym)
endif()
install(TARGETS _C DESTINATION vmoe_routers)
