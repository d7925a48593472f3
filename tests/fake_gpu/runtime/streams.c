// Streams, events, capture and kernels of the fake CUDA runtime, with the rules that CUDA has for them.
#include "fake.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define CAPTURES 16

Hooks hooks;
long fake_gpu_launches, fake_gpu_products, fake_gpu_graph_launches, fake_gpu_synchronizations;
static Stream default_streams[MAX_DEVICES];
static Stream *streams = NULL;
static Capture *captures[CAPTURES];
static int capture_count = 0;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fake_gpu_set_hooks(const Hooks *new_hooks) {
    if (new_hooks) hooks = *new_hooks;
    else memset(&hooks, 0, sizeof hooks);
}

Stream *stream_of(cudaStream_t handle) {
    if (handle != NULL && handle != cudaStreamLegacy && handle != cudaStreamPerThread) return (Stream *)handle;
    Stream *stream = &default_streams[current_device];
    stream->device = current_device;
    return stream;
}

uint64_t handle_of(const Stream *stream) {
    int is_default = stream >= default_streams && stream < default_streams + MAX_DEVICES;
    return is_default ? 0 : (uint64_t)stream;
}

// A call that CUDA does not allow while a capture in the same scope is in progress makes that capture invalid.
cudaError_t fake_gpu_forbidden_in_capture(const char *call) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    for (int i = 0; i < capture_count; i++) {
        Capture *capture = captures[i];
        int own = pthread_equal(capture->thread, pthread_self());
        int forbidden = capture->mode == cudaStreamCaptureModeGlobal ? own || thread_mode == cudaStreamCaptureModeGlobal
                      : capture->mode == cudaStreamCaptureModeThreadLocal && own;
        if (!forbidden) continue;
        capture->invalid = 1;
        return fail(cudaErrorStreamCaptureUnsupported, "%s was called during a capture", call);
    }
    return cudaSuccess;
}

// Note that work was put on the stream; refuse what the stream's state does not allow.
cudaError_t add_work(cudaStream_t handle, const char *call) {
    Stream *stream = stream_of(handle);
    stream->work++;
    if (handle_of(stream) == 0) { // work on the default stream waits for all blocking streams, also for those that are being captured
        for (int i = 0; i < capture_count; i++)
            if (!(captures[i]->origin->flags & cudaStreamNonBlocking)) {
                captures[i]->invalid = 1;
                return fail(cudaErrorStreamCaptureImplicit, "%s on the default stream depends on a captured stream", call);
            }
    }
    if (stream->capture) {
        if (stream->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated, NULL);
        stream->capture->nodes++;
        stream->joined = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
    Stream *stream = calloc(1, sizeof *stream);
    *stream = (Stream){.device = current_device, .flags = flags, .priority = priority};
    pthread_mutex_lock(&lock);
    stream->next = streams;
    streams = stream;
    pthread_mutex_unlock(&lock);
    *handle = (cudaStream_t)stream;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) { return cudaStreamCreateWithPriority(handle, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) { return cudaSuccess; } // the list keeps it: torch destroys streams at exit only

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    *priority = stream_of(handle)->priority;
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaStreamSynchronize");
    if (error) return error;
    __sync_fetch_and_add(&fake_gpu_synchronizations, 1);
    if (hooks.run_stream) hooks.run_stream(handle_of(stream_of(handle)), stream_of(handle)->device, 1);
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaStreamQuery");
    if (error) return error;
    return !hooks.run_stream || hooks.run_stream(handle_of(stream_of(handle)), stream_of(handle)->device, 0) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaDeviceSynchronize");
    if (error) return error;
    __sync_fetch_and_add(&fake_gpu_synchronizations, 1);
    if (hooks.run_device) hooks.run_device(current_device);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument) {
    cudaError_t error = add_work(handle, "cudaLaunchHostFunc");
    if (error || stream_of(handle)->capture) return error;
    if (hooks.call) hooks.call(function, argument, handle_of(stream_of(handle)), stream_of(handle)->device);
    else function(argument);
    return cudaSuccess;
}

// Events.

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
    Event *event = calloc(1, sizeof *event);
    *event = (Event){.device = current_device, .flags = flags, .file = -1};
    if (flags & cudaEventInterprocess) {
        event->file = memfd_create("fake_gpu_event", MFD_CLOEXEC);
        if (event->file < 0 || ftruncate(event->file, PAGE)) return fail(cudaErrorMemoryAllocation, NULL);
        event->progress = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, event->file, 0);
    } else event->progress = calloc(1, sizeof(Progress));
    *handle = (cudaEvent_t)event;
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    Event *event = (Event *)handle;
    if (hooks.run_event) return cudaSuccess; // a queue may still name it; the tests that use queues are short
    if (event->file >= 0) {
        munmap(event->progress, PAGE);
        close(event->file);
    } else free(event->progress);
    free(event);
    return cudaSuccess;
}

uint64_t fake_gpu_event_completed(Event *event) { return __atomic_load_n(&event->progress->completed, __ATOMIC_ACQUIRE); }

void fake_gpu_complete_event(Event *event, uint64_t number) {
    if (fake_gpu_event_completed(event) < number) __atomic_store_n(&event->progress->completed, number, __ATOMIC_RELEASE);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
    Event *event = (Event *)handle;
    Stream *stream = stream_of(stream_handle);
    if (stream->device != event->device)
        return fail(cudaErrorInvalidResourceHandle, "an event of device %d was recorded on a stream of device %d", event->device,
                    stream->device);
    event->capture = stream->capture ? stream->capture->id : 0;
    event->stream = stream;
    event->work = stream->work;
    if (stream->capture) return stream->capture->invalid ? fail(cudaErrorStreamCaptureInvalidated, NULL) : cudaSuccess;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->time_ms = now.tv_sec * 1e3 + now.tv_nsec / 1e6;
    event->slow = switch_number("FAKE_GPU_SLOW_EVENTS", 0);
    uint64_t number = __atomic_add_fetch(&event->progress->recorded, 1, __ATOMIC_ACQ_REL);
    if (hooks.record) hooks.record(event, number, handle_of(stream), stream->device);
    else fake_gpu_complete_event(event, number);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }

static int completed(Event *event, int finish) {
    uint64_t number = __atomic_load_n(&event->progress->recorded, __ATOMIC_ACQUIRE);
    if (hooks.run_event) hooks.run_event(event, number, finish);
    return fake_gpu_event_completed(event) >= number;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
    Event *event = (Event *)handle;
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaEventQuery");
    if (error) return error;
    if (event->capture) return fail(cudaErrorCapturedEvent, "the host asked for an event that was recorded in a capture");
    if (event->slow > 0) {
        event->slow--;
        return cudaErrorNotReady;
    }
    return completed(event, 0) ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    Event *event = (Event *)handle;
    cudaError_t error = fake_gpu_forbidden_in_capture("cudaEventSynchronize");
    if (error) return error;
    if (event->capture) return fail(cudaErrorCapturedEvent, "the host waited for an event that was recorded in a capture");
    __sync_fetch_and_add(&fake_gpu_synchronizations, 1);
    event->slow = 0;
    return completed(event, 1) ? cudaSuccess : fail(cudaErrorUnknown, "an event of another process did not complete in time");
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    *ms = (float)(((Event *)to)->time_ms - ((Event *)from)->time_ms);
    return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned flags) {
    Event *event = (Event *)handle;
    Stream *stream = stream_of(stream_handle);
    if (stream->capture) {
        if (event->capture != stream->capture->id && event->progress->recorded) {
            stream->capture->invalid = 1;
            return fail(cudaErrorStreamCaptureIsolation, "a captured stream waits for work outside the capture");
        }
        if (event->capture == stream->capture->id && event->work == event->stream->work) event->stream->joined = 1;
        return cudaSuccess;
    }
    for (int i = 0; i < capture_count; i++)
        if (captures[i]->id == event->capture) { // the stream joins the capture
            if (handle_of(stream) == 0) {
                captures[i]->invalid = 1;
                return fail(cudaErrorStreamCaptureImplicit, "the default stream cannot join a capture");
            }
            stream->capture = captures[i];
            stream->joined = 0;
            return cudaSuccess;
        }
    uint64_t number = __atomic_load_n(&event->progress->recorded, __ATOMIC_ACQUIRE);
    if (number && hooks.wait) hooks.wait(event, number, handle_of(stream), stream->device);
    return cudaSuccess;
}

// Capture and graphs. A graph holds nothing: operators.py records the operators and replays them.

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    static unsigned long long serial = 0;
    Stream *stream = stream_of(handle);
    if (handle == NULL || handle == cudaStreamLegacy)
        return fail(cudaErrorStreamCaptureUnsupported, "the default stream cannot be captured");
    if (stream->capture || capture_count == CAPTURES) return fail(cudaErrorIllegalState, "this stream is being captured already");
    Capture *capture = calloc(1, sizeof *capture);
    *capture = (Capture){.id = ++serial, .mode = mode, .thread = pthread_self(), .origin = stream};
    stream->capture = capture;
    captures[capture_count++] = capture;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    Stream *origin = stream_of(handle);
    Capture *capture = origin->capture;
    *graph = NULL;
    if (!capture || capture->origin != origin) return fail(cudaErrorIllegalState, "this stream did not begin the capture");
    for (int i = 0; i < capture_count; i++)
        if (captures[i] == capture) captures[i] = captures[--capture_count];
    int unjoined = 0;
    for (Stream *stream = streams; stream; stream = stream->next) {
        if (stream->capture != capture) continue;
        unjoined += stream != origin && !stream->joined;
        stream->capture = NULL;
    }
    if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated, NULL);
    if (unjoined) return fail(cudaErrorStreamCaptureUnjoined, "%d captured streams were not joined", unjoined);
    *graph = (cudaGraph_t)capture;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    Capture *capture = stream_of(handle)->capture;
    *status = !capture ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
    Capture *capture = stream_of(handle)->capture;
    if (id) *id = capture ? capture->id : 0;
    if (graph) *graph = (cudaGraph_t)capture;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaStreamIsCapturing(handle, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode old = thread_mode;
    thread_mode = *mode;
    *mode = old;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = (size_t)((Capture *)graph)->nodes + 1; // with the operators a kernel is no node, and torch warns of an empty graph
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *instance, cudaGraph_t graph, unsigned long long flags) {
    *instance = (cudaGraphExec_t)graph;
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return cudaSuccess; } // the instance is the same object
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
    free(instance);
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t handle) {
    __sync_fetch_and_add(&fake_gpu_graph_launches, 1);
    return add_work(handle, "cudaGraphLaunch");
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *pointer, cudaHostFn_t destroy, unsigned count, unsigned flags) {
    *object = (cudaUserObject_t)pointer;
    return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) { return cudaSuccess; }
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count, unsigned flags) { return cudaSuccess; }

// Kernels do nothing. With the operators on the CPU (FAKE_GPU_OPERATORS=1) a kernel must not be reached at all.

static cudaError_t launch(const void *function, dim3 grid, dim3 block, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    if (!grid.x || !grid.y || !grid.z || !block.x || block.x * block.y * block.z > 1024)
        return fail(cudaErrorInvalidConfiguration, "a kernel was launched with grid %u %u %u and block %u %u %u", grid.x, grid.y, grid.z,
                    block.x, block.y, block.z);
    if (stream->device != current_device)
        return fail(cudaErrorInvalidResourceHandle, "a kernel was launched on a stream of device %d while device %d is current",
                    stream->device, current_device);
    if (switch_number("FAKE_GPU_OPERATORS", 0))
        return fail(cudaErrorNotSupported, "a kernel was launched that operators.py did not compute (is this thread its own?)");
    __sync_fetch_and_add(&fake_gpu_launches, 1);
    return add_work(handle, "a kernel");
}

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(f, grid, block, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch((const void *)f, grid, block, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
    return launch(f, grid, block, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **arguments) {
    return launch(f, config->gridDim, config->blockDim, config->stream);
}

static __thread struct {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
} configuration;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    configuration.grid = grid, configuration.block = block, configuration.shared = shared, configuration.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configuration.grid, *block = configuration.block, *shared = configuration.shared;
    *(cudaStream_t *)stream = configuration.stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *a, void *b, void *c,
                            void *d, int *size) {}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int ext, size_t size, int constant, int global) {}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 48 << 10;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value, int device) {
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function, int size, size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *function, int size, size_t shared,
                                                                   unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

// A product of cuBLAS. With the operators on the CPU no product may be reached; 15: not supported.
int fake_gpu_product(cudaStream_t stream) {
    if (switch_number("FAKE_GPU_OPERATORS", 0)) return fake_gpu_missing("a product of cuBLAS"), 15;
    __sync_fetch_and_add(&fake_gpu_products, 1);
    return add_work(stream, "a product") ? 14 : 0; // 14: internal error
}
