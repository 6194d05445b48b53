// What the kernels share: types of numbers, vectors of them, and how a kernel is launched.
//
// Without nvcc the same sources compile for the host: cuda_on_cpu.h of the tests stands in for CUDA then, and every
// thread of a launch runs in a loop.
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

// Numbers are computed in float, and double in double.
template <class T> struct Compute { using type = float; };
template <> struct Compute<double> { using type = double; };
template <class T> using Computed = typename Compute<T>::type;

// For the host too: without a word, nvcc makes a call of device code there one of exit().
__host__ __device__ __forceinline__ float load(const float& x) { return x; }
__host__ __device__ __forceinline__ double load(const double& x) { return x; }
__host__ __device__ __forceinline__ float load(const __half& x) { return __half2float(x); }
__host__ __device__ __forceinline__ float load(const __nv_bfloat16& x) { return __bfloat162float(x); }

__host__ __device__ __forceinline__ void store(float& to, float x) { to = x; }
__host__ __device__ __forceinline__ void store(double& to, double x) { to = x; }
__host__ __device__ __forceinline__ void store(__half& to, float x) { to = __float2half_rn(x); }
__host__ __device__ __forceinline__ void store(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

// N numbers that move in one instruction.
template <class T, int N> struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Pack { T v[N]; };

// Read a Pack, or zeros. It travels as whole words, since a choice between numbers of 16 bits is made one by one.
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

// Up to here places are counted in 32 bits. Tests set it to 0.
#ifndef INDEX_LIMIT
#define INDEX_LIMIT INT_MAX
#endif

// Division by a number that is known at launch, for numbers below 2^31 by a multiplication:
// i / d = floor(i m / 2^p) with p = 31 + ceil(log2 d), m = floor(2^p / d) + 1 < 2^32, because i (m d - 2^p) < 2^p.
struct Divisor {
    uint64_t d;
    uint32_t multiplier = 0;  // for d beyond all that is divided: everything becomes 0
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
