// The part of cuBLAS that needs more than a return value. ../build.py writes the rest from the list of what torch imports.
#include "fake.h"

static __thread cudaStream_t current;
static char handle[64];

int cublasCreate_v2(void **out) {
    *out = handle;
    return fake_gpu_forbidden_in_capture("cublasCreate") ? 1 : 0; // 1: not initialized
}
int cublasSetStream_v2(void *in, cudaStream_t stream) {
    current = stream;
    return 0;
}
int cublasGetPointerMode_v2(void *in, int *mode) { return *mode = 0; }
int cublasGetMathMode(void *in, int *mode) { return *mode = 0; }
int cublasGetVersion_v2(void *in, int *version) {
    *version = 130100;
    return 0;
}
int cublasGetProperty(int property, int *value) {
    *value = property == 0 ? 13 : 1;
    return 0;
}
int fake_gpu_blas_product(void) { return fake_gpu_product(current); }
