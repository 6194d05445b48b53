// A CUDA runtime and driver without a GPU: enough for PyTorch to believe that it has one, as long as tensors are fake.
//
// launches.py preloads it. Streams, events and memory are never touched, so most functions have nothing to do; what
// makes the host wait for the GPU fails.

#include <cstddef>
#include <cstring>

namespace {

constexpr int kSuccess = 0;
constexpr int kStreamCaptureUnsupported = 900;  // what waiting comes to while a CUDA graph is recorded

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
};

}  // namespace

extern "C" {

int cudaGetDeviceCount(int* count) { *count = 1; return kSuccess; }
int cudaGetDevice(int* device) { *device = 0; return kSuccess; }
int cudaSetDevice(int) { return kSuccess; }
int cudaDeviceGetAttribute(int* value, int, int) { *value = 1; return kSuccess; }
int cudaDriverGetVersion(int* version) { *version = 1000 * CUDA_MAJOR; return kSuccess; }
int cudaGetLastError() { return kSuccess; }

int fill(Properties* properties) {
    std::strcpy(properties->name, "stub");
    properties->total_memory = size_t{80} << 30;
    properties->warp_size = 32;
    properties->major = 9;  // an H100
    properties->minor = 0;
    return kSuccess;
}
int cudaGetDeviceProperties(Properties* properties, int) { return fill(properties); }
int cudaGetDeviceProperties_v2(Properties* properties, int) { return fill(properties); }  // its name in CUDA 12

int cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0; *greatest = -5; return kSuccess; }
int cudaStreamCreateWithPriority(void** stream, unsigned, int) { *stream = reinterpret_cast<void*>(1); return kSuccess; }
int cudaStreamIsCapturing(void*, int* status) { *status = 0; return kSuccess; }
int cudaStreamGetCaptureInfo(void*, int* status) { *status = 0; return kSuccess; }
int cudaStreamGetCaptureInfo_v2(void*, int* status) { *status = 0; return kSuccess; }
int cudaStreamGetCaptureInfo_v3(void*, int* status) { *status = 0; return kSuccess; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cudaStreamQuery(void*) { return kSuccess; }
int cudaEventCreateWithFlags(void** event, unsigned) { *event = reinterpret_cast<void*>(1); return kSuccess; }
int cudaEventRecord(void*, void*) { return kSuccess; }
int cudaEventRecordWithFlags(void*, void*, unsigned) { return kSuccess; }
int cudaEventQuery(void*) { return kSuccess; }
int cudaEventDestroy(void*) { return kSuccess; }
int cudaMalloc(void** memory, size_t) { *memory = reinterpret_cast<void*>(size_t{1} << 40); return kSuccess; }
int cudaFree(void*) { return kSuccess; }
int cudaThreadExchangeStreamCaptureMode(int*) { return kSuccess; }
int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { *flags = 0; *active = 1; return kSuccess; }

int cudaDeviceSynchronize() { return kStreamCaptureUnsupported; }
int cudaStreamSynchronize(void*) { return kStreamCaptureUnsupported; }
int cudaEventSynchronize(void*) { return kStreamCaptureUnsupported; }
}
