// Helpers shared by the kernels: element types, vector loads, index division, kernel launch.
//
// Without nvcc the same sources compile for the host: cuda_on_cpu.h of the tests then replaces CUDA and runs the
// threads of a launch in a loop.
#pragma once
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, stream, ...) (kernel)<<<(blocks), (threads), 0, (stream)>>>(__VA_ARGS__)
#else
#include "cuda_on_cpu.h"
#endif

enum Dtype : int { FLOAT32 = 0, FLOAT64 = 1, FLOAT16 = 2, BFLOAT16 = 3 };

// Compute type: double for double, float for all other types.
template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class T> using Computed = typename Compute<T>::type;

// Also for the host: nvcc silently compiles a host call of a device function to exit().
__host__ __device__ __forceinline__ float load(const float& x) { return x; }
__host__ __device__ __forceinline__ double load(const double& x) { return x; }
__host__ __device__ __forceinline__ float load(const __half& x) { return __half2float(x); }
__host__ __device__ __forceinline__ float load(const __nv_bfloat16& x) { return __bfloat162float(x); }

__host__ __device__ __forceinline__ void store(float& to, float x) { to = x; }
__host__ __device__ __forceinline__ void store(double& to, double x) { to = x; }
__host__ __device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__host__ __device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N elements that are loaded or stored with one instruction.
template <class T, int N> struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack { T v[N]; };

// Read a Pack, or zeros if `condition` is false. The data is selected in 32-bit words, because the compiler would
// select 16-bit elements one by one.
template <int BYTES> struct alignas(BYTES) Words { uint32_t w[BYTES / 4]; };
template <> struct Words<2> { uint16_t w; };
template <class T, int N> __device__ __forceinline__ Pack<T, N> read_if(bool condition, const T* from) {
    Words<sizeof(T) * N> words = {};
    if (condition) words = *reinterpret_cast<const Words<sizeof(T) * N>*>(from);
    Pack<T, N> pack;
    memcpy(&pack, &words, sizeof(pack));
    return pack;
}

inline bool aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Call `body` with a value of the C++ type of `dtype`; `body` returns a cudaError_t.
template <class Body> int with_dtype(int dtype, Body body) {
    switch (dtype) {
        case FLOAT32: return body(float());
        case FLOAT64: return body(double());
        case FLOAT16: return body(__half());
        case BFLOAT16: return body(__nv_bfloat16());
    }
    return cudaErrorInvalidValue;
}

// Sizes up to this limit use 32-bit indices. Tests set it to 0.
#ifndef INDEX_LIMIT
#define INDEX_LIMIT INT_MAX
#endif

// Division by an integer that is known at launch. Dividends below 2^31 are divided by a multiplication:
// i / d = floor(i m / 2^p) with p = 31 + ceil(log2 d), m = floor(2^p / d) + 1 < 2^32, because i (m d - 2^p) < 2^p.
struct Divisor {
    uint64_t d;
    uint32_t multiplier = 0;  // 0 for d > INT_MAX: every 32-bit quotient is 0
    int shift = 31;

    explicit Divisor(int64_t divisor) : d(divisor) {
        if (d > INT_MAX) return;
        while (uint64_t(1) << (shift - 31) < d) ++shift;
        multiplier = static_cast<uint32_t>((uint64_t(1) << shift) / d + 1);
    }
};

__device__ __forceinline__ uint32_t divide(uint32_t i, const Divisor& by) {
    return static_cast<uint32_t>(uint64_t(i) * by.multiplier >> by.shift);
}
__device__ __forceinline__ uint64_t divide(uint64_t i, const Divisor& by) { return i / by.d; }
