// clamp(gain * act(x + b), -clamp, clamp) and its derivatives; bias_act.py documents the arguments.
//
// Each thread loads and stores 16 bytes per instruction. The forward pass reads x once and writes y once.
#include "kernels.h"

// In the order of ACTIVATIONS in bias_act.py.
enum Act : int { LINEAR, RELU, LRELU, TANH, SIGMOID, ELU, SELU, SOFTPLUS, SWISH, NUM_ACTS };
constexpr int ANY = NUM_ACTS;  // activation selected at run time

constexpr double SELU_SCALE = 1.0507009873554804934193349852946, SELU_ALPHA = 1.6732632423543772848170429916717;

template <class S> __device__ __forceinline__ S sigmoid(S x) { return S(1) / (S(1) + exp(-x)); }

template <class S> __device__ __forceinline__ S value(int act, S x, S alpha) {
    switch (act) {
        case RELU: return x < S(0) ? S(0) : x;  // propagates NaN
        case LRELU: return x > S(0) ? x : x * alpha;
        case TANH: return tanh(x);
        case SIGMOID: return sigmoid(x);
        case ELU: return x > S(0) ? x : alpha * expm1(x);
        case SELU: return S(SELU_SCALE) * (x > S(0) ? x : S(SELU_ALPHA) * expm1(x));
        case SOFTPLUS: return (x > S(0) ? x : S(0)) + log1p(exp(-fabs(x)));
        case SWISH: return x * sigmoid(x);
    }
    return x;
}

template <class S> __device__ __forceinline__ S first_derivative(int act, S x, S alpha) {
    const S s = act == TANH ? tanh(x) : sigmoid(x);
    switch (act) {
        case RELU: return x > S(0) ? S(1) : S(0);
        case LRELU: return x > S(0) ? S(1) : alpha;
        case TANH: return S(1) - s * s;
        case SIGMOID: return s * (S(1) - s);
        case ELU: return x > S(0) ? S(1) : alpha * exp(x);
        case SELU: return S(SELU_SCALE) * (x > S(0) ? S(1) : S(SELU_ALPHA) * exp(x));
        case SOFTPLUS: return s;
        case SWISH: return s * (S(1) + x * (S(1) - s));
    }
    return S(1);
}

template <class S> __device__ __forceinline__ S second_derivative(int act, S x, S alpha) {
    const S s = act == TANH ? tanh(x) : sigmoid(x);
    switch (act) {
        case TANH: return S(-2) * s * (S(1) - s * s);
        case SIGMOID: return s * (S(1) - s) * (S(1) - S(2) * s);
        case ELU: return x > S(0) ? S(0) : alpha * exp(x);
        case SELU: return x > S(0) ? S(0) : S(SELU_SCALE) * S(SELU_ALPHA) * exp(x);
        case SOFTPLUS: return s * (S(1) - s);
        case SWISH: return s * (S(1) - s) * (S(2) + x * (S(1) - S(2) * s));
    }
    return S(0);
}

template <class T> struct BiasAct {
    const T* in;     // order 0: x; order 1: gradient of y; order 2: gradient of the output of order 1
    const T* grad;   // order 2: gradient of y
    const T* saved;  // order 1 and 2: x, or y if the slope can be computed from y
    const void* b;   // null, or array of Computed<T> if b_computed, else of T
    T* out;
    int64_t size;
    Divisor inner, channels;  // element i belongs to channel i / inner % channels
    Computed<T> alpha, gain, clamp;  // clamp < 0: disabled
    int act;
    bool b_computed, vectors;  // vectors: all pointers are aligned to 16 bytes
    bool b_vectors;            // read b in vectors too; requires that adjacent elements are adjacent channels
};

template <class T> __device__ __forceinline__ Computed<T> bias(const BiasAct<T>& a, int64_t channel) {
    return a.b_computed ? static_cast<const Computed<T>*>(a.b)[channel] : load(static_cast<const T*>(a.b)[channel]);
}

template <class T, int N> __device__ __forceinline__ void read(const T* from, Computed<T> (&to)[N]) {
    const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
    for (int k = 0; k < N; ++k) to[k] = load(pack.v[k]);
}

// Add the bias to elements i, ..., i + N - 1. The first channel is found by division, the following ones by counting.
template <class T, int N, class Index>
__device__ __forceinline__ void add_bias(const BiasAct<T>& a, Index i, Computed<T> (&x)[N]) {
    const Index inner = static_cast<Index>(a.inner.d), channels = static_cast<Index>(a.channels.d);
    const Index row = divide(i, a.inner);
    Index within = i - row * inner, channel = row - divide(row, a.channels) * channels;
    if (N > 1 && a.b_vectors) {  // the channels of the vector are consecutive, without wrap-around
        Computed<T> b[N];
        if (a.b_computed) read(static_cast<const Computed<T>*>(a.b) + channel, b);
        else read(static_cast<const T*>(a.b) + channel, b);
        for (int k = 0; k < N; ++k) x[k] += b[k];
        return;
    }
    Computed<T> b = bias(a, channel);
    if (inner - within >= N) {
        for (int k = 0; k < N; ++k) x[k] += b;
        return;
    }
    for (int k = 0; k < N; ++k) {
        x[k] += b;
        if (k + 1 < N && ++within == inner) {
            within = 0;
            if (++channel == channels) channel = 0;
            b = bias(a, channel);
        }
    }
}

template <int ORDER, int ACT, class S>
__device__ __forceinline__ S result(int act, S in, S grad, S saved, S alpha, S gain, S clamp) {
    if (ACT != ANY) act = ACT;
    if (ORDER == 0) {
        const S y = gain * value(act, in, alpha);
        return clamp < S(0) ? y : y > clamp ? clamp : y < -clamp ? -clamp : y;  // propagates NaN
    }
    if (ACT != ANY) {  // saved is y; up to rounding, |y| == clamp exactly where the output was clamped
        const S slope = ACT == LINEAR || saved > S(0) ? S(1) : ACT == LRELU ? alpha : S(0);
        return clamp < S(0) || fabs(saved) < clamp ? in * gain * slope : S(0);
    }
    if (clamp >= S(0) && !(fabs(gain * value(act, saved, alpha)) <= clamp)) return S(0);
    if (ORDER == 1) return in * gain * first_derivative(act, saved, alpha);
    return in * grad * gain * second_derivative(act, saved, alpha);
}

// Process elements i, ..., i + N - 1.
template <int ORDER, int ACT, int N, class T> __device__ __forceinline__ void process(const BiasAct<T>& a, int64_t i) {
    using S = Computed<T>;
    S in[N], grad[N] = {}, saved[N] = {};
    read(a.in + i, in);
    if (ORDER == 2) read(a.grad + i, grad);
    if (ORDER != 0) read(a.saved + i, saved);
    if (a.b) {
        S(&x)[N] = ORDER == 0 ? in : saved;
        if (a.size <= INDEX_LIMIT) add_bias(a, static_cast<uint32_t>(i), x);
        else add_bias(a, static_cast<uint64_t>(i), x);
    }
    Pack<T, N> y;
    for (int k = 0; k < N; ++k)
        store(y.v[k], result<ORDER, ACT>(a.act, in[k], grad[k], saved[k], a.alpha, a.gain, a.clamp));
    *reinterpret_cast<Pack<T, N>*>(a.out + i) = y;
}

template <class T, int ORDER, int ACT> __global__ void bias_act_kernel(BiasAct<T> a) {
    constexpr int N = 16 / sizeof(T);
    const int64_t step = int64_t(gridDim.x) * blockDim.x * N;
    for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < a.size; i += step) {
        if (a.vectors && i + N <= a.size) {
            process<ORDER, ACT, N>(a, i);
        } else {
#pragma unroll 1
            for (int64_t k = i; k < a.size && k < i + N; ++k) process<ORDER, ACT, 1>(a, k);
        }
    }
}

template <class T, int ORDER> int launch_order(const BiasAct<T>& a, bool from_output, cudaStream_t stream) {
    auto kernel = bias_act_kernel<T, ORDER, ANY>;
    if (ORDER == 0 || (ORDER == 1 && from_output)) {
        constexpr int FAST = ORDER == 2 ? 1 : ORDER;
        if (a.act == LINEAR) kernel = bias_act_kernel<T, FAST, LINEAR>;
        if (a.act == RELU) kernel = bias_act_kernel<T, FAST, RELU>;
        if (a.act == LRELU) kernel = bias_act_kernel<T, FAST, LRELU>;
    }
    constexpr int THREADS = 256, N = 16 / sizeof(T);
    const int64_t blocks = (a.size + int64_t(THREADS) * N - 1) / (int64_t(THREADS) * N);
    LAUNCH(kernel, static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20), THREADS, stream, a);
    return cudaGetLastError();
}

// Launch the kernel of order 0, 1 or 2 on `size` elements. `b_dtype` is `dtype` or its compute type.
extern "C" int bias_act(int dtype, int order, const void* in, const void* grad, const void* saved, const void* b,
                        int b_dtype, void* out, int64_t size, int64_t inner, int64_t channels, int act, int from_output,
                        double alpha, double gain, double clamp, cudaStream_t stream) {
    return with_dtype(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        using S = Computed<T>;
        T edge;  // clamp rounded to T, because it is compared with y, which was rounded to T
        store(edge, static_cast<S>(clamp));
        const bool vectors = aligned(in, 16) && aligned(grad, 16) && aligned(saved, 16) && aligned(out, 16);
        const bool b_vectors = inner == 1 && channels % (16 / sizeof(T)) == 0 && aligned(b, 16);
        const BiasAct<T> a = {static_cast<const T*>(in), static_cast<const T*>(grad), static_cast<const T*>(saved), b,
                              static_cast<T*>(out), size, Divisor(inner), Divisor(channels), static_cast<S>(alpha),
                              static_cast<S>(gain), from_output ? load(edge) : static_cast<S>(clamp), act,
                              b_dtype != dtype, vectors, b_vectors};
        switch (order) {
            case 0: return launch_order<T, 0>(a, false, stream);
            case 1: return launch_order<T, 1>(a, from_output, stream);
            case 2: return launch_order<T, 2>(a, false, stream);
        }
        return cudaErrorInvalidValue;
    });
}

// Return cudaSuccess if the library contains code for the current device, else an error.
extern "C" int probe() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, bias_act_kernel<float, 0, LINEAR>);
}

extern "C" const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
