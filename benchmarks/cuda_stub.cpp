// Stub of the CUDA runtime and driver that lets PyTorch run as if there were a GPU.
//
// launches.py preloads this library. Kernels do nothing. Allocations return addresses that are never accessed, up to a
// limit. Streams track whether they are being captured, so that PyTorch's allocator and CUDA graphs behave as on a GPU.
// Synchronization fails unless it is allowed, and invalidates a capture as on a GPU.

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

constexpr int kSuccess = 0;
constexpr int kOutOfMemory = 2;
constexpr int kCaptureUnsupported = 900;  // synchronization while a stream is being captured
constexpr int kCaptureInvalidated = 901;
constexpr int kDeviceToHost = 2;

struct Properties {  // the beginning of cudaDeviceProp
    char name[256];
    char uuid[16];
    char luid[8];
    unsigned luid_mask;
    size_t total_memory, shared_memory;
    int registers, warp_size;
    size_t pitch;
    int threads, block[3], grid[3];
#if CUDA_MAJOR < 13
    int clock_rate;
#endif
    size_t constant_memory;
    int major, minor;
    int rest[100];  // includes the numbers of multiprocessors and threads, which launches read
};

struct Capture {
    bool active, valid;
    unsigned long long id;
};

struct Dimensions {
    unsigned x, y, z;
};

bool waiting_allowed = false;
size_t memory_limit = size_t{80} << 30, memory_used = 0, next_address = size_t{1} << 40;
std::map<size_t, size_t> allocations;  // by address
size_t next_handle = 16;
std::map<void*, Capture> captures;  // by stream
unsigned long long next_capture = 1;

void* new_handle() { return reinterpret_cast<void*>(next_handle++); }

int fill(Properties* properties) {
    std::strcpy(properties->name, "stub");
    properties->total_memory = memory_limit;
    properties->shared_memory = 49152;
    properties->registers = 65536;
    properties->warp_size = 32;
    properties->threads = 1024;
    for (int i = 0; i < 3; ++i) {
        properties->block[i] = 1024;
        properties->grid[i] = 65535;
    }
    properties->major = 9;  // an H100
    properties->minor = 0;
    for (int& value : properties->rest) value = 2048;
    return kSuccess;
}

int capture_info(void* stream, int* status, unsigned long long* id) {
    const Capture& capture = captures[stream];
    *status = !capture.active ? 0 : capture.valid ? 1 : 2;
    if (id) *id = capture.active ? capture.id : 0;
    return kSuccess;
}

int wait_for(void* stream) {
    Capture& capture = captures[stream];
    capture.valid = false;
    return capture.active || !waiting_allowed ? kCaptureUnsupported : kSuccess;
}

int wait_for_all() {
    int result = waiting_allowed ? kSuccess : kCaptureUnsupported;
    for (auto& [stream, capture] : captures) result = wait_for(stream) ? kCaptureUnsupported : result;
    return result;
}

}  // namespace

extern "C" {

// For tests.
void stub_allow_waiting() { waiting_allowed = true; }
void stub_limit_memory(size_t bytes) { memory_limit = bytes; }
size_t stub_memory_used() { return memory_used; }

int cudaGetDeviceCount(int* count) { *count = 1; return kSuccess; }
int cudaGetDevice(int* device) { *device = 0; return kSuccess; }
int cudaSetDevice(int) { return kSuccess; }
int cudaDeviceGetAttribute(int* value, int, int) { *value = 1; return kSuccess; }
int cudaDriverGetVersion(int* version) { *version = 1000 * CUDA_MAJOR; return kSuccess; }
int cudaGetDeviceProperties(Properties* properties, int) { return fill(properties); }
int cudaGetDeviceProperties_v2(Properties* properties, int) { return fill(properties); }  // the name in CUDA 12
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return kSuccess; }

int cudaGetLastError() { return kSuccess; }
int cudaPeekAtLastError() { return kSuccess; }
const char* cudaGetErrorName(int) { return "stub"; }
const char* cudaGetErrorString(int error) {
    return error == kOutOfMemory          ? "out of memory"
           : error == kCaptureUnsupported ? "operation not permitted when stream is capturing"
           : error == kCaptureInvalidated ? "operation failed due to a previous error during capture"
                                          : "not implemented by the CUDA stub";
}

int cudaMalloc(void** memory, size_t bytes) {
    if (memory_used + bytes > memory_limit) return kOutOfMemory;
    *memory = reinterpret_cast<void*>(next_address);
    allocations[next_address] = bytes;
    next_address += bytes + (size_t{1} << 21);
    memory_used += bytes;
    return kSuccess;
}
int cudaFree(void* memory) {
    auto found = allocations.find(reinterpret_cast<size_t>(memory));
    if (found != allocations.end()) {
        memory_used -= found->second;
        allocations.erase(found);
    }
    return kSuccess;
}
int cudaMemGetInfo(size_t* free, size_t* total) {
    *free = memory_limit - memory_used;
    *total = memory_limit;
    return kSuccess;
}
int cudaHostAlloc(void** memory, size_t bytes, unsigned) { *memory = std::malloc(bytes); return kSuccess; }
int cudaFreeHost(void* memory) { std::free(memory); return kSuccess; }
int cudaMemsetAsync(void*, int, size_t, void*) { return kSuccess; }
int cudaMemcpyAsync(void* to, const void*, size_t bytes, int kind, void*) {
    if (!waiting_allowed) return kCaptureUnsupported;
    if (kind == kDeviceToHost) std::memset(to, 0, bytes);
    return kSuccess;
}

int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return kSuccess; }
int cudaStreamCreateWithPriority(void** stream, unsigned, int) { *stream = new_handle(); return kSuccess; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cudaStreamQuery(void*) { return kSuccess; }
int cudaEventCreateWithFlags(void** event, unsigned) { *event = new_handle(); return kSuccess; }
int cudaEventRecord(void*, void*) { return kSuccess; }
int cudaEventRecordWithFlags(void*, void*, unsigned) { return kSuccess; }
int cudaEventQuery(void*) { return kSuccess; }
int cudaEventDestroy(void*) { return kSuccess; }
int cudaDeviceSynchronize() { return wait_for_all(); }
int cudaStreamSynchronize(void* stream) { return wait_for(stream); }
int cudaEventSynchronize(void*) { return wait_for_all(); }

int cudaThreadExchangeStreamCaptureMode(int*) { return kSuccess; }
int cudaStreamIsCapturing(void* stream, int* status) { return capture_info(stream, status, nullptr); }
// Later versions of this function have more outputs, which PyTorch does not read here.
int cudaStreamGetCaptureInfo(void* stream, int* status, unsigned long long* id) {
    return capture_info(stream, status, id);
}
int cudaStreamGetCaptureInfo_v2(void* stream, int* status, unsigned long long* id) {
    return capture_info(stream, status, id);
}
int cudaStreamGetCaptureInfo_v3(void* stream, int* status, unsigned long long* id) {
    return capture_info(stream, status, id);
}
int cudaStreamBeginCapture(void* stream, int) {
    captures[stream] = {true, true, next_capture++};
    return kSuccess;
}
int cudaStreamEndCapture(void* stream, void** graph) {
    Capture& capture = captures[stream];
    capture.active = false;
    *graph = capture.valid ? new_handle() : nullptr;
    return capture.valid ? kSuccess : kCaptureInvalidated;
}
int cudaGraphGetNodes(void*, void*, size_t* count) { *count = 1; return kSuccess; }
int cudaGraphInstantiate(void** executable, void*, unsigned long long) { *executable = new_handle(); return kSuccess; }
int cudaGraphInstantiateWithFlags(void** executable, void*, unsigned long long) {
    *executable = new_handle();
    return kSuccess;
}
int cudaGraphDestroy(void*) { return kSuccess; }
int cudaGraphExecDestroy(void*) { return kSuccess; }
int cudaGraphLaunch(void*, void*) { return kSuccess; }
int cudaLaunchKernel(const void*, Dimensions, Dimensions, void**, size_t, void*) { return kSuccess; }
}
