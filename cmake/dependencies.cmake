# Each dependency and the room that needs it: docs in CONTRIBUTING.md.
find_package(Threads REQUIRED)
find_package(hwy REQUIRED)
find_package(nlohmann_json 3.10 REQUIRED)
find_package(CLI11 REQUIRED)
find_path(KRAIT_TOMLPLUSPLUS toml++/toml.h REQUIRED) # used as headers alone
find_package(PkgConfig REQUIRED)
pkg_check_modules(pcre2 REQUIRED IMPORTED_TARGET libpcre2-8)
pkg_check_modules(utf8proc REQUIRED IMPORTED_TARGET libutf8proc)
pkg_check_modules(curl REQUIRED IMPORTED_TARGET libcurl)
pkg_check_modules(crypto REQUIRED IMPORTED_TARGET libcrypto)
if(KRAIT_ONEDNN)
  find_package(dnnl REQUIRED)
  find_package(OpenMP REQUIRED COMPONENTS CXX) # to tell oneDNN how many threads to use
endif()
if(KRAIT_PYTHON)
  find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)
  execute_process(COMMAND ${Python_EXECUTABLE} -m tvm_ffi.config --cmakedir OUTPUT_VARIABLE tvm_ffi_ROOT
                  OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
  if(failed)
    message(FATAL_ERROR "KRAIT_PYTHON needs apache-tvm-ffi, which ${Python_EXECUTABLE} has not: install it "
                        "(pip install apache-tvm-ffi), or set Python_EXECUTABLE to a Python that has it")
  endif()
  find_package(tvm_ffi CONFIG REQUIRED)
endif()
if(KRAIT_TESTS)
  find_package(GTest REQUIRED)
endif()
if(KRAIT_BENCH)
  find_package(benchmark REQUIRED)
endif()

# Flags of everything that is ours.
add_library(krait_flags INTERFACE)
set(cxx_warnings -Wall -Wextra -Wshadow -Wconversion -Wno-sign-conversion
    -Wnon-virtual-dtor -Wold-style-cast
    -Wno-missing-field-initializers  # designated initialisers leave out what is not given
    -Werror)
target_compile_options(krait_flags INTERFACE $<$<COMPILE_LANGUAGE:CXX>:${cxx_warnings}>)
# GCC 12 and 13 report false positives of these from inlined library code at -O3.
target_compile_options(krait_flags INTERFACE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized -Wno-array-bounds -Wno-stringop-overflow -Wno-restrict>)
# Lines for profilers cost nothing at run time.
target_compile_options(krait_flags INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-lineinfo --expt-relaxed-constexpr -Werror all-warnings -Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers>")
# HIP's kernels are the same sources under other names (src/core/cuda/gpu_hip.h).
target_compile_definitions(krait_flags INTERFACE
  KRAIT_WITH_CUDA=$<OR:$<BOOL:${KRAIT_WITH_CUDA}>,$<BOOL:${KRAIT_WITH_HIP}>>)
if(KRAIT_WITH_HIP)
  target_include_directories(krait_flags SYSTEM INTERFACE ${KRAIT_HIP_INCLUDE})
endif()
target_include_directories(krait_flags INTERFACE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
target_link_libraries(krait_flags INTERFACE Threads::Threads)

# Highway: SSE4, AVX2, AVX-512 (or NEON) and a portable baseline from each SIMD source. Left out are targets that
# give nothing over these, and ARM's vectors of unknown length, of which there can be no arrays.
add_library(krait_simd INTERFACE)
target_link_libraries(krait_simd INTERFACE hwy::hwy)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm")
  set(without "HWY_SVE|HWY_SVE2|HWY_SVE_256|HWY_SVE2_128")
elseif(KRAIT_SHORT_BUILD)
  set(without "HWY_SSSE3|HWY_SSE4|HWY_AVX3|HWY_AVX3_DL")
else()
  set(without "HWY_SSSE3|HWY_AVX3_DL")
endif()
target_compile_definitions(krait_simd INTERFACE "HWY_DISABLED_TARGETS=(${without})")
