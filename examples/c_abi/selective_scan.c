/* Calls libkrait_ffi from C: a selective scan over memory of the caller's own, and an error.
 *
 *   c_abi_selective_scan path/to/libkrait_ffi.so
 *
 * Every function of the library has the signature of TVMFFISafeCallType and the name __tvm_ffi_<name>;
 * src/ffi/README.md lists them with their arguments. Any language that can call C can do the same. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

enum { kBatch = 1, kChannels = 3, kLength = 50, kStates = 4 };

/* A contiguous f32 tensor on the CPU. `shape` must live as long as it. */
static DLTensor tensor(float* data, int ndim, int64_t* shape) {
  DLTensor t;
  memset(&t, 0, sizeof(t));
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = ndim;
  t.dtype.code = kDLFloat;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t; /* without strides: contiguous */
}

static TVMFFIAny none(void) {
  TVMFFIAny any;
  memset(&any, 0, sizeof(any));
  any.type_index = kTVMFFINone;
  return any;
}

static TVMFFIAny given(DLTensor* t) {
  TVMFFIAny any = none();
  any.type_index = kTVMFFIDLTensorPtr;
  any.v_ptr = t;
  return any;
}

static TVMFFIAny flag(int value) {
  TVMFFIAny any = none();
  any.type_index = kTVMFFIBool;
  any.v_int64 = value;
  return any;
}

/* Prints the error that a call has left, and frees it. */
static void print_error(void) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  /* What an error holds follows the header that all objects have. */
  const TVMFFIErrorCell* cell = (const TVMFFIErrorCell*)((const char*)error + sizeof(TVMFFIObject));
  printf("%.*s: %.*s\n", (int)cell->kind.size, cell->kind.data, (int)cell->message.size, cell->message.data);
  TVMFFIObjectDecRef(error);
}

/* The recurrence in double precision: h = exp(delta A) h + delta B u, y = sum C h. */
static double largest_difference(const float* u, const float* delta, const float* A, const float* B,
                                 const float* C, const float* out) {
  double largest = 0.0;
  for (int d = 0; d < kChannels; ++d) {
    double h[kStates] = {0};
    for (int t = 0; t < kLength; ++t) {
      const double step = delta[d * kLength + t];
      double y = 0.0;
      for (int n = 0; n < kStates; ++n) {
        h[n] = exp(step * A[d * kStates + n]) * h[n] + step * B[n * kLength + t] * u[d * kLength + t];
        y += C[n * kLength + t] * h[n];
      }
      largest = fmax(largest, fabs(y - out[d * kLength + t]));
    }
  }
  return largest;
}

int main(int argc, char** argv) {
  if (argc != 2) {
    fprintf(stderr, "usage: %s path/to/libkrait_ffi.so\n", argv[0]);
    return 2;
  }
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  TVMFFISafeCallType selective_scan;
  *(void**)&selective_scan = dlsym(library, "__tvm_ffi_selective_scan");
  if (selective_scan == NULL) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }

  static float u[kChannels * kLength], delta[kChannels * kLength], out[kChannels * kLength];
  static float A[kChannels * kStates], B[kStates * kLength], C[kStates * kLength];
  for (int i = 0; i < kChannels * kLength; ++i) {
    u[i] = sinf(0.7F * (float)i);
    delta[i] = 0.05F + 0.04F * cosf(0.3F * (float)i);
  }
  for (int i = 0; i < kChannels * kStates; ++i) A[i] = -1.0F - (float)(i % kStates);
  for (int i = 0; i < kStates * kLength; ++i) {
    B[i] = cosf(0.2F * (float)i);
    C[i] = sinf(0.9F * (float)i);
  }
  int64_t of_tokens[] = {kBatch, kChannels, kLength};
  int64_t of_states[] = {kChannels, kStates};
  int64_t of_factors[] = {kBatch, kStates, kLength};
  DLTensor u_tensor = tensor(u, 3, of_tokens);
  DLTensor delta_tensor = tensor(delta, 3, of_tokens);
  DLTensor A_tensor = tensor(A, 2, of_states);
  DLTensor B_tensor = tensor(B, 3, of_factors);
  DLTensor C_tensor = tensor(C, 3, of_factors);
  DLTensor out_tensor = tensor(out, 3, of_tokens);

  /* u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, cu_seqlens, state_positions, delta_softplus,
   * reverse, out, last_state, states, checkpoints */
  TVMFFIAny args[] = {given(&u_tensor),
                      given(&delta_tensor),
                      given(&A_tensor),
                      given(&B_tensor),
                      given(&C_tensor),
                      none(),
                      none(),
                      none(),
                      none(),
                      none(),
                      none(),
                      none(),
                      flag(0),
                      flag(0),
                      given(&out_tensor),
                      none(),
                      none(),
                      none()};
  const int32_t count = (int32_t)(sizeof(args) / sizeof(args[0]));
  TVMFFIAny result = none();
  if (selective_scan(NULL, args, count, &result) != 0) {
    print_error();
    return 1;
  }
  const double difference = largest_difference(u, delta, A, B, C, out);
  printf("selective_scan: largest difference from double precision %.1e\n", difference);

  /* What does not fit is an error in words, and the program goes on. */
  of_factors[1] = kStates - 1;
  if (selective_scan(NULL, args, count, &result) == 0) {
    fprintf(stderr, "a B of the wrong shape was taken\n");
    return 1;
  }
  print_error();
  return difference < 1e-5 ? 0 : 1;
}
