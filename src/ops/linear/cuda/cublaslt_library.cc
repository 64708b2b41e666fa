#include "ops/linear/cuda/cublaslt_library.h"

#include <dlfcn.h>

#include <cstdlib>
#include <string>

#include "krait/core/error.h"

namespace krait::linear_detail {
namespace {

std::string last_error() {
  const char* text = dlerror();
  return text == nullptr ? "no reason was given" : text;
}

// The library stays loaded: unloading it while a driver holds its kernels is not safe.
void* open_library(std::string& name) {
  if (const char* named = std::getenv("KRAIT_CUBLASLT"); named != nullptr && *named != '\0') {
    name = named;
    void* library = dlopen(named, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      fail(ErrorKind::not_found, "KRAIT_CUBLASLT names ", named, ", which cannot be loaded: ", last_error());
    return library;
  }
  for (const char* candidate :
       {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so", "/usr/local/cuda/lib64/libcublasLt.so"}) {
    name = candidate;
    if (void* library = dlopen(candidate, RTLD_NOW | RTLD_LOCAL); library != nullptr) return library;
  }
  fail(ErrorKind::not_found,
       "cuBLASLt is needed on a GPU, and libcublasLt.so.13, libcublasLt.so.12 and libcublasLt.so were not "
       "found; "
       "install CUDA's cuBLAS, or name the file in the environment variable KRAIT_CUBLASLT");
}

}  // namespace

CublasLt load_cublaslt() {
  std::string name;
  void* library = open_library(name);
  CublasLt table;
  const auto find = [&](auto& function, const char* symbol) {
    void* address = dlsym(library, symbol);
    require(address != nullptr, name, ": has no function ", symbol, ", expected cuBLASLt 12 or 13");
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
  find(table.create, "cublasLtCreate");
  find(table.destroy, "cublasLtDestroy");
  find(table.matmul, "cublasLtMatmul");
  find(table.desc_create, "cublasLtMatmulDescCreate");
  find(table.desc_destroy, "cublasLtMatmulDescDestroy");
  find(table.desc_set, "cublasLtMatmulDescSetAttribute");
  find(table.layout_create, "cublasLtMatrixLayoutCreate");
  find(table.layout_destroy, "cublasLtMatrixLayoutDestroy");
  find(table.preference_create, "cublasLtMatmulPreferenceCreate");
  find(table.preference_destroy, "cublasLtMatmulPreferenceDestroy");
  find(table.preference_set, "cublasLtMatmulPreferenceSetAttribute");
  find(table.heuristic, "cublasLtMatmulAlgoGetHeuristic");
  find(table.algorithm_check, "cublasLtMatmulAlgoCheck");
  find(table.config_get, "cublasLtMatmulAlgoConfigGetAttribute");
  find(table.config_set, "cublasLtMatmulAlgoConfigSetAttribute");
  find(table.version, "cublasLtGetVersion");
  find(table.status_name, "cublasLtGetStatusName");
  return table;
}

void check(const CublasLt& library, cublasStatus_t status, std::string_view what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  const ErrorKind kind = status == CUBLAS_STATUS_ALLOC_FAILED ? ErrorKind::out_of_memory : ErrorKind::io;
  fail(kind, "[linear] cuBLASLt, ", what, ": ", library.status_name(status));
}

}  // namespace krait::linear_detail
