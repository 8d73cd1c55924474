// Convolution at listed pixels: indirect matrix multiplication (Dukhan, arXiv 1907.02129).
//
// A tile of pixels times a block of output channels is accumulated in registers over all taps and
// input channels. Pixels come as pointers, one per tap, so that skipping pixels only shortens the
// list, padding is a pointer to zeros, and upsampling and concatenation are other pointers.
#pragma once

#include "epilogue.h"
#include "plan.h"

namespace {

#if defined(__AVX512F__)
constexpr int TILE = 14, VECTORS = 2, DEPTHWISE_TILE = 7;
#elif defined(__AVX2__)
constexpr int TILE = 6, VECTORS = 2, DEPTHWISE_TILE = 3;
#elif defined(__aarch64__)
constexpr int TILE = 6, VECTORS = 4, DEPTHWISE_TILE = 6;
#else
constexpr int TILE = 3, VECTORS = 4, DEPTHWISE_TILE = 3;
#endif
constexpr int DEPTHWISE_VECTORS = 4;
constexpr int PREFETCH = 16;  // steps of the inner loop; a step takes about a dozen cycles
static_assert(TILE <= MAX_TILE && VECTORS * LANES <= MAX_COLUMNS, "Epilogue is too small");

struct Input {
  const float* const* rows;  // (segments, pixels)
  int segments, sources;
  const int32_t* lengths;  // (sources): channels of each segment
  int64_t offset;          // of the first channel
};

template <int PIXELS, int WIDTH>
void multiply_tile(const Input& input, const float* weights, const Epilogue& e, int column,
                   int columns) {
  constexpr int COUNT = WIDTH < VECTORS * LANES ? WIDTH / LANES : VECTORS;
  Vector sums[PIXELS][COUNT];
  Vector start[COUNT] = {};
  if (e.bias)
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++)
      start[j] = j * LANES < columns
                     ? load_up_to(e.bias + column + j * LANES, columns - j * LANES)
                     : Vector{};
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i++)
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++) sums[i][j] = start[j];

  const float* const* rows = input.rows;
  for (int segment = 0, source = 0; segment < input.segments; segment++, rows += PIXELS) {
    const int64_t length = input.lengths[source];
    if (++source == input.sources) source = 0;
    const float* end[PIXELS];
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) end[i] = rows[i] + input.offset + length;
    for (int64_t k = -length; k < 0; k++, weights += WIDTH) {
      Vector w[COUNT];
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) w[j] = load(weights + j * LANES);
      PAG_UNROLL
      for (int j = 0; j < COUNT * LANES; j += 16)
        __builtin_prefetch(weights + PREFETCH * WIDTH + j, 0, 3);
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++) {
        Vector x = broadcast(end[i][k]);
        PAG_UNROLL
        for (int j = 0; j < COUNT; j++) sums[i][j] += x * w[j];
      }
    }
  }
  finish_tile<PIXELS, COUNT>(e, sums, column, columns);
}

template <int PIXELS, int WIDTH>
PAG_INLINE void multiply_pixels(int pixels, const Input& input, const float* weights,
                                const Epilogue& e, int column, int columns) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS)
      multiply_tile<PIXELS, WIDTH>(input, weights, e, column, columns);
    else
      multiply_pixels<PIXELS - 1, WIDTH>(pixels, input, weights, e, column, columns);
  }
}

PAG_INLINE void multiply_block(int pixels, const Input& input, const pag_block& block,
                               const Epilogue& e) {
  constexpr int STEP = VECTORS * LANES;
  for (int at = 0; at < block.columns; at += STEP) {
    const int columns = block.columns - at < STEP ? block.columns - at : STEP;
    if (block.width == 32)
      multiply_pixels<TILE, 32>(pixels, input, block.weights + at, e, block.column + at, columns);
    else
      multiply_pixels<TILE, 16>(pixels, input, block.weights + at, e, block.column + at, columns);
  }
}

// Output channels are packed in blocks of 32, the last of a bundle of 16 if that is enough.
PAG_INLINE pag_block block_at(const pag_plan& plan, int index) {
  const pag_convolution& call = *plan.call;
  const int bundle = index / plan.blocks_per_bundle;
  const int at = index % plan.blocks_per_bundle * 32;
  const int group_columns = call.out_channels / call.groups;
  const int left = call.out_channels - bundle * plan.bundle_columns;
  const int bundle_columns = left < plan.bundle_columns ? left : plan.bundle_columns;
  const int64_t padded = (plan.bundle_columns + 15) / 16 * 16;
  const int64_t depth = (int64_t)plan.taps * plan.bundle_channels;
  pag_block block;
  block.channel = bundle * plan.bundle_channels;
  block.channels = bundle_columns / group_columns * (call.channels / call.groups);
  block.column = bundle * plan.bundle_columns + at;
  block.columns = bundle_columns - at < 32 ? bundle_columns - at : 32;
  block.width = bundle_columns - at <= 16 ? 16 : 32;
  block.weights = call.weights + bundle * depth * padded +
                  (int64_t)plan.taps * block.channels * at;
  return block;
}

struct Pixel {
  int32_t index, image, y, x;  // y, x: input coordinates of the first tap, maybe outside
  bool inside;                 // all taps are
};

PAG_INLINE int32_t index_at(const pag_list& list, int64_t position) {
  return list.pixels ? list.pixels[position] : (int32_t)position;
}

PAG_INLINE Pixel pixel_at(const pag_convolution& call, int64_t position) {
  Pixel p;
  p.index = index_at(call.list, position);
  const int32_t line = p.index / call.out_width;
  p.image = line / call.out_height;
  p.y = (line - p.image * call.out_height) * call.stride[0] - call.padding[0];
  p.x = (p.index - line * call.out_width) * call.stride[1] - call.padding[1];
  p.inside = p.y >= 0 && p.x >= 0 &&
             p.y + (call.kernel[0] - 1) * call.dilation[0] < call.height &&
             p.x + (call.kernel[1] - 1) * call.dilation[1] < call.width;
  return p;
}

PAG_INLINE const float* row_of(const pag_source& source, int32_t image, int32_t y, int32_t x) {
  const int64_t line = (int64_t)image * source.height + (y >> source.shift);
  return source.data + (line * source.width + (x >> source.shift)) * source.stride;
}

// Where each tap of one source starts for one pixel; taps outside read zeros.
PAG_INLINE void find_taps(const pag_convolution& call, const pag_source& source, const Pixel& p,
                          const float* zeros, const float** rows, int64_t step) {
  for (int ky = 0; ky < call.kernel[0]; ky++) {
    const int y = p.y + ky * call.dilation[0];
    for (int kx = 0; kx < call.kernel[1]; kx++, rows += step) {
      const int x = p.x + kx * call.dilation[1];
      const bool inside = (uint32_t)y < (uint32_t)call.height && (uint32_t)x < (uint32_t)call.width;
      *rows = inside ? row_of(source, p.image, y, x) : zeros;
    }
  }
}

// Fill scratch.rows for the pixels at [begin, begin + pixels) of the list.
PAG_INLINE void find_rows(const pag_plan& plan, const pag_scratch& scratch, int64_t begin,
                          int pixels) {
  const pag_convolution& call = *plan.call;
  const int sources = call.source_count;
  if (plan.pointwise) {
    for (int s = 0; s < sources; s++)
      for (int i = 0; i < pixels; i++)
        scratch.rows[s * pixels + i] =
            call.sources[s].data + index_at(call.list, begin + i) * call.sources[s].stride;
    return;
  }
  for (int i = 0; i < pixels; i++) {
    const Pixel p = pixel_at(call, begin + i);
    for (int s = 0; s < sources; s++) {
      const pag_source& source = call.sources[s];
      const float** rows = scratch.rows + (int64_t)s * pixels + i;
      if (!p.inside || source.shift) {
        find_taps(call, source, p, scratch.zeros, rows, (int64_t)sources * pixels);
        continue;
      }
      const float* first = row_of(source, p.image, p.y, p.x);
      for (int segment = s; segment < plan.segments; segment += sources)
        rows[(int64_t)(segment - s) * pixels] = first + scratch.offsets[segment];
    }
  }
}

PAG_INLINE void copy_floats(float* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  if (i < count) store_first(to + i, load_first(from + i, (int)(count - i)), (int)(count - i));
}

PAG_INLINE void copy_scaled(float* to, const float* from, const float* scale, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i) * load(scale + i));
  for (; i < count; i++) to[i] = from[i] * scale[i];
}

// Copy what one pixel reads next to each other, scaled if the call says so.
PAG_INLINE void gather_pixel(const pag_plan& plan, const pag_scratch& scratch, int64_t position,
                             float* to) {
  const pag_convolution& call = *plan.call;
  const Pixel p = pixel_at(call, position);
  const pag_source& first = call.sources[0];
  const bool joined = call.source_count == 1 && call.dilation[1] == 1 && !first.shift &&
                      first.stride == first.channels && !call.input_scale;
  if (joined && p.inside) {  // the taps of a row are contiguous
    const int64_t count = (int64_t)call.kernel[1] * first.channels;
    for (int ky = 0; ky < call.kernel[0]; ky++, to += count)
      copy_floats(to, row_of(first, p.image, p.y + ky * call.dilation[0], p.x), count);
    return;
  }
  for (int s = 0; s < call.source_count; s++)
    find_taps(call, call.sources[s], p, scratch.zeros, scratch.rows + s, call.source_count);
  const float** row = scratch.rows;
  for (int tap = 0; tap < plan.taps; tap++) {
    const float* scale =
        call.input_scale ? call.input_scale + (int64_t)p.image * call.channels : nullptr;
    for (int s = 0; s < call.source_count; s++, row++) {
      const int64_t count = call.sources[s].channels;
      if (scale) {
        copy_scaled(to, *row, scale, count);
        scale += count;
      } else {
        copy_floats(to, *row, count);
      }
      to += count;
    }
  }
}

PAG_INLINE void start_epilogue(const pag_convolution& call, Epilogue& e) {
  e.bias = call.bias;
  e.activation = call.activation;
  e.after = call.residual_after_activation;
  e.slope = call.slope;
  e.plain = !call.scale && !(call.residual && e.after) &&
            (e.activation == PAG_NONE || e.activation == PAG_RELU);
}

PAG_INLINE void aim_epilogue(const pag_convolution& call, int64_t begin, int pixels, Epilogue& e) {
  const int32_t image_pixels = call.out_height * call.out_width;
  for (int i = 0; i < pixels; i++) {
    const int64_t index = index_at(call.list, begin + i);
    e.out[i] = call.out + index * call.out_stride;
    e.residual[i] = call.residual ? call.residual + index * call.residual_stride : nullptr;
    e.scale[i] = nullptr;
    if (call.scale) e.scale[i] = call.scale + index / image_pixels * call.out_channels;
  }
}

template <int PIXELS, int COUNT>
PAG_INLINE void depthwise_tile(const pag_plan& plan, const float* const* rows, const Epilogue& e,
                               int channel, int channels) {
  const pag_convolution& call = *plan.call;
  const int64_t padded = (call.channels + 15) / 16 * 16;
  const float* weights = call.weights + channel;
  const bool partial = channels < COUNT * LANES;  // then COUNT is 1
  Vector sums[PIXELS][COUNT];
  PAG_UNROLL
  for (int j = 0; j < COUNT; j++) {
    Vector start = {};
    if (call.bias) start = load_up_to(call.bias + channel + j * LANES, channels - j * LANES);
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) sums[i][j] = start;
  }
  if (partial) {
    for (int tap = 0; tap < plan.taps; tap++, rows += PIXELS, weights += padded)
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++)
        sums[i][0] += load_first(rows[i] + channel, channels) * load(weights);
  } else {
    for (int tap = 0; tap < plan.taps; tap++, rows += PIXELS, weights += padded) {
      Vector w[COUNT];
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) w[j] = load(weights + j * LANES);
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++) {
        const float* row = rows[i] + channel;
        PAG_UNROLL
        for (int j = 0; j < COUNT; j++) sums[i][j] += load(row + j * LANES) * w[j];
      }
    }
  }
  finish_tile<PIXELS, COUNT>(e, sums, channel, channels);
}

template <int PIXELS>
void depthwise_channels(const pag_plan& plan, const float* const* rows, const Epilogue& e) {
  constexpr int STEP = DEPTHWISE_VECTORS * LANES;
  const int channels = plan.call->channels;
  int channel = 0;
  for (; channel + STEP <= channels; channel += STEP)
    depthwise_tile<PIXELS, DEPTHWISE_VECTORS>(plan, rows, e, channel, STEP);
  for (; channel < channels; channel += LANES)
    depthwise_tile<PIXELS, 1>(plan, rows, e, channel,
                              channels - channel < LANES ? channels - channel : LANES);
}

template <int PIXELS>
PAG_INLINE void depthwise_pixels(int pixels, const pag_plan& plan, const float* const* rows,
                                 const Epilogue& e) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS)
      depthwise_channels<PIXELS>(plan, rows, e);
    else
      depthwise_pixels<PIXELS - 1>(pixels, plan, rows, e);
  }
}

// Blocks [block_begin, block_end) of output channels at tiles [tile_begin, tile_end) of pixels.
void convolution(const pag_plan* shared, const pag_scratch* scratch, int32_t block_begin,
                 int32_t block_end, int64_t tile_begin, int64_t tile_end) {
  const pag_plan& plan = *shared;
  const pag_convolution& call = *plan.call;
  const int depth = plan.taps * call.channels;
  int32_t lengths[PAG_MAX_SOURCES];
  for (int s = 0; s < call.source_count; s++) lengths[s] = call.sources[s].channels;
  const float* gathered[MAX_TILE];
  for (int i = 0; i < plan.tile; i++) gathered[i] = scratch->panel + (int64_t)i * depth;
  Epilogue e;
  start_epilogue(call, e);
  for (int64_t tile = tile_begin; tile < tile_end; tile++) {
    // Tiles of about equal size: a short last one would waste its loads of the weights.
    const int64_t begin = plan.pixels * tile / plan.tiles;
    const int pixels = (int)(plan.pixels * (tile + 1) / plan.tiles - begin);
    aim_epilogue(call, begin, pixels, e);
    Input input = {scratch->rows, plan.segments, call.source_count, lengths, 0};
    if (plan.gathered) {
      for (int i = 0; i < pixels; i++)
        gather_pixel(plan, *scratch, begin + i, scratch->panel + (int64_t)i * depth);
      input = {gathered, 1, 1, &depth, 0};
    } else {
      find_rows(plan, *scratch, begin, pixels);
    }
    if (plan.depthwise) {
      depthwise_pixels<DEPTHWISE_TILE>(pixels, plan, scratch->rows, e);
      continue;
    }
    for (int32_t index = block_begin; index < block_end; index++) {
      const pag_block block = block_at(plan, index);
      if (call.groups > 1) {
        input.offset = block.channel;
        input.lengths = &block.channels;
      }
      multiply_block(pixels, input, block, e);
    }
  }
}

}  // namespace
