// Operations on whole rows (all channels of one pixel): layer norm, mean over pixels, the gate.
#pragma once

#include <math.h>

#include "convolution.h"

namespace {

constexpr int WAYS = 4;  // independent sums, to hide the latency of an addition

// Sums of a function of a row's values: each lane those of every LANES-th one.
template <class Function>
PAG_INLINE Vector sum_lanes(const float* x, int count, Function function) {
  Vector sums[WAYS] = {};
  int i = 0;
  for (; i + WAYS * LANES <= count; i += WAYS * LANES)
    PAG_UNROLL
    for (int j = 0; j < WAYS; j++) sums[j] += function(load(x + i + j * LANES));
  for (; i + LANES <= count; i += LANES) sums[0] += function(load(x + i));
  if (i < count) {
    float lanes[LANES];
    store(lanes, function(load_first(x + i, count - i)));
    sums[1] += load_first(lanes, count - i);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Of up to LANES rows: (x - mean) / sqrt(variance + epsilon) * weight + bias.
PAG_INLINE void normalize_rows(const pag_rows* call, const float* const* in, float* const* out,
                               int count) {
  const int channels = call->channels;
  Vector sums[LANES] = {};
  float means[LANES], scales[LANES];
  for (int i = 0; i < count; i++)
    sums[i] = sum_lanes(in[i], channels, [](Vector v) PAG_LAMBDA { return v; });
  store(means, sum_each(sums) / (float)channels);
  for (int i = 0; i < count; i++)
    sums[i] = sum_lanes(in[i], channels, [&](Vector v) PAG_LAMBDA {
      v -= means[i];
      return v * v;
    });
  store(scales, 1.f / square_root(sum_each(sums) / (float)channels + call->epsilon));
  const float *weight = call->weight, *bias = call->bias;
  for (int i = 0; i < count; i++) {
    const float *x = in[i], mean = means[i], scale = scales[i];
    float* to = out[i];
    const auto normalize = [=](int c, int left) PAG_LAMBDA {
      Vector y = (load_up_to(x + c, left) - mean) * scale;
      if (weight) y *= load_up_to(weight + c, left);
      if (bias) y += load_up_to(bias + c, left);
      store_up_to(to + c, y, left);
    };
    int c = 0;
    for (; c + LANES <= channels; c += LANES) normalize(c, LANES);
    if (c < channels) normalize(c, channels - c);
  }
}

// Positions [begin, end) of the list. Means and variances of LANES rows are finished together.
void layer_norm(const pag_rows* call, int64_t begin, int64_t end) {
  for (int64_t from = begin; from < end; from += LANES) {
    const int count = end - from < LANES ? (int)(end - from) : LANES;
    const float* in[LANES];
    float* out[LANES];
    for (int i = 0; i < count; i++) {
      const int64_t index = index_at(call->list, from + i);
      in[i] = call->in + index * call->in_stride;
      out[i] = call->out + index * call->out_stride;
    }
    normalize_rows(call, in, out, count);
  }
}

// Sums of x - s, and of their squares, over an image's pixels: s is the first pixel's value, so that
// little is lost where values are large and alike.
void moments(const pag_grouping* call, int32_t image, int32_t channel_begin, int32_t channel_end,
             double* sums, double* squares) {
  constexpr int64_t LONGEST = 256;  // rows summed before they join the total: keeps rounding small
  for (int32_t c = channel_begin; c < channel_end; c += WAYS * LANES) {
    const int width = channel_end - c;
    const float* in = call->in + (int64_t)image * call->pixels * call->in_stride + c;
    Vector first[WAYS];
    PAG_UNROLL
    for (int j = 0; j < WAYS; j++)
      first[j] = width > j * LANES ? load_up_to(in + j * LANES, width - j * LANES) : Vector{};
    for (int i = 0; i < width && i < WAYS * LANES; i++) sums[c + i] = squares[c + i] = 0;
    for (int64_t begin = 0; begin < call->pixels; begin += LONGEST) {
      const int64_t left = call->pixels - begin, count = left < LONGEST ? left : LONGEST;
      Vector sum[WAYS] = {}, square[WAYS] = {};
      for (int64_t i = 0; i < count; i++, in += call->in_stride)
        PAG_UNROLL
        for (int j = 0; j < WAYS; j++)
          if (width > j * LANES) {
            const Vector v = load_up_to(in + j * LANES, width - j * LANES) - first[j];
            sum[j] += v;
            square[j] += v * v;
          }
      float parts[2][WAYS * LANES];
      PAG_UNROLL
      for (int j = 0; j < WAYS; j++) {
        store(parts[0] + j * LANES, sum[j]);
        store(parts[1] + j * LANES, square[j]);
      }
      for (int i = 0; i < width && i < WAYS * LANES; i++) {
        sums[c + i] += parts[0][i];
        squares[c + i] += parts[1][i];
      }
    }
  }
}

// Pixels [begin, end) of an image: x * scale + shift, activated.
void rescale(const pag_grouping* call, int32_t image, const float* scales, const float* shifts,
             int64_t begin, int64_t end) {
  const float* in = call->in + ((int64_t)image * call->pixels + begin) * call->in_stride;
  float* out = call->out + ((int64_t)image * call->pixels + begin) * call->out_stride;
  with_activation(call->activation, call->slope, [&](auto activate) PAG_LAMBDA {
    for (int64_t i = begin; i < end; i++, in += call->in_stride, out += call->out_stride)
      for (int c = 0; c < call->channels; c += LANES) {
        const int left = call->channels - c;
        const Vector y = load_up_to(in + c, left) * load_up_to(scales + c, left);
        store_up_to(out + c, activate(y + load_up_to(shifts + c, left)), left);
      }
  });
}

// Add sums to a row and clear them.
PAG_INLINE void flush(float* row, Vector (&sums)[WAYS], int channels) {
  PAG_UNROLL
  for (int j = 0; j < WAYS; j++) {
    const int left = channels - j * LANES;
    if (left > 0) store_up_to(row + j * LANES, load_up_to(row + j * LANES, left) + sums[j], left);
    sums[j] = Vector{};
  }
}

// Mean over each image's listed pixels, of channels [channel_begin, channel_end); 0 over none.
void mean(const pag_rows* call, int64_t count, const int64_t* counts, int32_t channel_begin,
          int32_t channel_end) {
  constexpr int LONGEST = 256;  // rows summed before they join the total: keeps rounding small
  const int32_t channels = call->channels;
  for (int32_t c = channel_begin; c < channel_end; c += WAYS * LANES) {
    const int width = channel_end - c;
    for (int32_t image = 0; image < call->batch; image++)
      memset(call->out + (int64_t)image * channels + c, 0,
             sizeof(float) * (width < WAYS * LANES ? width : WAYS * LANES));
    Vector sums[WAYS] = {};
    int32_t image = 0, run = 0;
    for (int64_t position = 0; position < count; position++) {
      const int64_t index = index_at(call->list, position);
      const int64_t first = (int64_t)image * call->pixels;
      if (index < first || index >= first + call->pixels || ++run > LONGEST) {
        flush(call->out + (int64_t)image * channels + c, sums, width);
        image = (int32_t)(index / call->pixels);
        run = 1;
      }
      const float* in = call->in + index * call->in_stride + c;
      PAG_UNROLL
      for (int j = 0; j < WAYS; j++)
        if (width > j * LANES) sums[j] += load_up_to(in + j * LANES, width - j * LANES);
    }
    flush(call->out + (int64_t)image * channels + c, sums, width);
  }
  for (int32_t image = 0; image < call->batch; image++)
    for (int32_t c = channel_begin; c < channel_end && counts[image]; c++)
      call->out[(int64_t)image * channels + c] /= counts[image];
}

// Where pixels of a map are that follow one another in a list.
struct Place {
  int64_t index = -2, image = 0, y = 0, x = 0;

  PAG_INLINE void move(int64_t to, int64_t height, int64_t width) {
    if (to == index + 1 && x + 1 < width) {
      x++;  // as most are
    } else {
      const int64_t line = to / width;
      x = to - line * width;
      image = line / height;
      y = line - image * height;
    }
    index = to;
  }
};

// Pixels side by side in an odd row: means of the two above and below, or of two such means.
template <int COUNT, class Activation>
PAG_INLINE void interpolate_run(const pag_map* call, const Place& at, int64_t pixels,
                                Activation activate) {
  const int64_t stride = call->stride, line = call->width * stride;
  const int64_t below = at.y + 1 < call->height ? line : -line;
  const int rest = call->channels - (COUNT - 1) * LANES;
  float* out = call->x + at.index * stride;
  Vector left[COUNT], right[COUNT];
  const auto find = [&](const float* x, Vector (&mean)[COUNT]) PAG_LAMBDA {
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++) {
      const int count = j < COUNT - 1 ? LANES : rest;
      const float* from = x + j * LANES;
      mean[j] = (load_up_to(from - line, count) + load_up_to(from + below, count)) * 0.5f;
    }
  };
  const auto write = [&](float* x, Vector (&mean)[COUNT]) PAG_LAMBDA {
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++)
      store_up_to(x + j * LANES, activate(mean[j]), j < COUNT - 1 ? LANES : rest);
  };
  const int64_t end = at.x + pixels;
  int64_t x = at.x;
  find(x & 1 ? out - stride : out, left);
  if (!(x & 1)) write(out, left), out += stride, x++;
  for (; x < end; x += 2, out += 2 * stride) {
    if (x + 1 < call->width)
      find(out + stride, right);
    else
      memcpy(right, left, sizeof right);
    Vector between[COUNT];
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++) between[j] = (left[j] + right[j]) * 0.5f;
    write(out, between);
    if (x + 1 < end) write(out + stride, right);
    memcpy(left, right, sizeof left);
  }
}

PAG_INLINE int64_t run_length(const pag_map* call, const Place& at, int64_t position, int64_t end) {
  int64_t pixels = 1;
  while (position + pixels < end && at.x + pixels < call->width &&
         index_at(call->list, position + pixels) == at.index + pixels)
    pixels++;
  return pixels;
}

template <class Activation>
PAG_INLINE void interpolate_pixel(const pag_map* call, const Place& at, Activation activate) {
  const int channels = call->channels;
  const int64_t stride = call->stride, line = call->width * stride;
  const bool down = at.y & 1, right = at.x & 1;
  if (!down && !right) return;
  float* out = call->x + at.index * stride;
  // Past the last even row (column) the last one counts twice.
  const int64_t above = down ? -line : 0, left = right ? -stride : 0;
  const int64_t below = down && at.y + 1 < call->height ? line : above;
  const int64_t beside = right && at.x + 1 < call->width ? stride : left;
  const float *a = out + above + left, *b = out + below + beside;
  if (!down || !right) {
    for (int i = 0; i < channels; i += LANES) {
      const int count = channels - i;
      const Vector mean = (load_up_to(a + i, count) + load_up_to(b + i, count)) * 0.5f;
      store_up_to(out + i, activate(mean), count);
    }
    return;
  }
  const float *c = out + below + left, *d = out + above + beside;
  for (int i = 0; i < channels; i += LANES) {
    const int count = channels - i;
    const Vector first = (load_up_to(a + i, count) + load_up_to(c + i, count)) * 0.5f;
    const Vector second = (load_up_to(d + i, count) + load_up_to(b + i, count)) * 0.5f;
    store_up_to(out + i, activate((first + second) * 0.5f), count);
  }
}

template <class Activation>
PAG_INLINE void interpolate_with(const pag_map* call, int64_t begin, int64_t end,
                                 Activation activate) {
  const int vectors = (call->channels + LANES - 1) / LANES;
  Place at;
  for (int64_t position = begin; position < end;) {
    at.move(index_at(call->list, position), call->height, call->width);
    int64_t pixels = 1;
    // With few channels, finding the neighbours of each pixel would take the longest.
    if (vectors <= 2 && at.y & 1) pixels = run_length(call, at, position, end);
    if (pixels > 1 && vectors == 1)
      interpolate_run<1>(call, at, pixels, activate);
    else if (pixels > 1)
      interpolate_run<2>(call, at, pixels, activate);
    else
      interpolate_pixel(call, at, activate);
    position += pixels;
  }
}

// Positions [begin, end) of the list. Pixels at even rows and columns are read and never written.
void interpolate(const pag_map* call, int64_t begin, int64_t end) {
  with_activation(call->activation, call->slope, [&](auto function) PAG_LAMBDA {
    interpolate_with(call, begin, end, function);
  });
}

// Add x * w, or x * w * scale, to a vector of sums.
PAG_INLINE Vector add_products(Vector sums, const float* x, const float* w, const float* scale,
                               int count) {
  for (int i = 0; i < count; i += LANES) {
    const int left = count - i;
    Vector v = load_up_to(x + i, left) * load_up_to(w + i, left);
    if (scale) v *= load_up_to(scale + i, left);
    sums += v;
  }
  return sums;
}

PAG_INLINE void write_decisions(const pag_gate* call, int64_t begin, int count, Vector scores) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  scores += *call->bias;
  if (call->scores) return store_up_to(call->scores + begin, scores, count);
  const Bytes open = __builtin_convertvector(scores >= 0, Bytes) & 1;
  memcpy(call->mask + begin, &open, count);
}

// One row of output pixels: what it reads of each source.
struct GateRow {
  int64_t first;  // output pixel
  const float* lines[PAG_MAX_SOURCES];
  const float* scale;  // of its image, or null

  GateRow(const pag_gate* call, int64_t row) : first(row * call->out_width) {
    const int32_t image = (int32_t)(row / call->out_height);
    const int32_t y = (int32_t)(row % call->out_height) * call->stride[0] + call->offset[0];
    scale = call->scale ? call->scale + (int64_t)image * call->channels : nullptr;
    for (int s = 0; s < call->source_count; s++)
      lines[s] = row_of(call->sources[s], image, y, 0);
  }
};

// A pixel that an upsampled source repeats is added up once.
void decide_wide(const pag_gate* call, int64_t row_begin, int64_t row_end) {
  for (int64_t number = row_begin; number < row_end; number++) {
    const GateRow row(call, number);
    const float* seen[PAG_MAX_SOURCES] = {};
    Vector parts[PAG_MAX_SOURCES] = {};
    for (int32_t from = 0; from < call->out_width; from += LANES) {
      const int count = call->out_width - from < LANES ? call->out_width - from : LANES;
      Vector sums[LANES] = {};
      for (int i = 0; i < count; i++) {
        const int32_t x = (from + i) * call->stride[1] + call->offset[1];
        const float *weight = call->weight, *scale = row.scale;
        for (int s = 0; s < call->source_count; s++) {
          const pag_source& source = call->sources[s];
          const float* values = row.lines[s] + (x >> source.shift) * source.stride;
          if (values != seen[s]) {
            seen[s] = values;
            parts[s] = add_products(Vector{}, values, weight, scale, source.channels);
          }
          sums[i] += parts[s];
          weight += source.channels;
          if (scale) scale += source.channels;
        }
      }
      write_decisions(call, row.first + from, count, sum_each(sums));
    }
  }
}

template <int PARTS>
PAG_INLINE Vector weigh(const float* values, const Vector (&weights)[PARTS], int rest) {
  Vector sum = load_up_to(values + (PARTS - 1) * LANES, rest) * weights[PARTS - 1];
  PAG_UNROLL
  for (int k = 0; k < PARTS - 1; k++) sum += load(values + k * LANES) * weights[k];
  return sum;
}

// One source of few channels: its weights stay in registers.
template <int PARTS>
void decide_narrow(const pag_gate* call, int64_t row_begin, int64_t row_end) {
  const pag_source& source = call->sources[0];
  const int rest = call->channels - (PARTS - 1) * LANES;
  const int64_t step = call->stride[1] * source.stride;
  for (int64_t number = row_begin; number < row_end; number++) {
    const GateRow row(call, number);
    Vector weights[PARTS];
    PAG_UNROLL
    for (int k = 0; k < PARTS; k++) {
      const int width = k < PARTS - 1 ? LANES : rest;
      weights[k] = load_up_to(call->weight + k * LANES, width);
      if (row.scale) weights[k] *= load_up_to(row.scale + k * LANES, width);
    }
    for (int32_t from = 0; from < call->out_width; from += LANES) {
      const int count = call->out_width - from < LANES ? call->out_width - from : LANES;
      const int32_t x = from * call->stride[1] + call->offset[1];
      Vector sums[LANES] = {};
      if (count == LANES && !source.shift) {
        const float* values = row.lines[0] + x * source.stride;
        PAG_UNROLL
        for (int i = 0; i < LANES; i++) sums[i] = weigh(values + i * step, weights, rest);
      } else {
        for (int i = 0; i < count; i++)
          sums[i] = weigh(row.lines[0] + ((x + i * call->stride[1]) >> source.shift) * source.stride,
                          weights, rest);
      }
      write_decisions(call, row.first + from, count, sum_each(sums));
    }
  }
}

// Where the pixels of one source are that a gate decides, LANES at a time; of fewer the last one again.
struct GatePixels {
  const pag_gate* call;
  int64_t row, x;  // of the next one
  const float* line;
  const float* at[LANES];

  GatePixels(const pag_gate* call, int64_t row) : call(call), row(row), x(0) { find_line(); }

  PAG_INLINE void find_line() {
    const int32_t image = (int32_t)(row / call->out_height);
    const int32_t y = (int32_t)(row % call->out_height) * call->stride[0] + call->offset[0];
    line = row_of(call->sources[0], image, y, 0);
  }

  PAG_INLINE void find(int count) {
    const pag_source& source = call->sources[0];
    for (int i = 0; i < count; i++, x++) {
      if (x == call->out_width) {
        x = 0;
        row++;
        find_line();
      }
      at[i] = line + ((x * call->stride[1] + call->offset[1]) >> source.shift) * source.stride;
    }
    for (int i = count; i < LANES; i++) at[i] = at[count - 1];
  }
};

// One source of more channels: each weight is loaded once for LANES pixels.
template <class Activation>
PAG_INLINE void decide_deep(const pag_gate* call, int64_t row_begin, int64_t row_end,
                            Activation activate) {
  const int channels = call->channels;
  const int64_t each = (int64_t)call->out_height * call->out_width, end = row_end * call->out_width;
  GatePixels pixels(call, row_begin);
  for (int64_t begin = row_begin * call->out_width; begin < end;) {
    const int64_t image = begin / each;
    const int64_t left = (end < (image + 1) * each ? end : (image + 1) * each) - begin;
    const int count = left < LANES ? (int)left : LANES;
    const float* scale = call->scale ? call->scale + image * channels : nullptr;
    pixels.find(count);
    Vector sums[LANES] = {};
    for (int c = 0; c < channels; c += LANES) {
      const int valid = channels - c;
      Vector w = load_up_to(call->weight + c, valid);
      if (scale) w *= load_up_to(scale + c, valid);
      if (valid >= LANES)
        PAG_UNROLL
        for (int i = 0; i < LANES; i++) sums[i] += activate(load(pixels.at[i] + c)) * w;
      else
        PAG_UNROLL
        for (int i = 0; i < LANES; i++) sums[i] += activate(load_first(pixels.at[i] + c, valid)) * w;
    }
    write_decisions(call, begin, count, sum_each(sums));
    begin += count;
  }
}

// One source of fewer channels than there is to gain from vectors: an image.
template <int CHANNELS>
void decide_few(const pag_gate* call, int64_t row_begin, int64_t row_end) {
  const pag_source& source = call->sources[0];
  for (int64_t number = row_begin; number < row_end; number++) {
    const GateRow row(call, number);
    float weights[CHANNELS];
    for (int c = 0; c < CHANNELS; c++)
      weights[c] = call->weight[c] * (row.scale ? row.scale[c] : 1.f);
    int32_t x = call->offset[1];
    for (int32_t from = 0; from < call->out_width; from += LANES) {
      const int count = call->out_width - from < LANES ? call->out_width - from : LANES;
      float sums[LANES] = {};
      for (int i = 0; i < count; i++, x += call->stride[1]) {
        const float* values = row.lines[0] + (x >> source.shift) * source.stride;
        asm("" : "+r"(values));  // else compilers gather, which takes several times as long
        float sum = 0;
        PAG_UNROLL
        for (int c = 0; c < CHANNELS; c++) sum += values[c] * weights[c];
        sums[i] = sum;
      }
      write_decisions(call, row.first + from, count, load(sums));
    }
  }
}

// Rows [begin, end) of output pixels, all images.
void decide(const pag_gate* call, int64_t begin, int64_t end) {
  if (call->source_count > 1) return decide_wide(call, begin, end);
  if (call->activation == PAG_NONE) {
    if (call->channels == 1) return decide_few<1>(call, begin, end);
    if (call->channels == 3) return decide_few<3>(call, begin, end);
    if (call->channels <= LANES) return decide_narrow<1>(call, begin, end);
    if (call->channels <= 2 * LANES) return decide_narrow<2>(call, begin, end);
  }
  with_activation(call->activation, call->slope, [&](auto activate) PAG_LAMBDA {
    decide_deep(call, begin, end, activate);
  });
}

#if defined(__AVX512F__)
// Which of 16 bytes are not zero.
PAG_INLINE unsigned open_pixels(const uint8_t* mask) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)mask));
  return _mm512_test_epi32_mask(bytes, bytes);
}
#endif

void list_pixels(const pag_listing* call) {
  constexpr int TOGETHER = LANES == 16 ? 16 : 8;
  const uint8_t flip = call->wanted ? 0 : 1;
  const uint8_t* other = call->other;
  const bool all = call->operation == PAG_AND;
  int64_t count = 0, i = 0;
  const auto in = [&](int64_t at) {
    bool found = call->mask[at] != 0;
    if (other) found = all ? found & (other[at] != 0) : found | (other[at] != 0);
    return (uint8_t)found ^ flip;
  };
  for (; i + TOGETHER <= call->pixels; i += TOGETHER) {
    int32_t* list = call->list + count;  // never behind the end: count <= i
#if defined(__AVX512F__)
    unsigned found = open_pixels(call->mask + i);
    if (other) found = all ? found & open_pixels(other + i) : found | open_pixels(other + i);
    found ^= flip ? 0xffff : 0;
    const __m512i steps =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i indices = _mm512_add_epi32(_mm512_set1_epi32((int32_t)i), steps);
    _mm512_storeu_si512(list, _mm512_maskz_compress_epi32((__mmask16)found, indices));
    count += __builtin_popcount(found);
#else
    int found = 0;  // masks are patches: most groups are all in or all out
    for (int j = 0; j < TOGETHER; j++) found += in(i + j);
    if (found == TOGETHER)
      for (int j = 0; j < TOGETHER; j++) list[j] = (int32_t)(i + j);
    else if (found)
      for (int j = 0, n = 0; j < TOGETHER; n += in(i + j), j++) list[n] = (int32_t)(i + j);
    count += found;
#endif
  }
  for (; i < call->pixels; i++)
    if (in(i)) call->list[count++] = (int32_t)i;
  *call->found = (int32_t)count;
}

// The maxima over a window whose first pixel inside is at `in`; a NaN wins, as in torch.
template <int COUNT>
PAG_INLINE void pool_window(const float* in, int64_t line, int64_t step, int rows, int columns,
                            float* out, int rest) {
  Vector best[COUNT];
  PAG_UNROLL
  for (int j = 0; j < COUNT; j++) best[j] = broadcast(-INFINITY);
  for (int y = 0; y < rows; y++, in += line) {
    const float* at = in;
    for (int x = 0; x < columns; x++, at += step) {
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) {
        const Vector v = j < COUNT - 1 ? load(at + j * LANES) : load_up_to(at + j * LANES, rest);
        best[j] = v > best[j] ? v : best[j];  // false for any NaN
        best[j] = v == v ? best[j] : v;
      }
    }
  }
  PAG_UNROLL
  for (int j = 0; j < COUNT - 1; j++) store(out + j * LANES, best[j]);
  store_up_to(out + (COUNT - 1) * LANES, best[COUNT - 1], rest);
}

// The taps of a window that are inside along one axis.
struct Inside {
  int first, count;  // first: in the input

  Inside(int64_t start, int kernel, int dilation, int size) {
    const int64_t before = start < 0 ? (-start + dilation - 1) / dilation : 0;
    const int64_t until = start < size ? (size - start + dilation - 1) / dilation : 0;
    const int64_t taps = (until < kernel ? until : kernel) - before;
    first = (int)(start + before * dilation);
    count = taps > 0 ? (int)taps : 0;
  }
};

// Rows [begin, end) of the output, all images.
void pool(const pag_pool* call, int64_t begin, int64_t end) {
  constexpr int STEP = WAYS * LANES;
  const int64_t line = call->width * call->in_stride, step = call->dilation[1] * call->in_stride;
  for (int64_t row = begin; row < end; row++) {
    const int64_t image = row / call->out_height;
    const int64_t top = row % call->out_height * call->stride[0] - call->padding[0];
    const Inside y(top, call->kernel[0], call->dilation[0], call->height);
    const float* lines = call->in + (image * call->height + y.first) * line;
    float* out = call->out + row * call->out_width * call->out_stride;
    for (int64_t x = 0; x < call->out_width; x++, out += call->out_stride) {
      const Inside columns(x * call->stride[1] - call->padding[1], call->kernel[1],
                           call->dilation[1], call->width);
      const float* in = lines + columns.first * call->in_stride;
      int c = 0;
      for (; c + STEP <= call->channels; c += STEP)
        pool_window<WAYS>(in + c, call->dilation[0] * line, step, y.count, columns.count, out + c,
                          LANES);
      for (; c < call->channels; c += LANES)
        pool_window<1>(in + c, call->dilation[0] * line, step, y.count, columns.count, out + c,
                       call->channels - c);
    }
  }
}

// Sums of `taps` vectors, `step` floats from each other.
PAG_INLINE Vector weighted(const float* x, int64_t step, const float* weights, int taps, int count) {
  Vector sum = {};
  for (int i = 0; i < taps; i++) sum = sum + load_up_to(x + i * step, count) * weights[i];
  return sum;
}

constexpr int64_t STRIP = 4096;  // floats of an input row: half of the first-level cache

// One output row: its input rows are added up first, a strip of columns at a time.
void shrink_row(const pag_resizing* call, int64_t row) {
  const int down = call->taps[0], across = call->taps[1], channels = call->channels;
  const int64_t image = row / call->out_height, y = row - image * call->out_height;
  const int64_t stride = call->in_stride, line = call->width * stride;
  const float* lines = call->in + (image * call->height + call->first[0][y]) * line;
  const float* vertical = call->weights[0] + y * down;
  float* out = call->out + row * call->out_width * call->out_stride;
  alignas(64) float strip[STRIP];
  int64_t begin = 0, end = 0;  // the strip's columns
  for (int64_t x = 0; x < call->out_width; x++, out += call->out_stride) {
    const int64_t first = call->first[1][x];
    if (first < begin || first + across > end) {
      begin = first;
      end = begin + STRIP / stride;
      if (end > call->width) end = call->width;
      const int64_t floats = (end - begin - 1) * stride + channels;
      for (int64_t i = 0; i < floats; i += LANES) {
        const int count = floats - i < LANES ? (int)(floats - i) : LANES;
        store_up_to(strip + i, weighted(lines + begin * stride + i, line, vertical, down, count), count);
      }
    }
    const float* columns = strip + (first - begin) * stride;
    const float* horizontal = call->weights[1] + x * across;
    for (int c = 0; c < channels; c += LANES) {
      const int count = channels - c;
      store_up_to(out + c, weighted(columns + c, stride, horizontal, across, count), count);
    }
  }
}

// The same without a strip: for few taps it is not worth it, and for many channels too small. TAPS in
// both directions if it is not zero: enlargement has two, or one (the nearest).
template <int TAPS>
PAG_INLINE void resize_row(const pag_resizing* call, int64_t row) {
  const int down = TAPS ? TAPS : call->taps[0], across = TAPS ? TAPS : call->taps[1];
  const int64_t image = row / call->out_height, y = row - image * call->out_height;
  const int64_t stride = call->in_stride, line = call->width * stride;
  const float* lines = call->in + (image * call->height + call->first[0][y]) * line;
  const float* vertical = call->weights[0] + y * down;
  float* out = call->out + row * call->out_width * call->out_stride;
  for (int64_t x = 0; x < call->out_width; x++, out += call->out_stride) {
    const float* columns = lines + call->first[1][x] * stride;
    const float* horizontal = call->weights[1] + x * across;
    for (int c = 0; c < call->channels; c += LANES) {
      const int count = call->channels - c;
      Vector sum = {};
      for (int i = 0; i < down; i++)
        sum = sum + weighted(columns + i * line + c, stride, horizontal, across, count) * vertical[i];
      store_up_to(out + c, sum, count);
    }
  }
}

// The same of so few channels that vectors are worth more along the input row.
void resize_thin_row(const pag_resizing* call, int64_t row) {
  const int across = call->taps[1], channels = call->channels;
  const int64_t image = row / call->out_height, y = row - image * call->out_height;
  const int64_t stride = call->in_stride, line = call->width * stride;
  const float* lines = call->in + (image * call->height + call->first[0][y]) * line;
  const float* vertical = call->weights[0] + y * call->taps[0];
  const int64_t floats = (call->width - 1) * stride + channels;
  alignas(64) float strip[STRIP];
  for (int64_t i = 0; i < floats; i += LANES) {
    const int count = floats - i < LANES ? (int)(floats - i) : LANES;
    store_up_to(strip + i, weighted(lines + i, line, vertical, call->taps[0], count), count);
  }
  float* out = call->out + row * call->out_width * call->out_stride;
  const float* horizontal = call->weights[1];
  for (int64_t x = 0; x < call->out_width; x++, out += call->out_stride, horizontal += across) {
    const float* columns = strip + call->first[1][x] * stride;
    asm("" : "+r"(columns));  // else compilers gather, which takes longer
    for (int c = 0; c < channels; c++) {
      float sum = 0;
      for (int i = 0; i < across; i++) sum += columns[i * stride + c] * horizontal[i];
      out[c] = sum;
    }
  }
}

// Rows [begin, end) of the output, all images.
void resize(const pag_resizing* call, int64_t begin, int64_t end) {
  constexpr int THIN = 4;  // channels
  if (call->channels <= THIN && call->width * call->in_stride <= STRIP) {
    for (int64_t row = begin; row < end; row++) resize_thin_row(call, row);
    return;
  }
  const int taps = call->taps[0] == call->taps[1] ? call->taps[0] : 0;
  const bool strips = call->taps[1] * call->in_stride <= STRIP;
  for (int64_t row = begin; row < end; row++) {
    if (taps == 1)
      resize_row<1>(call, row);
    else if (taps == 2)
      resize_row<2>(call, row);
    else if (strips)
      shrink_row(call, row);
    else
      resize_row<0>(call, row);
  }
}

template <class Activation>
PAG_INLINE void activate_row(float* x, int64_t count, Activation function) {
  for (int64_t i = 0; i < count; i += LANES) {
    const int left = count - i < LANES ? (int)(count - i) : LANES;
    store_up_to(x + i, function(load_up_to(x + i, left)), left);
  }
}

// Positions [begin, end) of the list.
void activate(const pag_map* call, int64_t begin, int64_t end) {
  const int64_t stride = call->stride, channels = call->channels;
  with_activation(call->activation, call->slope, [&](auto function) PAG_LAMBDA {
    if (!call->list.pixels && stride == channels)
      return activate_row(call->x + begin * stride, (end - begin) * stride, function);
    for (int64_t position = begin; position < end; position++)
      activate_row(call->x + index_at(call->list, position) * stride, channels, function);
  });
}

}  // namespace
