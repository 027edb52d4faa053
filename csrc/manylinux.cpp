// manylinux -- lets _C, compiled on a newer Linux, load with glibc 2.28 and libstdc++ of GCC 8.
//
// Compiled into _C with VMOE_MANYLINUX only. This file defines the functions of newer libraries
// that _C needs. None of these functions is exported. In a manylinux_2_28 container the compiler
// adds these functions itself, so this file is not used there. auditwheel reports functions that
// this file lacks.
#include <dlfcn.h>

#include <new>
#include <sstream>

// Parts of std::stringstream that libstdc++ has had since GCC 9 and GCC 11. Its other parts come
// from the shared library.
template std::stringstream::basic_stringstream();
template std::ostringstream::basic_ostringstream();
template std::string std::stringbuf::str() const&;
template std::string std::stringbuf::str() &&;

namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// The variable is false, so reference counts are always atomic. glibc has had this variable since
// version 2.32.
extern "C" char __libc_single_threaded;
[[gnu::used]] char __libc_single_threaded = 0;

// The linker option --wrap redirects the calls to the functions defined here. .symver names the
// symbol of the oldest glibc.
#ifdef __x86_64__
#define VMOE_OLDEST "GLIBC_2.2.5"
#else
#define VMOE_OLDEST "GLIBC_2.17"
#endif
#define VMOE_WRAP(result, name, parameters, arguments)                                             \
  __asm__(".symver oldest_" #name "," #name "@" VMOE_OLDEST);                                      \
  extern "C" result oldest_##name parameters;                                                      \
  extern "C" [[gnu::used]] result __wrap_##name parameters { return oldest_##name arguments; }

VMOE_WRAP(double, exp, (double x), (x))
VMOE_WRAP(double, log, (double x), (x))
VMOE_WRAP(void*, dlsym, (void* library, const char* name), (library, name))
