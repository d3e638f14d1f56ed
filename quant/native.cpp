// The quantizers' elementwise arithmetic for a CPU: one pass forward, one backward. Called by quant/native.py.
//
// Formulas are those of quant/kernels.py. Tensors are rows of values in memory order with a step for each row; float32
// or bfloat16, the arithmetic in between is float32. Sums are taken over chunks of a fixed size and returned apart, so
// they do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t CHUNK = 16384;  // as in native.py; three float buffers of it fit into a second-level cache

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float& value) { return value; }

inline float load(const BFloat16& value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline void store(float& target, float value) { target = value; }

inline void store(BFloat16& target, float value) {  // rounds half to even, as torch does
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  target.bits = value != value ? uint16_t(0x7fc0) : uint16_t(rounded);
}

// Comparisons in this form, here and where gradients are cut off, let NaN through: a diverged network must show it.
inline float clip(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

inline float level(float value, float step, float low, float high) {
  return clip(std::nearbyint(value / step), low, high) * step;
}

// exp(x) for |x| <= 80, relative error under 3e-7: 2^k exp(r) with |r| <= ln(2) / 2, whose Taylor series ends at r^7.
inline float exponential(float x) {
  const float k = std::nearbyint(x * 1.44269504f);
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  float sum = 1.0f / 720 + r * (1.0f / 5040);
  sum = 1.0f / 120 + r * sum;
  sum = 1.0f / 24 + r * sum;
  sum = 1.0f / 6 + r * sum;
  sum = 0.5f + r * sum;
  sum = 1.0f + r * sum;
  sum = 1.0f + r * sum;
  const int32_t bits = (int32_t(k) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// Factors of channels: the value at place i, in memory order, has factor values[i / inner % channels]. Without values
// nothing is multiplied.
struct Factors {
  const float* values;
  int64_t channels, inner;

  // to[i] = from[i] * factor of place first + i; to may be from.
  template <class T>
  void multiply(const T* from, T* to, int64_t first, int64_t count) const {
    int64_t channel = first / inner % channels, left = inner - first % inner;
    for (int64_t done = 0; done < count;) {
      if (inner == 1) {  // channels last
        const int64_t length = std::min(channels - channel, count - done);
        const float* row = values + channel;
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) store(to[done + i], load(from[done + i]) * row[i]);
        done += length, channel = 0;
      } else {
        const int64_t length = std::min(left, count - done);
        const float factor = values[channel];
#pragma omp simd
        for (int64_t i = 0; i < length; ++i) store(to[done + i], load(from[done + i]) * factor);
        done += length, left = inner, channel = channel + 1 == channels ? 0 : channel + 1;
      }
    }
  }

  // The chunk of x that is quantized: x itself, or the product in `room`.
  template <class T>
  const T* apply(const T* x, T* room, int64_t first, int64_t count) const {
    if (!values) return x + first;
    multiply(x + first, room, first, count);
    return room;
  }

  // A chunk of the gradient of the product becomes that of x.
  template <class T>
  void turn_back(T* chunk, int64_t first, int64_t count) const {
    if (values) multiply(chunk, chunk, first, count);
  }
};

// body(number of the chunk, row, first value, count) for all chunks of all rows.
template <class Body>
void each_chunk(int64_t rows, int64_t columns, int threads, Body body) {
  const int64_t in_row = (columns + CHUNK - 1) / CHUNK, chunks = rows * in_row;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t row = chunk / in_row, start = chunk % in_row * CHUNK;
    body(chunk, row, row * columns + start, std::min(CHUNK, columns - start));
  }
}

template <class T>
void staircase(const T* x, T* y, int64_t rows, int64_t columns, Factors factors, const float* steps, float low,
               float high, int threads) {
  each_chunk(rows, columns, threads, [=](int64_t, int64_t row, int64_t first, int64_t count) {
    const float step = steps[row];
    T room[CHUNK];
    const T* from = factors.apply(x, room, first, count);
    T* to = y + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(to[i], level(load(from[i]), step, low, high));
  });
}

template <class T>
void uniform_backward(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns, Factors factors,
                      const float* steps, float low, float high, double* sums, int threads) {
  each_chunk(rows, columns, threads, [=](int64_t chunk, int64_t row, int64_t first, int64_t count) {
    const float step = steps[row], lowest = low * step, highest = high * step;
    T room[CHUNK];
    const T *up = gradient + first, *from = factors.apply(x, room, first, count);
    T* to = out + first;
    float by_step = 0, outside = 0;
#pragma omp simd reduction(+ : by_step, outside)
    for (int64_t i = 0; i < count; ++i) {
      const float g = load(up[i]), value = load(from[i]);
      const float passed = value <= lowest || value >= highest ? 0.0f : g;
      by_step += g * level(value, step, low, high) - passed * value;
      outside += g - passed;
      store(to[i], passed);
    }
    factors.turn_back(to, first, count);
    sums[2 * chunk] = by_step, sums[2 * chunk + 1] = outside;
  });
}

template <class T>
void clipped_backward(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns, Factors factors,
                      const float*, float low, float high, double* sums, int threads) {
  each_chunk(rows, columns, threads, [=](int64_t chunk, int64_t, int64_t first, int64_t count) {
    T room[CHUNK];
    const T *up = gradient + first, *from = factors.apply(x, room, first, count);
    T* to = out + first;
    float all = 0, inside = 0, above = 0;
#pragma omp simd reduction(+ : all, inside, above)
    for (int64_t i = 0; i < count; ++i) {
      const float g = load(up[i]), value = load(from[i]);
      const float passed = value <= low || value >= high ? 0.0f : g;
      all += g, inside += passed, above += value >= high ? g : 0.0f;
      store(to[i], passed);
    }
    factors.turn_back(to, first, count);
    sums[2 * chunk] = above, sums[2 * chunk + 1] = all - inside - above;
  });
}

template <class T>
void soft_backward(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns, Factors factors,
                   const float* steps, float low, float high, float k, float gain, float divisor, double* sums,
                   int threads) {
  each_chunk(rows, columns, threads, [=](int64_t chunk, int64_t row, int64_t first, int64_t count) {
    const float step = steps[row], intervals = high - low;
    T room[CHUNK];
    const T *up = gradient + first, *from = factors.apply(x, room, first, count);
    T* to = out + first;
    float moved = 0, outside = 0, slope = 0, bend = 0;
#pragma omp simd reduction(+ : moved, outside, slope, bend)
    for (int64_t i = 0; i < count; ++i) {
      const float g = load(up[i]), value = load(from[i]);
      const float t = value / step, position = t - low;
      const float passed = position <= 0 || position >= intervals ? 0.0f : g;
      const float turned = k * (position - std::floor(position) - 0.5f);
      const float soft = 1 - 2 / (exponential(2 * turned) + 1);  // tanh
      const float through = passed * (1 - soft * soft) * gain;
      moved += g * (clip(std::nearbyint(t), low, high) * step) - through * value * divisor;
      outside += g - passed;
      slope += through * turned * divisor;
      bend += passed * soft;
      store(to[i], through);
    }
    factors.turn_back(to, first, count);
    double* sum = sums + 4 * chunk;
    sum[0] = moved, sum[1] = outside, sum[2] = slope, sum[3] = bend;
  });
}

// Number of the cell of a value; 0 for NaN, by a mask: with a branch gcc 12 does not vectorize the loop.
inline int32_t cell_of(float value, float inverse_width, float offset, float cells) {
  float position = offset + value * inverse_width;
  position = position > 1.0f ? position : 1.0f;
  position = position < cells ? position : cells;
  return int32_t(position) & -int32_t(value == value);
}

template <class T>
void cell_values(const T* x, T* y, int16_t* numbers, int64_t count, Factors factors, float inverse_width, float offset,
                 float cells, const float* table, int threads) {
  each_chunk(1, count, threads, [=](int64_t, int64_t, int64_t first, int64_t length) {
    T room[CHUNK];
    const T* from = factors.apply(x, room, first, length);
    T* to = y + first;
    int16_t* found = numbers + first;
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      const int32_t cell = cell_of(load(from[i]), inverse_width, offset, cells);
      found[i] = int16_t(cell);
      store(to[i], table[cell]);
    }
  });
}

// The gradient of x by a table of slopes, and the sums of the gradient over each cell: `slices` pairs of tables of
// `cells` sums. Neighbours are often in one cell; with a table for every other value they need not wait for each other.
template <class T>
void cell_backward(const T* gradient, const int16_t* numbers, T* out, int64_t count, Factors factors,
                   const float* slopes, float* sums, int64_t cells, int slices, int threads) {
  const int64_t length = (count + slices - 1) / slices;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int slice = 0; slice < slices; ++slice) {
    const int64_t first = slice * length, last = std::min(count, first + length);
    float *even = sums + 2 * slice * cells, *odd = even + cells;
    int64_t i = first;
    for (int64_t start = first; start < last; start += CHUNK) {
      const int64_t end = std::min(start + CHUNK, last);
#pragma omp simd
      for (int64_t j = start; j < end; ++j) store(out[j], slopes[numbers[j]] * load(gradient[j]));
      factors.turn_back(out + start, start, end - start);
      for (; i + 1 < end; i += 2) {
        even[numbers[i]] += load(gradient[i]);
        odd[numbers[i + 1]] += load(gradient[i + 1]);
      }
    }
    if (i < last) even[numbers[i]] += load(gradient[i]);
  }
}

}  // namespace

#define FACTORS const float *values, int64_t channels, int64_t inner
#define DEFINE(SUFFIX, T)                                                                                             \
  extern "C" void staircase_##SUFFIX(const T* x, T* y, int64_t rows, int64_t columns, FACTORS, const float* steps,    \
                                     float low, float high, int threads) {                                            \
    staircase(x, y, rows, columns, {values, channels, inner}, steps, low, high, threads);                             \
  }                                                                                                                   \
  extern "C" void uniform_backward_##SUFFIX(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns,     \
                                            FACTORS, const float* steps, float low, float high, double* sums,         \
                                            int threads) {                                                            \
    uniform_backward(gradient, x, out, rows, columns, {values, channels, inner}, steps, low, high, sums, threads);    \
  }                                                                                                                   \
  extern "C" void clipped_backward_##SUFFIX(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns,     \
                                            FACTORS, const float* steps, float low, float high, double* sums,         \
                                            int threads) {                                                            \
    clipped_backward(gradient, x, out, rows, columns, {values, channels, inner}, steps, low, high, sums, threads);    \
  }                                                                                                                   \
  extern "C" void soft_backward_##SUFFIX(const T* gradient, const T* x, T* out, int64_t rows, int64_t columns,        \
                                         FACTORS, const float* steps, float low, float high, float k, float gain,     \
                                         float divisor, double* sums, int threads) {                                  \
    soft_backward(gradient, x, out, rows, columns, {values, channels, inner}, steps, low, high, k, gain, divisor,     \
                  sums, threads);                                                                                     \
  }                                                                                                                   \
  extern "C" void cell_values_##SUFFIX(const T* x, T* y, int16_t* numbers, int64_t count, FACTORS,                    \
                                       float inverse_width, float offset, float cells, const float* table,            \
                                       int threads) {                                                                 \
    cell_values(x, y, numbers, count, {values, channels, inner}, inverse_width, offset, cells, table, threads);       \
  }                                                                                                                   \
  extern "C" void cell_backward_##SUFFIX(const T* gradient, const int16_t* numbers, T* out, int64_t count, FACTORS,   \
                                         const float* slopes, float* sums, int64_t cells, int slices, int threads) {  \
    cell_backward(gradient, numbers, out, count, {values, channels, inner}, slopes, sums, cells, slices, threads);    \
  }

DEFINE(float32, float)
DEFINE(bfloat16, BFloat16)
