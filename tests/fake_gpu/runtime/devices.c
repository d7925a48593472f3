// Devices, their properties, errors and switches of the fake CUDA runtime.
#include "fake.h"
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

__thread int current_device = 0;
static __thread cudaError_t last_error = cudaSuccess;
static int physical[MAX_DEVICES];
static int visible = -1;

int switch_number(const char *name, int otherwise) {
    const char *value = getenv(name);
    return value && *value ? atoi(value) : otherwise;
}

static void report(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "[fake GPU, process %d] ", getpid());
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
}

// Return the error. A format says, on standard error, which rule was broken.
cudaError_t fail(cudaError_t error, const char *format, ...) {
    last_error = error;
    if (format) {
        char text[512];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        report("%s", text);
    }
    return error;
}

int fake_gpu_missing(const char *name) {
    return fail(cudaErrorNotSupported, "%s was called, and the fake GPU does not have it: write it in tests/fake_gpu/runtime", name);
}

// Read CUDA_VISIBLE_DEVICES: numbers or unique identifiers of the whole machine's GPUs. CUDA stops at the first bad entry.
int device_count(void) {
    if (visible >= 0) return visible;
    int total = switch_number("FAKE_GPU_DRIVER", 1) ? switch_number("FAKE_GPU_COUNT", 2) : 0;
    const char *mask = getenv("CUDA_VISIBLE_DEVICES");
    int count = 0;
    if (!mask) {
        for (int i = 0; i < total && i < MAX_DEVICES; i++) physical[count++] = i;
        return visible = count;
    }
    char copy[1024], *rest = NULL;
    snprintf(copy, sizeof copy, "%s", mask);
    for (char *entry = strtok_r(copy, ",", &rest); entry && count < MAX_DEVICES; entry = strtok_r(NULL, ",", &rest)) {
        unsigned number = 0;
        if (strncmp(entry, "GPU-", 4) == 0) {
            if (sscanf(entry, "GPU-fa6e%4x", &number) != 1) break;
        } else if (sscanf(entry, "%u", &number) != 1) break;
        if ((int)number >= total) break;
        physical[count++] = (int)number;
    }
    return visible = count;
}

int physical_device(int device) { return physical[device]; }

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_count();
    if (!switch_number("FAKE_GPU_DRIVER", 1)) return fail(cudaErrorInsufficientDriver, NULL);
    return *count ? cudaSuccess : fail(cudaErrorNoDevice, NULL);
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return device_count() ? cudaSuccess : fail(cudaErrorNoDevice, NULL);
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice, NULL);
    current_device = device;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = switch_number("FAKE_GPU_DRIVER", 1) ? CUDART_VERSION : 0;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

static void capability(int *major, int *minor) {
    const char *value = getenv("FAKE_GPU_CAPABILITY");
    *major = 9, *minor = 0;
    if (value) sscanf(value, "%d.%d", major, minor);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device < 0 || device >= device_count()) return fail(cudaErrorInvalidDevice, NULL);
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "fake GPU (no hardware)");
    unsigned char uuid[4] = {0xfa, 0x6e, 0, (unsigned char)physical[device]};
    memcpy(p->uuid.bytes, uuid, sizeof uuid);
    capability(&p->major, &p->minor);
    p->totalGlobalMem = (size_t)switch_number("FAKE_GPU_MEMORY_GB", 80) << 30;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->multiProcessorCount = 132;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->l2CacheSize = 50 << 20;
    p->textureAlignment = 512;
    p->asyncEngineCount = 3;
    p->unifiedAddressing = p->managedMemory = p->concurrentKernels = p->canMapHostMemory = 1;
    p->hostRegisterSupported = p->ipcEventSupported = p->memoryPoolsSupported = p->cooperativeLaunch = 1;
    p->pciBusID = 16 + physical[device];
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrHostNativeAtomicSupported: *value = 0; break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: return fail(cudaErrorNotSupported, "the device attribute %d is not known to the fake GPU", attribute);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02X:00.0", 16 + physical[device]);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer && switch_number("FAKE_GPU_P2P", 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    if (!switch_number("FAKE_GPU_P2P", 1)) return fail(cudaErrorPeerAccessUnsupported, NULL);
    return fake_gpu_forbidden_in_capture("cudaDeviceEnablePeerAccess");
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    static char pools[MAX_DEVICES];
    *pool = (cudaMemPool_t)&pools[device];
    return cudaSuccess;
}

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    default: return "cudaErrorOfTheFakeGpu";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorInsufficientDriver: return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidResourceHandle: return "invalid resource handle";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMapBufferObjectFailed: return "mapping of buffer object failed";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    default: return "error of the fake GPU";
    }
}

// torch looks functions of the driver up by name. One that driver.c does not have reports its name when it is called.
#define ENTRIES 64
static const char *entry_names[ENTRIES];
static int entry_count = 0;
static int missing_entry(const char *name) {
    report("%s was called, and the fake driver does not have it: write it in tests/fake_gpu/runtime/driver.c", name);
    return 801; // CUDA_ERROR_NOT_SUPPORTED
}
#define CALL(n) static int entry_##n(void) { return missing_entry(entry_names[0##n]); }
#define EIGHT(M, t) M(t##0) M(t##1) M(t##2) M(t##3) M(t##4) M(t##5) M(t##6) M(t##7)
#define ALL(M) EIGHT(M, 0) EIGHT(M, 1) EIGHT(M, 2) EIGHT(M, 3) EIGHT(M, 4) EIGHT(M, 5) EIGHT(M, 6) EIGHT(M, 7)
ALL(CALL)
#define ADDRESS(n) entry_##n,
static int (*const entry_calls[ENTRIES])(void) = {ALL(ADDRESS)};

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) {
        int slot = 0;
        while (slot < entry_count && strcmp(entry_names[slot], name) != 0) slot++;
        if (slot == ENTRIES) return fail(cudaErrorNotSupported, "more than %d functions of the driver are missing", ENTRIES);
        if (slot == entry_count) entry_names[entry_count++] = strdup(name);
        *function = (void *)entry_calls[slot];
    }
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}
