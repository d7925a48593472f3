// Memory of the fake CUDA runtime: host memory that other processes can map, and copies.
#include "fake.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define POISON 0xff // not a number in every floating-point type, -1 in every signed integer
#define PAGE 4096

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Block *blocks = NULL;
static size_t used[MAX_DEVICES];
long fake_gpu_mallocs, fake_gpu_bytes_to_device, fake_gpu_bytes_to_host;

// Without the operators nothing reads the memory, and filling 80 GB would use as much of the host.
static int poisons(void) { return switch_number("FAKE_GPU_OPERATORS", 0); }

Block *find_block(const void *pointer) {
    pthread_mutex_lock(&lock);
    Block *block = blocks;
    while (block && !((char *)pointer >= block->start && (char *)pointer < block->start + block->bytes)) block = block->next;
    pthread_mutex_unlock(&lock);
    return block;
}

static Block *add_block(void *start, size_t bytes, enum Kind kind, int file) {
    Block *block = calloc(1, sizeof *block);
    *block = (Block){.start = start, .bytes = bytes, .device = current_device, .kind = kind, .file = file};
    pthread_mutex_lock(&lock);
    block->next = blocks;
    blocks = block;
    pthread_mutex_unlock(&lock);
    return block;
}

// Unlink the block that starts at this address; return NULL if there is none of this kind.
static Block *remove_block(void *start, enum Kind kind) {
    pthread_mutex_lock(&lock);
    Block **place = &blocks;
    while (*place && !((*place)->start == start && (*place)->kind == kind)) place = &(*place)->next;
    Block *block = *place;
    if (block) *place = block->next;
    pthread_mutex_unlock(&lock);
    return block;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaMalloc");
    if (error) return error;
    if (!device_count()) return fail(cudaErrorNoDevice, NULL);
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    size_t total = (size_t)switch_number("FAKE_GPU_MEMORY_GB", 80) << 30;
    if (used[current_device] + bytes > total) return fail(cudaErrorMemoryAllocation, NULL);
    int file = memfd_create("fake_gpu", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, (off_t)bytes)) return fail(cudaErrorMemoryAllocation, "the host has no memory for the fake GPU");
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    if (start == MAP_FAILED) return fail(cudaErrorMemoryAllocation, "the host cannot map memory for the fake GPU");
    if (poisons()) memset(start, POISON, bytes);
    add_block(start, bytes, DEVICE_MEMORY, file);
    __sync_fetch_and_add(&used[current_device], bytes);
    __sync_fetch_and_add(&fake_gpu_mallocs, 1);
    *pointer = start;
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaFree");
    if (error || !pointer) return error;
    Block *block = remove_block(pointer, DEVICE_MEMORY);
    if (!block) return fail(cudaErrorInvalidValue, "cudaFree of memory that cudaMalloc did not give");
    if (hooks.run_device) hooks.run_device(block->device); // cudaFree waits for the device
    if (poisons()) memset(block->start, POISON, block->bytes); // another process may still map it
    munmap(block->start, block->bytes);
    close(block->file);
    __sync_fetch_and_sub(&used[block->device], block->bytes);
    free(block);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = (size_t)switch_number("FAKE_GPU_MEMORY_GB", 80) << 30;
    *available = *total - used[current_device];
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaHostAlloc");
    if (error) return error;
    bytes = bytes ? bytes : 1;
    if (posix_memalign(pointer, PAGE, bytes)) return fail(cudaErrorMemoryAllocation, NULL);
    if (poisons()) memset(*pointer, POISON, bytes);
    add_block(*pointer, bytes, PINNED_MEMORY, -1);
    return cudaSuccess;
}

cudaError_t cudaFreeHost(void *pointer) {
    Block *block = remove_block(pointer, PINNED_MEMORY);
    if (!block) return fail(cudaErrorInvalidValue, "cudaFreeHost of memory that cudaHostAlloc did not give");
    free(block->start);
    free(block);
    return cudaSuccess;
}

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) {
    if (!switch_number("FAKE_GPU_HOST_REGISTER", 1)) return fail(cudaErrorNotSupported, NULL);
    if (find_block(pointer)) return fail(cudaErrorHostMemoryAlreadyRegistered, NULL);
    add_block(pointer, bytes, REGISTERED_MEMORY, -1);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *pointer) {
    Block *block = remove_block(pointer, REGISTERED_MEMORY);
    if (!block) return fail(cudaErrorHostMemoryNotRegistered, NULL);
    free(block);
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    memset(attributes, 0, sizeof *attributes);
    Block *block = find_block(pointer);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    if (!block) return cudaSuccess;
    int host = block->kind == PINNED_MEMORY || block->kind == REGISTERED_MEMORY;
    attributes->type = host ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    attributes->device = block->device;
    attributes->devicePointer = (void *)pointer;
    attributes->hostPointer = host ? (void *)pointer : NULL;
    return cudaSuccess;
}

int fake_gpu_is_unpinned(const void *pointer) { return find_block(pointer) == NULL; }

// Copies and fills.

static int on_device(const void *pointer) {
    Block *block = find_block(pointer);
    return block && (block->kind == DEVICE_MEMORY || block->kind == IMPORTED_MEMORY);
}

static void count_bytes(const void *to, const void *from, size_t bytes) {
    int to_device = on_device(to), from_device = on_device(from);
    if (to_device && !from_device) __sync_fetch_and_add(&fake_gpu_bytes_to_device, (long)bytes);
    if (from_device && !to_device) __sync_fetch_and_add(&fake_gpu_bytes_to_host, (long)bytes);
}

static cudaError_t check_capture_of_copy(const void *to, const void *from, cudaStream_t stream) {
    Stream *s = stream_of(stream);
    if (!s->capture || (find_block(to) && find_block(from))) return cudaSuccess;
    s->capture->invalid = 1;
    return fail(cudaErrorStreamCaptureUnsupported, "a copy from or to unpinned host memory was captured");
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = check_capture_of_copy(to, from, stream);
    if (!error) error = add_work(stream, "cudaMemcpyAsync");
    if (error || stream_of(stream)->capture) return error;
    count_bytes(to, from, bytes);
    Stream *s = stream_of(stream);
    if (hooks.copy) hooks.copy(to, from, bytes, handle_of(s), s->device);
    else memmove(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    for (size_t row = 0; row < height && !error; row++)
        error = cudaMemcpyAsync((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, kind, stream);
    return error;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaMemcpy");
    if (!error) error = cudaMemcpyAsync(to, from, bytes, kind, NULL);
    return error ? error : cudaStreamSynchronize(NULL);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    cudaError_t error = add_work(stream, "cudaMemsetAsync");
    if (error || stream_of(stream)->capture) return error;
    Stream *s = stream_of(stream);
    if (hooks.fill) hooks.fill(to, value, bytes, handle_of(s), s->device);
    else if (poisons() || value) memset(to, value, bytes); // fresh memory of the host is zero and costs nothing until it is written
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes) { return cudaMemsetAsync(to, value, bytes, NULL); }

// Constants of kernels that never run.
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset, enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    *pointer = (void *)symbol;
    return cudaSuccess;
}

// Memory that other processes map. The handle names a file of the exporter's process, as CUDA's memory dies with its exporter.

typedef struct {
    char mark[8];
    int process, file, device;
    size_t bytes;
} Handle;

_Static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t), "the handle fits");

static int open_file(const Handle *handle) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", handle->process, handle->file);
    return strcmp(handle->mark, "fakegpu") ? -1 : open(path, O_RDWR | O_CLOEXEC);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *pointer) {
    if (!switch_number("FAKE_GPU_IPC_EXPORT", 1)) return fail(cudaErrorNotSupported, NULL);
    Block *block = find_block(pointer);
    if (!block || block->start != pointer || block->kind != DEVICE_MEMORY) return fail(cudaErrorInvalidValue, NULL);
    Handle handle = {"fakegpu", getpid(), block->file, physical_device(block->device), block->bytes};
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenMemHandle(void **pointer, cudaIpcMemHandle_t in, unsigned flags) {
    if (!switch_number("FAKE_GPU_IPC_IMPORT", 1)) return fail(cudaErrorMapBufferObjectFailed, NULL);
    Handle handle;
    memcpy(&handle, &in, sizeof handle);
    int file = open_file(&handle);
    if (file < 0) return fail(cudaErrorMapBufferObjectFailed, "the process that exported this memory is gone");
    if (physical_device(current_device) != handle.device && !switch_number("FAKE_GPU_P2P", 1)) {
        close(file);
        return fail(cudaErrorMapBufferObjectFailed, "memory of GPU %d was opened with GPU %d current, and they have no peer access",
                    handle.device, physical_device(current_device));
    }
    *pointer = mmap(NULL, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (*pointer == MAP_FAILED) {
        close(file);
        return fail(cudaErrorMapBufferObjectFailed, "the host cannot map memory for the fake GPU");
    }
    add_block(*pointer, handle.bytes, IMPORTED_MEMORY, file);
    return cudaSuccess;
}

cudaError_t cudaIpcCloseMemHandle(void *pointer) {
    Block *block = remove_block(pointer, IMPORTED_MEMORY);
    if (!block) return fail(cudaErrorInvalidValue, "cudaIpcCloseMemHandle of memory that was not opened");
    if (hooks.run_device) hooks.run_device(block->device);
    munmap(block->start, block->bytes);
    close(block->file);
    free(block);
    return cudaSuccess;
}

cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t *out, cudaEvent_t event) {
    Event *e = (Event *)event;
    if (e->file < 0) return fail(cudaErrorInvalidResourceHandle, "the event was not created for other processes");
    Handle handle = {"fakegpu", getpid(), e->file, physical_device(e->device), sizeof(Progress)};
    memset(out, 0, sizeof *out);
    memcpy(out, &handle, sizeof handle);
    return cudaSuccess;
}

cudaError_t cudaIpcOpenEventHandle(cudaEvent_t *event, cudaIpcEventHandle_t in) {
    Handle handle;
    memcpy(&handle, &in, sizeof handle);
    int file = open_file(&handle);
    if (file < 0) return fail(cudaErrorMapBufferObjectFailed, "the process that exported this event is gone");
    void *progress = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    cudaError_t error = progress == MAP_FAILED ? cudaErrorMapBufferObjectFailed
                                               : cudaEventCreateWithFlags(event, cudaEventDisableTiming);
    if (error) {
        close(file);
        return fail(error, "the host cannot map an event for the fake GPU");
    }
    Event *e = (Event *)*event;
    free(e->progress);
    e->progress = progress;
    e->file = file;
    return cudaSuccess;
}
