include_guard(GLOBAL)
# The modules use torch's stable ABI: headers and two libraries. torch's own CMake package is not used, because it
# requires a CUDA toolkit if torch has CUDA.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  OUTPUT_VARIABLE torch_root ERROR_VARIABLE torch_missing RESULT_VARIABLE torch_code OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_code EQUAL 0)
  message(FATAL_ERROR "${torch_missing}")
endif()

# Sets the variable `name` to the path of a library of torch, in the form that the linker needs.
function(torch_library name)
  if(WIN32)
    set(file "${name}.lib")
  else()
    set(file "lib${name}${CMAKE_SHARED_LIBRARY_SUFFIX}")
  endif()
  set(${name} "${torch_root}/lib/${file}" PARENT_SCOPE)
endfunction()
torch_library(torch_cpu)

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE
  "${torch_root}/include" "${torch_root}/include/torch/csrc/api/include")
# With the stable ABI of 2.11, one binary serves torch 2.11 and every later version.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
target_compile_options(torch_stable INTERFACE "-ffile-prefix-map=${torch_root}/include/=")
target_link_libraries(torch_stable INTERFACE "${torch_cpu}")
