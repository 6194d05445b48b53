// The part of CUDA that the kernels use, on the host: g++ -x c++ compiles the .cu files with this header in place of
// CUDA's. Each thread of a launch runs to completion before the next thread starts, so kernels cannot have barriers.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline

struct Dim3 { unsigned x; };
inline thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaErrorInvalidValue = 1;
inline int cudaGetLastError() { return 0; }
inline const char* cudaGetErrorString(int) { return "CUDA is not available"; }
struct cudaFuncAttributes {};
template <class Kernel> int cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) { return 0; }

template <class Kernel, class... Args>
void launch_on_cpu(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(args...);
}
#define LAUNCH(kernel, blocks, threads, stream, ...) \
    (static_cast<void>(stream), launch_on_cpu(kernel, blocks, threads, __VA_ARGS__))

struct __half { uint16_t bits; };
struct __nv_bfloat16 { uint16_t bits; };

inline uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // half to even
}

inline float __half2float(__half x) {
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
    const float sign = x.bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
    return sign * std::ldexp(float(fraction + 1024), int(exponent) - 25);
}

inline __half __float2half_rn(float x) {
    const uint16_t sign = uint16_t(bits_of(x) >> 16 & 0x8000);
    if (x != x) return {0x7fff};
    const float size = std::fabs(x);
    if (size >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    int exponent;
    std::frexp(size, &exponent);  // size = m * 2^exponent, 0.5 <= m < 1
    exponent = size == 0 ? -13 : std::max(exponent, -13);
    const float steps = std::nearbyint(std::ldexp(size, 11 - exponent));  // half to even; 2048 carries into the exponent
    return {uint16_t(sign | uint16_t(steps + float((exponent + 13) << 10)))};
}
