// Shared declarations of the fake CUDA runtime. See ../README.md for what it does and what it cannot show.
#pragma once
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 16

// The state of one event. An event that may be shared between processes keeps it in a memory file of its own.
typedef struct {
    uint64_t recorded;  // how often the event was recorded
    uint64_t completed; // the last record whose work is done
} Progress;

typedef struct Capture {
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    struct Stream *origin;
    long nodes;
    int invalid;
} Capture;

typedef struct Stream {
    int device;
    int priority;
    unsigned flags;
    Capture *capture;
    unsigned long work; // counts everything that was put on the stream
    int joined;         // in a capture: the origin waited for all the work of this stream
    struct Stream *next;
} Stream;

typedef struct {
    int device;
    unsigned flags;
    Progress *progress;
    int file;           // the memory file of the progress, or -1
    int slow;           // queries that still answer "not ready"
    double time_ms;
    unsigned long long capture; // the number of the capture in which it was recorded last, or 0
    Stream *stream;
    unsigned long work; // the stream's count when it was recorded
} Event;

enum Kind { DEVICE_MEMORY, PINNED_MEMORY, REGISTERED_MEMORY, IMPORTED_MEMORY };

typedef struct Block {
    char *start;
    size_t bytes;
    int device;
    enum Kind kind;
    int file;
    struct Block *next;
} Block;

// Python's stream queues (../streams.py) set these. While they are null, all work is done at once. A stream is given by its handle,
// which is 0 for the default stream of a device, and its device.
typedef struct {
    void (*copy)(void *to, const void *from, uint64_t bytes, uint64_t stream, int device);
    void (*fill)(void *to, int value, uint64_t bytes, uint64_t stream, int device);
    void (*record)(Event *event, uint64_t number, uint64_t stream, int device);
    void (*wait)(Event *event, uint64_t number, uint64_t stream, int device);
    void (*run_event)(Event *event, uint64_t number, int to_the_end);
    int (*run_stream)(uint64_t stream, int device, int to_the_end); // returns 1 when the stream has no work left
    void (*run_device)(int device);
    void (*call)(void (*function)(void *), void *argument, uint64_t stream, int device);
} Hooks;

// Exported. The other names stay inside the library: it is loaded first, and must not replace a function of another library.
extern long fake_gpu_launches, fake_gpu_products, fake_gpu_graph_launches, fake_gpu_synchronizations, fake_gpu_mallocs;
extern long fake_gpu_bytes_to_device, fake_gpu_bytes_to_host;
int fake_gpu_missing(const char *name);
int fake_gpu_product(cudaStream_t stream);
cudaError_t fake_gpu_forbidden_in_capture(const char *call);

#pragma GCC visibility push(hidden)
extern Hooks hooks;
extern __thread int current_device;
int switch_number(const char *name, int otherwise);
cudaError_t fail(cudaError_t error, const char *format, ...);
int physical_device(int device);
int device_count(void);
Block *find_block(const void *pointer);
Stream *stream_of(cudaStream_t handle);
uint64_t handle_of(const Stream *stream);
cudaError_t add_work(cudaStream_t handle, const char *call);
#pragma GCC visibility pop
