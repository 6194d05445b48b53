// Upsample, pad or crop, correlate, downsample; upfirdn2d.py documents the arguments.
//
// A map has H x W pixels of `inner` elements each: a contiguous [B, C, H, W] is B * C maps with inner = 1, and
// channels_last is B maps with inner = C. Adjacent threads compute adjacent output elements, so that loads and stores
// are coalesced. Inputs shared by several threads come from the L1 cache: no shared memory, no barriers.
#include "kernels.h"

template <class T> struct Resample {
    const T* x;
    const Computed<T>* f;  // fh x fw taps, or a vector of fh = fw taps applied along both axes
    T* y;
    int64_t maps;
    int H, W, OH, OW, inner;
    int fh, fw, up_x, up_y, down_x, down_y, pad_x, pad_y;
    bool vector, flip;  // flip: correlate with f itself; otherwise with f rotated by 180 degrees (convolution)
    Computed<T> gain;
    int shift_x, shift_y;  // offset of the first tile before the output
    bool pairs;            // a row of a tile can be written with one store
};

// Return tap (ky, kx) of the correlation.
template <class T> __device__ __forceinline__ Computed<T> tap(const Resample<T>& a, int ky, int kx) {
    ky = a.flip ? ky : a.fh - 1 - ky;
    kx = a.flip ? kx : a.fw - 1 - kx;
    return a.vector ? a.f[ky] * a.f[kx] : a.f[ky * a.fw + kx];
}

struct Position {
    int64_t map;
    int y, x, c;
};

// Thread numbering: maps x rows x columns x depth, depth fastest.
struct Order {
    int64_t total;
    Divisor rows, columns, depth;

    Order(int64_t maps, int rows, int columns, int depth)
        : total(maps * rows * columns * depth), rows(rows), columns(columns), depth(depth) {}
};

template <class Index> __device__ __forceinline__ Position position(Index i, const Order& order) {
    const Index cell = divide(i, order.depth), line = divide(cell, order.columns), map = divide(line, order.rows);
    return {static_cast<int64_t>(map), static_cast<int>(line - map * static_cast<Index>(order.rows.d)),
            static_cast<int>(cell - line * static_cast<Index>(order.columns.d)),
            static_cast<int>(i - cell * static_cast<Index>(order.depth.d))};
}

// Return the output position of this thread; map -1 for threads beyond the last position.
__device__ __forceinline__ Position this_position(const Order& order) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= order.total) return {-1, 0, 0, 0};
    if (order.total <= INDEX_LIMIT) return position(static_cast<uint32_t>(i), order);
    return position(static_cast<uint64_t>(i), order);
}

// Generic kernel for any factors, padding and filter: one output per thread, skipping taps on inserted zeros.
template <class T> __global__ void any_kernel(Resample<T> a, Order order) {
    const Position p = this_position(order);
    if (p.map < 0) return;
    // Position of tap (0, 0) on the upsampled grid.
    const int ux = p.x * a.down_x - a.pad_x, uy = p.y * a.down_y - a.pad_y;
    const int left = ux > 0 ? (ux + a.up_x - 1) / a.up_x : 0;  // first sample under the filter
    const int top = uy > 0 ? (uy + a.up_y - 1) / a.up_y : 0;
    const T* map = a.x + p.map * a.H * a.W * a.inner + p.c;
    Computed<T> sum = 0;
    for (int iy = top, ky = top * a.up_y - uy; iy < a.H && ky < a.fh; ++iy, ky += a.up_y)
        for (int ix = left, kx = left * a.up_x - ux; ix < a.W && kx < a.fw; ++ix, kx += a.up_x)
            sum += tap(a, ky, kx) * load(map[(int64_t(iy) * a.W + ix) * a.inner]);
    store(a.y[((p.map * a.OH + p.y) * a.OW + p.x) * a.inner + p.c], sum * a.gain);
}

// Factors, filter size and tile size of a specialised kernel. SPLIT: the filter is a vector applied along both axes.
template <int UX_, int UY_, int DX_, int DY_, int FW_, int FH_, bool SPLIT_, int TX_, int TY_> struct Shape {
    static constexpr int UX = UX_, UY = UY_, DX = DX_, DY = DY_, FW = FW_, FH = FH_, TX = TX_, TY = TY_;
    static constexpr bool SPLIT = SPLIT_;
    static constexpr int COLUMNS = ((TX - 1) * DX + FW - 1) / UX + 1;  // samples under a tile of outputs
    static constexpr int ROWS = ((TY - 1) * DY + FH - 1) / UY + 1;
    static_assert(TX % UX == 0 && TY % UY == 0, "a tile starts on a sample");
};

// Accumulate the correlation of a row of samples with a row of taps into TX outputs.
template <class P, class S, int VEC>
__device__ __forceinline__ void correlate(const S (&f)[P::FW], const S (&v)[P::COLUMNS][VEC], S (&sum)[P::TX][VEC]) {
#pragma unroll
    for (int tx = 0; tx < P::TX; ++tx)
#pragma unroll
        for (int kx = 0; kx < P::FW; ++kx)
#pragma unroll
            for (int k = 0; k < VEC; ++k)
                if ((tx * P::DX + kx) % P::UX == 0) sum[tx][k] += f[kx] * v[(tx * P::DX + kx) / P::UX][k];
}

// Each thread computes TY x TX outputs in VEC adjacent channels; VEC = 1 requires inner = 1. Samples are loaded
// once, row by row, and accumulated into all outputs that they contribute to. All loops are unrolled, so that sums and
// taps stay in registers and taps on inserted zeros are eliminated.
template <class T, int VEC, class P> __global__ void tile_kernel(Resample<T> a, Order order) {
    using S = Computed<T>;
    const Position p = this_position(order);
    if (p.map < 0) return;
    const int ox = p.x * P::TX - a.shift_x, oy = p.y * P::TY - a.shift_y;
    // The first sample. The division is exact because of the shift.
    const int left = (ox * P::DX - a.pad_x) / P::UX, top = (oy * P::DY - a.pad_y) / P::UY;

    S f[P::SPLIT ? 1 : P::FH][P::FW];
    [[maybe_unused]] S fy[P::FH];
#pragma unroll
    for (int kx = 0; kx < P::FW; ++kx) {
        if constexpr (P::SPLIT) {
            static_assert(P::FH == P::FW, "the vector acts along both axes");
            f[0][kx] = a.f[a.flip ? kx : P::FW - 1 - kx];
            fy[kx] = a.gain * f[0][kx];
        } else {
#pragma unroll
            for (int ky = 0; ky < P::FH; ++ky) f[ky][kx] = a.gain * tap(a, ky, kx);
        }
    }

    // With VEC = 1 the stride along x is a compile-time constant, so addresses need no computation.
    const int step = VEC == 1 ? 1 : a.inner;
    const T* row = a.x + ((p.map * a.H + top) * a.W + left) * step + p.c * VEC;  // dereferenced only inside the map
    S sum[P::TY][P::TX][VEC] = {};
#pragma unroll
    for (int r = 0; r < P::ROWS; ++r) {
        const bool inside = static_cast<unsigned>(top + r) < static_cast<unsigned>(a.H);
        S v[P::COLUMNS][VEC];
#pragma unroll
        for (int c = 0; c < P::COLUMNS; ++c) {
            const bool met = inside && static_cast<unsigned>(left + c) < static_cast<unsigned>(a.W);
            const auto pack = read_if<T, VEC>(met, row + c * step);
#pragma unroll
            for (int k = 0; k < VEC; ++k) v[c][k] = load(pack.v[k]);
        }
        row += int64_t(a.W) * step;
        if constexpr (P::SPLIT) {
            S along[P::TX][VEC] = {};
            correlate<P>(f[0], v, along);
#pragma unroll
            for (int ty = 0; ty < P::TY; ++ty) {
                const int ky = r * P::UY - ty * P::DY;  // tap of output row ty on this row
#pragma unroll
                for (int i = 0; i < P::TX * VEC; ++i)
                    if (ky >= 0 && ky < P::FH) sum[ty][i / VEC][i % VEC] += fy[ky] * along[i / VEC][i % VEC];
            }
        } else {
#pragma unroll
            for (int ty = 0; ty < P::TY; ++ty) {
                const int ky = r * P::UY - ty * P::DY;
                if (ky >= 0 && ky < P::FH) correlate<P>(f[ky], v, sum[ty]);
            }
        }
    }

    T* to = a.y + ((p.map * a.OH + oy) * a.OW + ox) * step + p.c * VEC;
#pragma unroll
    for (int ty = 0; ty < P::TY; ++ty, to += int64_t(a.OW) * step) {
        if (static_cast<unsigned>(oy + ty) >= static_cast<unsigned>(a.OH)) continue;
        if (VEC == 1 && P::TX > 1 && a.pairs) {
            Pack<T, P::TX> pack;
#pragma unroll
            for (int tx = 0; tx < P::TX; ++tx) store(pack.v[tx], sum[ty][tx][0]);
            *reinterpret_cast<Pack<T, P::TX>*>(to) = pack;
            continue;
        }
#pragma unroll
        for (int tx = 0; tx < P::TX; ++tx) {
            if (static_cast<unsigned>(ox + tx) >= static_cast<unsigned>(a.OW)) continue;
            Pack<T, VEC> pack;
#pragma unroll
            for (int k = 0; k < VEC; ++k) store(pack.v[k], sum[ty][tx][k]);
            *reinterpret_cast<Pack<T, VEC>*>(to + tx * step) = pack;
        }
    }
}

template <class Kernel, class T>
int launch(Kernel kernel, const Resample<T>& a, const Order& order, cudaStream_t stream) {
    constexpr int THREADS = 128;
    const int64_t blocks = (order.total + THREADS - 1) / THREADS;
    if (blocks > INT_MAX) return cudaErrorInvalidValue;
    LAUNCH(kernel, static_cast<unsigned>(blocks), THREADS, stream, a, order);
    return cudaGetLastError();
}

template <class T> int launch_any(const Resample<T>& a, cudaStream_t stream) {
    return launch(any_kernel<T>, a, Order(a.maps, a.OH, a.OW, a.inner), stream);
}

template <class T, int VEC, class P> int launch_tiles(Resample<T> a, cudaStream_t stream) {
    // Shift the tiles so that each starts on a sample: the phase of every output is then a compile-time constant.
    a.shift_x = ((-a.pad_x % P::UX) + P::UX) % P::UX;
    a.shift_y = ((-a.pad_y % P::UY) + P::UY) % P::UY;
    const int columns = (a.OW + a.shift_x + P::TX - 1) / P::TX, rows = (a.OH + a.shift_y + P::TY - 1) / P::TY;
    a.pairs = a.shift_x == 0 && a.OW % P::TX == 0 && aligned(a.y, sizeof(T) * P::TX);
    return launch(tile_kernel<T, VEC, P>, a, Order(a.maps, rows, columns, VEC == 1 ? 1 : a.inner / VEC), stream);
}

// Resampling of the networks: 4 x 4 taps, up by 2, down by 2 or neither. Returns -1 for other arguments.
template <class T, int VEC, bool SPLIT> int launch_four(const Resample<T>& a, cudaStream_t stream) {
    if (a.fh != 4 || a.fw != 4 || a.up_x != a.up_y || a.down_x != a.down_y) return -1;
    // The outputs of a wide tile share samples and addresses. 16-bit types benefit most: each load yields twice as
    // many elements.
    constexpr int WIDE = VEC > 1 ? 1 : sizeof(T) == 2 ? 4 : 2;
    constexpr int WIDE_UP = WIDE > 2 ? WIDE : 2, TALL_UP = VEC == 1 ? 8 : 4, WIDE_DOWN = VEC == 1 ? 2 : 1;
    const bool up = a.up_x == 2 && a.down_x == 1, down = a.up_x == 1 && a.down_x == 2;
    if (up) return launch_tiles<T, VEC, Shape<2, 2, 1, 1, 4, 4, SPLIT, WIDE_UP, TALL_UP>>(a, stream);
    if (down) return launch_tiles<T, VEC, Shape<1, 1, 2, 2, 4, 4, SPLIT, WIDE_DOWN, 4>>(a, stream);
    if (a.up_x == 1 && a.down_x == 1) return launch_tiles<T, VEC, Shape<1, 1, 1, 1, 4, 4, SPLIT, WIDE, 8>>(a, stream);
    return -1;
}

// Resampling of the augmentation: 12 taps along one axis, up or down by 2. Returns -1 for other arguments.
template <class T> int launch_twelve(const Resample<T>& a, cudaStream_t stream) {
    const bool row = a.fh == 1 && a.fw == 12 && a.up_y == 1 && a.down_y == 1;
    const bool column = a.fh == 12 && a.fw == 1 && a.up_x == 1 && a.down_x == 1;
    if (row && a.up_x == 2 && a.down_x == 1)
        return launch_tiles<T, 1, Shape<2, 1, 1, 1, 12, 1, false, 2, 4>>(a, stream);
    if (row && a.up_x == 1 && a.down_x == 2)
        return launch_tiles<T, 1, Shape<1, 1, 2, 1, 12, 1, false, 1, 4>>(a, stream);
    if (column && a.up_y == 2 && a.down_y == 1)
        return launch_tiles<T, 1, Shape<1, 2, 1, 1, 1, 12, false, 1, 8>>(a, stream);
    if (column && a.up_y == 1 && a.down_y == 2)
        return launch_tiles<T, 1, Shape<1, 1, 1, 2, 1, 12, false, 1, 4>>(a, stream);
    return -1;
}

template <class T> int launch_resample(const Resample<T>& a, cudaStream_t stream) {
    constexpr int VEC = 8 / sizeof(T);
    int error = -1;
    if (a.inner == 1) {
        error = a.vector ? launch_four<T, 1, true>(a, stream) : launch_four<T, 1, false>(a, stream);
        if (error < 0) error = launch_twelve(a, stream);
    } else if (a.vector && a.inner % VEC == 0 && aligned(a.x, 8) && aligned(a.y, 8)) {
        error = launch_four<T, VEC, true>(a, stream);
    }
    return error < 0 ? launch_any(a, stream) : error;
}

// double is only used to check derivatives, so the generic kernel is sufficient.
template <> int launch_resample<double>(const Resample<double>& a, cudaStream_t stream) {
    return launch_any(a, stream);
}

// Resample `maps` maps of `dtype`; f is float, or double if `dtype` is double.
extern "C" int upfirdn2d(int dtype, const void* x, const void* f, void* y, int64_t maps, int64_t H, int64_t W,
                         int64_t OH, int64_t OW, int64_t inner, int64_t fh, int64_t fw, int64_t up_x, int64_t up_y,
                         int64_t down_x, int64_t down_y, int64_t pad_x, int64_t pad_y, int vector, int flip,
                         double gain, cudaStream_t stream) {
    // Positions on the upsampled grid are int, with headroom for a tile beyond the edge.
    const int64_t limit = INT_MAX / 4;
    for (int64_t extent : {H * up_y, W * up_x, OH * down_y, OW * down_x, inner, fh, fw, pad_x, -pad_x, pad_y, -pad_y})
        if (extent > limit) return cudaErrorInvalidValue;
    return with_dtype(dtype, [&](auto zero) -> int {
        using T = decltype(zero);
        using S = Computed<T>;
        const auto i = [](int64_t n) { return static_cast<int>(n); };
        const Resample<T> a = {static_cast<const T*>(x), static_cast<const S*>(f), static_cast<T*>(y), maps, i(H), i(W),
                               i(OH), i(OW), i(inner), i(fh), i(fw), i(up_x), i(up_y), i(down_x), i(down_y), i(pad_x),
                               i(pad_y), vector != 0, flip != 0, static_cast<S>(gain), 0, 0, false};
        return launch_resample(a, stream);
    });
}
