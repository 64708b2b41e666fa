# HIP: KRAIT_HIP is ON (hipcc required; CUDA is left out then) or OFF. Sets KRAIT_WITH_HIP.
option(KRAIT_HIP "Kernels for AMD GPUs, compiled by hipcc in place of those for NVIDIA's" OFF)
set(architectures "gfx90a")
if(DEFINED ENV{KRAIT_HIP_ARCHITECTURES})
  set(architectures "$ENV{KRAIT_HIP_ARCHITECTURES}")
endif()
set(KRAIT_HIP_ARCHITECTURES "${architectures}" CACHE STRING
    "What HIP kernels are compiled for; wavefronts of 64 lanes are assumed")

set(KRAIT_WITH_HIP OFF)
if(KRAIT_HIP)
  if(KRAIT_CUDA AND NOT KRAIT_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "KRAIT_HIP and KRAIT_CUDA are both ON, expected one of them: a build serves one kind of GPU")
  endif()
  find_program(KRAIT_HIPCC hipcc PATHS /opt/rocm/bin DOC "The HIP compiler")
  if(NOT KRAIT_HIPCC)
    message(FATAL_ERROR "KRAIT_HIP is ON, but no hipcc was found; install it (Debian: hipcc) or set KRAIT_HIPCC")
  endif()
  find_library(KRAIT_AMDHIP64 amdhip64 PATHS /opt/rocm/lib REQUIRED)
  find_path(KRAIT_HIP_INCLUDE hip/hip_runtime_api.h PATHS /opt/rocm/include REQUIRED)
  set(KRAIT_WITH_HIP ON)
endif()

# Compiles sources of the current folder with hipcc and sets `objects` to the results. CMake's own language HIP takes no
# hipcc, and does not find Debian's ROCm, which has no folder of its own.
function(krait_compile_hip objects)
  set(flags -x hip -std=c++20 -fPIC "$<IF:$<CONFIG:Debug>,-O1,-O3>" "$<$<NOT:$<CONFIG:Debug>>:-DNDEBUG>"
      -Wall -Wextra -Werror
      -Wno-missing-field-initializers
      -Wno-unused-parameter              # what is for __CUDA_ARCH__ leaves some behind
      -Wno-pass-failed                   # a loop that it would not unroll
      -Wno-unused-command-line-argument  # hipcc names libraries in every call
      -D__HIP_PLATFORM_AMD__ -DKRAIT_WITH_CUDA=1 -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/src)
  foreach(architecture IN LISTS KRAIT_HIP_ARCHITECTURES)
    list(APPEND flags --offload-arch=${architecture})
  endforeach()
  set(results "")
  foreach(source IN LISTS ARGN)
    set(object ${CMAKE_CURRENT_BINARY_DIR}/hip/${source}.o)
    get_filename_component(folder ${object} DIRECTORY)
    file(RELATIVE_PATH shown ${CMAKE_BINARY_DIR} ${object})
    file(MAKE_DIRECTORY ${folder})
    add_custom_command(
      OUTPUT ${object}
      COMMAND ${CMAKE_COMMAND} -E env HIP_PLATFORM=amd ${KRAIT_CCACHE} ${KRAIT_HIPCC} ${flags} -MD -MF ${object}.d
              -MT ${object} -c ${CMAKE_CURRENT_SOURCE_DIR}/${source} -o ${object}
      MAIN_DEPENDENCY ${source}
      DEPFILE ${object}.d
      COMMENT "Building HIP object ${shown}"
      COMMAND_EXPAND_LISTS VERBATIM)
    list(APPEND results ${object})
  endforeach()
  set(${objects} ${results} PARENT_SCOPE)
endfunction()
