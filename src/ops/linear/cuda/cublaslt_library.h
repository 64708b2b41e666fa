// cuBLASLt, loaded when it is first needed: a program that was built with CUDA starts on machines that have
// no such library, and only products of many rows ask for it.
#pragma once

#include <cublasLt.h>

#include <string_view>

namespace krait::linear_detail {

// The functions used. Their names, the values of the enums that they take and the size of an algorithm are
// the same in versions 12 and 13.
struct CublasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescCreate) desc_create = nullptr;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) layout_create = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) preference_create = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) preference_destroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) preference_set = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;
  decltype(&cublasLtMatmulAlgoCheck) algorithm_check = nullptr;
  decltype(&cublasLtMatmulAlgoConfigGetAttribute) config_get = nullptr;
  decltype(&cublasLtMatmulAlgoConfigSetAttribute) config_set = nullptr;
  decltype(&cublasLtGetVersion) version = nullptr;
  decltype(&cublasLtGetStatusName) status_name = nullptr;
};

// From the file that the environment variable KRAIT_CUBLASLT names, else from libcublasLt.so.13,
// libcublasLt.so.12 or libcublasLt.so where the system looks for libraries. Throws one line that says what
// was looked for where there is none.
[[nodiscard]] CublasLt load_cublaslt();

// Throws where `status` is not success.
void check(const CublasLt& library, cublasStatus_t status, std::string_view what);

}  // namespace krait::linear_detail
