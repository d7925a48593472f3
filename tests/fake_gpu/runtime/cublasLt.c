// The part of cuBLASLt that needs more than a return value. ../build.py writes the rest from the list of what torch imports.
#include "fake.h"
#include <string.h>

static char handle[64];

size_t cublasLtGetVersion(void) { return 130100; }
size_t cublasLtGetCudartVersion(void) { return CUDART_VERSION; }
int cublasLtCreate(void **out) {
    *out = handle;
    return 0;
}

// One algorithm is always found, so that torch fuses the bias into the product as it does on a GPU.
int cublasLtMatmulAlgoGetHeuristic(void *lt, void *operation, void *a, void *b, void *c, void *d, void *preference, int requested,
                                   char *results, int *found) {
    memset(results, 0, 96); // sizeof(cublasLtMatmulHeuristicResult_t)
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *lt, void *operation, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
                   const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
                   size_t workspace_bytes, cudaStream_t stream) {
    return fake_gpu_product(stream);
}
