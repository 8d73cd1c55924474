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
constexpr int TILE = 14, VECTORS = 2, DEPTHWISE_TILE = 7, TALL_TILE = 28;
#elif defined(__AVX2__)
constexpr int TILE = 6, VECTORS = 2, DEPTHWISE_TILE = 3, TALL_TILE = TILE;
#elif defined(__aarch64__)
constexpr int TILE = 6, VECTORS = 4, DEPTHWISE_TILE = 6, TALL_TILE = TILE;
#else
constexpr int TILE = 3, VECTORS = 4, DEPTHWISE_TILE = 3, TALL_TILE = TILE;
#endif
constexpr int DEPTHWISE_VECTORS = 4;
constexpr int LINE = 16;      // floats of a cache line
constexpr int PREFETCH = 64;  // steps of the inner loop; a step takes about a dozen cycles
static_assert(TALL_TILE <= MAX_TILE && VECTORS * LANES <= MAX_COLUMNS, "Epilogue is too small");

struct Input {
  const float* const* rows;  // (segments, pixels)
  int segments, sources;
  const int32_t* lengths;  // (sources): channels of each segment
  int64_t offset;          // of the first channel
};

template <int PIXELS, int WIDTH>
PAG_OUTLINE void multiply_tile(const Input& input, const float* weights, const Epilogue& e, int column,
                   int columns) {
  constexpr int COUNT = WIDTH < VECTORS * LANES ? WIDTH / LANES : VECTORS;
  Vector sums[PIXELS][COUNT];
  start_tile(e, sums, column, columns);

  // One plain inner loop: splitting it, to read input ahead as well, cost more than it won.
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
      for (int j = 0; j < COUNT * LANES; j += LINE)
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

// --- compressed weights ------------------------------------------------------------------------
//
// Where few pixels are listed, time goes into reading weights: large ones are held as whole numbers of
// 24 bits (packing.py). What multiplies the first tile expands them on the way, and keeps them as
// floats if there are other tiles. A block of 32 columns lies there as two halves of 16, such that a
// tall tile reads one after the other and others read both at once.

constexpr int WEIGHT_BYTES = 3;
constexpr int HALF = PAG_NARROW;                 // columns
constexpr int HALF_BYTES = HALF * WEIGHT_BYTES;  // of a row of one half
// Bytes that are asked for before: as much as comes from memory while few pixels make short steps. They
// are to come as far as the second cache: the first one waits for few lines at a time, and has few
// places for them.
constexpr int AHEAD = 128 * HALF_BYTES;
constexpr int NEXT = 16 * HALF_BYTES;  // from the second cache to the first

// Four numbers at a time from three words. A number comes as its multiple by 256.
PAG_INLINE void expand(const uint8_t* compressed, int count, float* to) {
  for (int i = 0; i < count; i += 4, compressed += 4 * WEIGHT_BYTES) {
    uint32_t words[WEIGHT_BYTES];
    memcpy(words, compressed, sizeof words);
    to[i] = (float)(int32_t)(words[0] << 8);
    to[i + 1] = (float)(int32_t)((words[0] >> 24 << 8) | (words[1] << 16));
    to[i + 2] = (float)(int32_t)((words[1] >> 16 << 8) | (words[2] << 24));
    to[i + 3] = (float)(int32_t)(words[2] & 0xffffff00u);
  }
}

// `rows` rows of a block.
PAG_INLINE void expand_block(const pag_block& block, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; row++)
    for (int at = 0; at < block.width; at += HALF, to += HALF)
      expand(block.compressed + at / HALF * block.half + row * HALF_BYTES, HALF, to);
}

constexpr int DIGITS = PAG_DIGITS, DIGITS_DEPTH = PAG_DIGITS_DEPTH;
constexpr int DIGIT_BYTES = DIGITS_DEPTH * HALF;  // of one step of 16 columns
constexpr int STEP_BYTES = DIGITS * DIGIT_BYTES;

PAG_INLINE int64_t digit_steps(int64_t depth) { return (depth + DIGITS_DEPTH - 1) / DIGITS_DEPTH; }

// The same of weights in digits (digits.h), for processors that do not multiply these.
PAG_INLINE void expand_digits(const pag_block& block, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; row++) {
    const int64_t at = row / DIGITS_DEPTH * STEP_BYTES + row % DIGITS_DEPTH / 4 * DIGITS_DEPTH + row % 4;
    for (int column = 0; column < block.width; column++) {
      const int8_t* digit = (const int8_t*)block.compressed + column / HALF * block.half + at +
                            column % HALF * 4;
      const int32_t high = digit[0], middle = digit[DIGIT_BYTES], low = digit[2 * DIGIT_BYTES];
      *to++ = (float)((high * 256 + middle) * 256 + low) * 256;
    }
  }
}

#if defined(__AVX2__)
#if defined(__AVX512F__)
// Processors with AVX-512 but without the instruction that moves bytes anywhere are few, and old.
#define PAG_MOVES_BYTES __attribute__((target("avx512bw,avx512vbmi")))
constexpr int MOVED_TOGETHER = LANES;
bool expands() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi"); }
#else
#define PAG_MOVES_BYTES
constexpr int MOVED_TOGETHER = LANES / 2;
bool expands() { return true; }
#endif

// Of which byte, among those that are moved together, each byte of a vector is made.
struct Places {
  alignas(64) uint8_t at[4 * LANES];
};

constexpr Places make_places() {
  constexpr uint8_t NOWHERE = 0x80;
  Places places = {};
  for (int i = 0; i < 4 * LANES; i++) {
    const int number = i / 4 % MOVED_TOGETHER, byte = i % 4 - 1;
    places.at[i] = (uint8_t)(byte < 0 ? NOWHERE : WEIGHT_BYTES * number + byte);
  }
  return places;
}

constexpr Places PLACES = make_places();

// LANES numbers; up to 16 bytes behind them are read.
PAG_MOVES_BYTES PAG_INLINE Vector expand_vector(const uint8_t* from) {
#if defined(__AVX512F__)
  const __mmask64 somewhere = 0xeeeeeeeeeeeeeeee;
  const __m512i bytes = _mm512_loadu_si512(from), places = _mm512_load_si512(PLACES.at);
  return (Vector)_mm512_cvtepi32_ps(_mm512_maskz_permutexvar_epi8(somewhere, places, bytes));
#else
  const __m128i low = _mm_loadu_si128((const __m128i*)from);
  const __m128i high = _mm_loadu_si128((const __m128i*)(from + MOVED_TOGETHER * WEIGHT_BYTES));
  const __m256i bytes = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  const __m256i places = _mm256_load_si256((const __m256i*)PLACES.at);
  return (Vector)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, places));
#endif
}

template <int PIXELS, int WIDTH, bool KEEP>
PAG_OUTLINE PAG_MOVES_BYTES void expand_and_multiply_tile(const Input& input,
                                                          const uint8_t* compressed, int64_t half,
                                                          float* kept, const Epilogue& e,
                                                          int column, int columns) {
  constexpr int COUNT = WIDTH < VECTORS * LANES ? WIDTH / LANES : VECTORS;
  Vector sums[PIXELS][COUNT] = {};
  // Where both halves are read at once, what is needed at their end lies behind the other one.
  const int64_t leap = COUNT * LANES > HALF ? half : 0;
  const uint8_t *ahead = compressed + AHEAD, *const end_of_half = compressed + half;
  if (half <= AHEAD) ahead += leap;
  const float* const* rows = input.rows;
  for (int segment = 0, source = 0; segment < input.segments; segment++, rows += PIXELS) {
    const int64_t length = input.lengths[source];
    if (++source == input.sources) source = 0;
    const float* end[PIXELS];
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) end[i] = rows[i] + input.offset + length;
    for (int64_t k = -length; k < 0; k++, compressed += HALF_BYTES) {
      Vector w[COUNT];
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) {
        const int at = j * LANES;
        w[j] = expand_vector(compressed + at / HALF * half + at % HALF * WEIGHT_BYTES);
        if (KEEP) store(kept + at, w[j]);
      }
      if (KEEP) kept += WIDTH;
      PAG_UNROLL
      for (int at = 0; at < COUNT * LANES; at += HALF) {
        __builtin_prefetch(ahead + at / HALF * half, 0, 2);
        __builtin_prefetch(compressed + NEXT + at / HALF * half, 0, 3);
      }
      ahead += HALF_BYTES;
      if (ahead == end_of_half) ahead += leap;
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

template <int PIXELS, int WIDTH, bool KEEP>
PAG_INLINE void expand_and_multiply_pixels(int pixels, const Input& input,
                                           const uint8_t* compressed, int64_t half, float* kept,
                                           const Epilogue& e, int column, int columns) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS)
      expand_and_multiply_tile<PIXELS, WIDTH, KEEP>(input, compressed, half, kept, e, column,
                                                    columns);
    else
      expand_and_multiply_pixels<PIXELS - 1, WIDTH, KEEP>(pixels, input, compressed, half, kept, e,
                                                          column, columns);
  }
}

template <int WIDTH>
PAG_INLINE void expand_and_multiply_width(int pixels, const Input& input, const pag_block& block,
                                          float* kept, const Epilogue& e) {
  constexpr int STEP = VECTORS * LANES;
  for (int at = 0; at < block.columns; at += STEP) {
    const int columns = block.columns - at < STEP ? block.columns - at : STEP;
    const uint8_t* compressed = block.compressed + at / HALF * block.half;
    if (kept)
      expand_and_multiply_pixels<TILE, WIDTH, true>(pixels, input, compressed, block.half,
                                                    kept + at, e, block.column + at, columns);
    else
      expand_and_multiply_pixels<TILE, WIDTH, false>(pixels, input, compressed, block.half,
                                                     nullptr, e, block.column + at, columns);
  }
}

// `kept`: where the weights are wanted as floats, or null.
PAG_INLINE void expand_and_multiply_block(int pixels, const Input& input, const pag_block& block,
                                          float* kept, const Epilogue& e) {
  if (block.width == 32)
    expand_and_multiply_width<32>(pixels, input, block, kept, e);
  else
    expand_and_multiply_width<16>(pixels, input, block, kept, e);
}
#else
bool expands() { return false; }

PAG_INLINE void expand_and_multiply_block(int, const Input&, const pag_block&, float*,
                                          const Epilogue&) {}
#endif

// --- tall tiles --------------------------------------------------------------------------------
//
// Where all pixels are few enough, one vector of output channels of all of them at once: compressed
// weights are read and expanded just once, and that is spread evenly over the multiplications. Of tiles
// as wide as others, the first one waits for the memory, which then waits for the other tiles.

#if defined(__AVX512F__)
// Up to LANES rows as columns, the next number `step` floats on.
PAG_INLINE void transpose_rows(const float* const* rows, int pixels, int64_t length, int64_t step,
                               float* to) {
  const float* at[LANES];
  for (int i = 0; i < LANES; i++) at[i] = rows[i < pixels ? i : 0];
  for (int64_t k = 0; k < length; k += LANES) {
    const int count = length - k < LANES ? (int)(length - k) : LANES;
    Vector v[LANES];
    PAG_UNROLL
    for (int i = 0; i < LANES; i++) v[i] = load_up_to(at[i] + k, count);
    transpose(v);
    for (int i = 0; i < count; i++, to += step) store_up_to(to, v[i], pixels);
  }
}

// The input of one tile as (depth, pixels).
PAG_OUTLINE void transpose_input(const Input& input, int pixels, float* to) {
  const float* const* rows = input.rows;
  for (int segment = 0, source = 0; segment < input.segments; segment++, rows += pixels) {
    const int64_t length = input.lengths[source];
    if (++source == input.sources) source = 0;
    for (int first = 0; first < pixels; first += LANES)
      transpose_rows(rows + first, pixels - first < LANES ? pixels - first : LANES, length, pixels,
                     to + first);
    to += length * pixels;
  }
}

template <int PIXELS>
PAG_OUTLINE PAG_MOVES_BYTES void multiply_tall_tile(const float* transposed, int64_t depth,
                                                    const uint8_t* compressed, const Epilogue& e,
                                                    int column, int columns) {
  constexpr int STEPS_AHEAD = 2400 / PIXELS;  // a pixel takes half a cycle of each step
  Vector sums[PIXELS][1] = {};
  for (int64_t k = 0; k < depth; k++, transposed += PIXELS, compressed += HALF_BYTES) {
    const Vector w = expand_vector(compressed);
    __builtin_prefetch(compressed + STEPS_AHEAD * HALF_BYTES, 0, 3);
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) sums[i][0] += broadcast(transposed[i]) * w;
  }
  finish_tile<PIXELS, 1>(e, sums, column, columns);
}

template <int PIXELS>
PAG_INLINE void multiply_tall_pixels(int pixels, const float* transposed, int64_t depth,
                                     const uint8_t* compressed, const Epilogue& e, int column,
                                     int columns) {
  if constexpr (PIXELS > TILE) {
    if (pixels == PIXELS)
      multiply_tall_tile<PIXELS>(transposed, depth, compressed, e, column, columns);
    else
      multiply_tall_pixels<PIXELS - 1>(pixels, transposed, depth, compressed, e, column, columns);
  }
}

PAG_INLINE void multiply_tall(int pixels, const float* transposed, int64_t depth,
                              const pag_block& block, const Epilogue& e) {
  for (int at = 0; at < block.columns; at += HALF)
    multiply_tall_pixels<TALL_TILE>(pixels, transposed, depth,
                                    block.compressed + at / HALF * block.half, e, block.column + at,
                                    block.columns - at < HALF ? block.columns - at : HALF);
}
#else
PAG_INLINE void transpose_input(const Input&, int, float*) {}
PAG_INLINE void multiply_tall(int, const float*, int64_t, const pag_block&, const Epilogue&) {}
#endif

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
  const int64_t first = bundle * depth * padded + (int64_t)plan.taps * block.channels * at;
  block.compressed = nullptr;
  block.half = depth * HALF_BYTES;
  if (call.compressed == PAG_IN_DIGITS) {
    block.half = digit_steps(depth) * STEP_BYTES;
    block.compressed = (const uint8_t*)call.weights + at / HALF * block.half;
  } else if (call.compressed) {
    block.compressed = (const uint8_t*)call.weights + first * WEIGHT_BYTES;
  } else {
    block.weights = (const float*)call.weights + first;
  }
  return block;
}

// Tiles of about equal size: a short last one would waste its loads of the weights.
PAG_INLINE int64_t tile_start(const pag_plan& plan, int64_t tile) {
  return plan.pixels * tile / plan.tiles;
}

struct Pixel {
  int32_t index, image, y, x;  // y, x: input coordinates of the first tap, maybe outside
  bool rows_inside, inside;    // all rows of taps, all taps
};

PAG_INLINE int32_t index_at(const pag_list& list, int64_t position) {
  return list.pixels ? list.pixels[position] : (int32_t)position;
}

// index / divisor, exactly: the product is off by far less than 1 / (2 divisor).
PAG_INLINE int32_t quotient(int32_t index, double per_divisor) {
  return (int32_t)((index + 0.5) * per_divisor);
}

PAG_INLINE Pixel pixel_at(const pag_plan& plan, int64_t position) {
  const pag_convolution& call = *plan.call;
  Pixel p;
  p.index = index_at(call.list, position);
  const int32_t line = quotient(p.index, plan.per_width);
  p.image = quotient(line, plan.per_height);
  p.y = (line - p.image * call.out_height) * call.stride[0] - call.padding[0];
  p.x = (p.index - line * call.out_width) * call.stride[1] - call.padding[1];
  p.rows_inside = p.y >= 0 && p.y + (call.kernel[0] - 1) * call.dilation[0] < call.height;
  p.inside = p.rows_inside && p.x >= 0 &&
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

// The same where all taps are inside.
PAG_INLINE void find_inside_taps(const pag_convolution& call, const pag_source& source,
                                 const Pixel& p, const float** rows, int64_t step) {
  for (int ky = 0; ky < call.kernel[0]; ky++) {
    const float* line = row_of(source, p.image, p.y + ky * call.dilation[0], 0);
    for (int kx = 0; kx < call.kernel[1]; kx++, rows += step)
      *rows = line + ((p.x + kx * call.dilation[1]) >> source.shift) * source.stride;
  }
}

// The input of one tile, as the multiplication reads it.
struct TileRows {
  int pixels;
  int segments;
  bool joined, gathered;
};

// Whether the pixels at [begin, begin + pixels) of the list have numbers one after the other.
PAG_INLINE bool is_consecutive(const pag_list& list, int64_t begin, int pixels) {
  if (!list.pixels) return true;
  const int32_t* at = list.pixels + begin;
  bool result = true;
  for (int i = 1; i < pixels; i++) result &= at[i] == at[0] + i;
  return result;
}

// Pixels side by side in one row: where they are follows from the first one.
struct Run {
  Pixel first;
  bool inside;  // all taps of all pixels
};

PAG_INLINE bool find_run(const pag_plan& plan, int64_t begin, int pixels, Run& run) {
  const pag_convolution& call = *plan.call;
  if (!is_consecutive(call.list, begin, pixels)) return false;
  run.first = pixel_at(plan, begin);
  const int32_t last = run.first.x + (pixels - 1) * call.stride[1];
  if (last >= call.out_width * call.stride[1] - call.padding[1]) return false;
  run.inside = run.first.rows_inside && run.first.x >= 0 &&
               last + (call.kernel[1] - 1) * call.dilation[1] < call.width;
  return true;
}

// Whether all taps of all pixels are inside. Most listed pixels lie beside the one before.
PAG_INLINE bool find_pixels(const pag_plan& plan, int64_t begin, int pixels, Pixel* found) {
  const pag_convolution& call = *plan.call;
  const int32_t end = call.out_width * call.stride[1] - call.padding[1];
  const int32_t reach = (call.kernel[1] - 1) * call.dilation[1];
  Pixel p = pixel_at(plan, begin);
  found[0] = p;
  bool all = p.inside;
  for (int i = 1; i < pixels; i++) {
    const bool beside = index_at(call.list, begin + i) == p.index + 1;
    if (beside && p.x + call.stride[1] < end) {
      p.index++;
      p.x += call.stride[1];
      p.inside = p.rows_inside && p.x >= 0 && p.x + reach < call.width;
    } else {
      p = pixel_at(plan, begin + i);
    }
    found[i] = p;
    all &= p.inside;
  }
  return all;
}

PAG_INLINE void find_segments(const pag_plan& plan, const pag_scratch& scratch, int pixels,
                              const Pixel* found, const float** rows) {
  const pag_convolution& call = *plan.call;
  const int sources = call.source_count;
  for (int s = 0; s < sources; s++) {
    const pag_source& source = call.sources[s];
    if (!source.shift) {
      const float* first[MAX_TILE];
      for (int i = 0; i < pixels; i++)
        first[i] = found[i].inside ? row_of(source, found[i].image, found[i].y, found[i].x)
                                   : scratch.zeros;
      for (int segment = s; segment < plan.segments; segment += sources)
        for (int i = 0; i < pixels; i++)
          rows[segment * pixels + i] = first[i] + scratch.offsets[segment];
    }
    const int64_t step = (int64_t)sources * pixels;
    for (int i = 0; i < pixels; i++)
      if (!found[i].inside)
        find_taps(call, source, found[i], scratch.zeros, rows + s * pixels + i, step);
      else if (source.shift)
        find_inside_taps(call, source, found[i], rows + s * pixels + i, step);
  }
}

// The same of a run that is inside, of sources that are not upsampled; a segment holds some taps.
PAG_INLINE void find_run_segments(const pag_plan& plan, const pag_scratch& scratch, int pixels,
                                  const Pixel& p, int taps, const float** rows) {
  const pag_convolution& call = *plan.call;
  for (int s = 0; s < call.source_count; s++) {
    const pag_source& source = call.sources[s];
    const float* first = row_of(source, p.image, p.y, p.x);
    const int64_t step = call.stride[1] * source.stride;
    for (int segment = s; segment < plan.segments; segment += taps * call.source_count)
      for (int i = 0; i < pixels; i++)
        rows[segment / taps * pixels + i] = first + scratch.offsets[segment] + i * step;
  }
}

// Fill scratch.rows: where the segments of the pixels at [begin, end) of the list start.
PAG_INLINE TileRows find_rows(const pag_plan& plan, const pag_scratch& scratch, int64_t begin,
                              int64_t end) {
  const pag_convolution& call = *plan.call;
  const int pixels = (int)(end - begin), sources = call.source_count;
  const float** rows = scratch.rows;
  TileRows tile = {pixels, plan.segments, false, false};
  if (plan.pointwise && !plan.gathered) {
    for (int s = 0; s < sources; s++)
      for (int i = 0; i < pixels; i++)
        rows[s * pixels + i] =
            call.sources[s].data + index_at(call.list, begin + i) * call.sources[s].stride;
    return tile;
  }
  Run run;
  const bool quick = plan.plain && (plan.joined || !plan.gathered);
  if (quick && find_run(plan, begin, pixels, run) && run.inside) {
    tile.joined = plan.joined;
    const int taps = tile.joined ? call.kernel[1] : 1;
    tile.segments = plan.segments / taps;
    find_run_segments(plan, scratch, pixels, run.first, taps, rows);
    return tile;
  }
  Pixel found[MAX_TILE];
  tile.joined = find_pixels(plan, begin, pixels, found) && plan.joined;
  tile.gathered = plan.gathered && !tile.joined;
  if (tile.joined) {
    tile.segments = call.kernel[0];
    for (int i = 0; i < pixels; i++) {
      const float* first = row_of(call.sources[0], found[i].image, found[i].y, found[i].x);
      for (int ky = 0; ky < call.kernel[0]; ky++)
        rows[ky * pixels + i] = first + scratch.offsets[ky * call.kernel[1]];
    }
  } else if (!tile.gathered) {
    find_segments(plan, scratch, pixels, found, rows);
  }
  return tile;
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

// The same of a pixel whose taps of a row are contiguous: those that are inside at once.
PAG_INLINE void gather_lines(const pag_convolution& call, const Pixel& p, float* to) {
  const pag_source& source = call.sources[0];
  const int64_t length = (int64_t)call.kernel[1] * call.channels;
  const int32_t first = p.x < 0 ? -p.x : 0;
  const int32_t left = call.width - p.x, last = left < call.kernel[1] ? left : call.kernel[1];
  for (int ky = 0; ky < call.kernel[0]; ky++, to += length) {
    const int32_t y = p.y + ky * call.dilation[0];
    memset(to, 0, sizeof(float) * length);
    if ((uint32_t)y >= (uint32_t)call.height || first >= last) continue;
    copy_floats(to + (int64_t)first * call.channels, row_of(source, p.image, y, p.x + first),
                (int64_t)(last - first) * call.channels);
  }
}

// Copy what one pixel reads next to each other, scaled if the call says so.
PAG_INLINE void gather_pixel(const pag_plan& plan, const pag_scratch& scratch, int64_t position,
                             float* to) {
  const pag_convolution& call = *plan.call;
  const Pixel p = pixel_at(plan, position);
  if (plan.joined) return gather_lines(call, p, to);
  const int sources = call.source_count;
  const float** rows = scratch.rows;
  for (int s = 0; s < sources; s++)
    find_taps(call, call.sources[s], p, scratch.zeros, rows + s, sources);
  const float* scales = nullptr;
  if (call.input_scale) scales = call.input_scale + (int64_t)p.image * call.channels;
  for (int tap = 0; tap < plan.taps; tap++, rows += sources) {
    int channel = 0;
    for (int s = 0; s < sources; s++) {
      const int count = call.sources[s].channels;
      if (scales)
        copy_scaled(to, rows[s], scales + channel, count);
      else
        copy_floats(to, rows[s], count);
      to += count;
      channel += count;
    }
  }
}

PAG_INLINE void start_epilogue(const pag_convolution& call, int pixels, Epilogue& e) {
  e.bias = call.bias;
  e.steps = call.compressed ? call.steps : nullptr;
  e.activation = call.activation;
  e.after = call.residual_after_activation;
  e.slope = call.slope;
  for (int i = 0; i < pixels; i++) e.residual[i] = e.scale[i] = nullptr;
  e.plain = !call.scale && !(call.residual && e.after) &&
            (e.activation == PAG_NONE || e.activation == PAG_RELU || e.activation == PAG_RELU6);
}

PAG_INLINE const float* residual_line(const pag_convolution& call, int32_t image, int32_t y) {
  const int64_t height = call.out_height >> call.residual_shift;
  const int64_t width = call.out_width >> call.residual_shift;
  return call.residual + (image * height + (y >> call.residual_shift)) * width * call.residual_stride;
}

PAG_INLINE void aim_at_small_residual(const pag_plan& plan, int64_t begin, int pixels, Epilogue& e) {
  const pag_convolution& call = *plan.call;
  const float* line = nullptr;
  int32_t last = -2, x = 0;
  for (int i = 0; i < pixels; i++) {
    const int32_t index = index_at(call.list, begin + i);
    if (index == last + 1 && x + 1 < call.out_width) {
      x++;  // as most are
    } else {
      const int32_t number = quotient(index, plan.per_width);
      const int32_t image = quotient(number, plan.per_height);
      x = index - number * call.out_width;
      line = residual_line(call, image, number - image * call.out_height);
    }
    last = index;
    e.residual[i] = line + (x >> call.residual_shift) * call.residual_stride;
  }
}

// SMALL: the residual is read upsampled. Looking at that for each tile would cost all convolutions.
template <bool SMALL>
PAG_INLINE void aim_epilogue(const pag_plan& plan, int64_t begin, int pixels, Epilogue& e) {
  const pag_convolution& call = *plan.call;
  for (int i = 0; i < pixels; i++)
    e.out[i] = call.out + index_at(call.list, begin + i) * call.out_stride;
  if (SMALL)
    aim_at_small_residual(plan, begin, pixels, e);
  else if (call.residual)
    for (int i = 0; i < pixels; i++)
      e.residual[i] = call.residual + index_at(call.list, begin + i) * call.residual_stride;
  if (call.scale)
    for (int i = 0; i < pixels; i++) {
      const int32_t line = quotient(index_at(call.list, begin + i), plan.per_width);
      e.scale[i] = call.scale + (int64_t)quotient(line, plan.per_height) * call.out_channels;
    }
}

// --- runs ------------------------------------------------------------------------------------
//
// With few output channels the inner loop is bound by loading the input. Where the pixels of a tile
// lie side by side, each input pixel is loaded once for all three taps of a row of the kernel.

constexpr int RUN_TAPS = 3;
constexpr bool RUNS = LANES == 16;  // with fewer registers there is nothing to win

// rows: (kernel rows, sources, PIXELS + 2), the input pixels below and beside the run.
template <int PIXELS>
PAG_OUTLINE void multiply_run(const pag_plan& plan, const float* const* rows, const Epilogue& e) {
  const pag_convolution& call = *plan.call;
  constexpr int SEEN = PIXELS + RUN_TAPS - 1;
  const int64_t tap = (int64_t)call.channels * LANES;
  Vector sums[PIXELS][1], start = {};
  if (e.bias) start = load_up_to(e.bias, call.out_channels);
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i++) sums[i][0] = start;
  const float* weights = (const float*)call.weights;
  for (int ky = 0; ky < call.kernel[0]; ky++, weights += (RUN_TAPS - 1) * tap)
    for (int s = 0; s < call.source_count; s++, rows += SEEN) {
      const int64_t length = call.sources[s].channels;
      for (int64_t k = 0; k < length; k++, weights += LANES) {
        Vector w[RUN_TAPS];
        PAG_UNROLL
        for (int t = 0; t < RUN_TAPS; t++) w[t] = load(weights + t * tap);
        PAG_UNROLL
        for (int i = 0; i < SEEN; i++) {
          Vector x = broadcast(rows[i][k]);
          PAG_ONE_REGISTER(x);
          PAG_UNROLL
          for (int t = 0; t < RUN_TAPS; t++)
            if (i >= t && i - t < PIXELS) sums[i - t][0] += x * w[t];
        }
      }
    }
  finish_tile<PIXELS, 1>(e, sums, 0, call.out_channels);
}

template <int PIXELS>
PAG_INLINE void multiply_runs(int pixels, const pag_plan& plan, const float* const* rows,
                              const Epilogue& e) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS)
      multiply_run<PIXELS>(plan, rows, e);
    else
      multiply_runs<PIXELS - 1>(pixels, plan, rows, e);
  }
}

PAG_INLINE bool takes_runs(const pag_plan& plan) {
  const pag_convolution& call = *plan.call;
  return RUNS && call.out_channels <= LANES && call.groups == 1 && !plan.gathered &&
         !call.compressed &&
         call.kernel[1] == RUN_TAPS && call.stride[1] == 1 && call.dilation[1] == 1;
}

PAG_INLINE void find_seen(const pag_plan& plan, const pag_scratch& scratch, const Pixel& first,
                          int pixels) {
  const pag_convolution& call = *plan.call;
  const int seen = pixels + RUN_TAPS - 1;
  const float** rows = scratch.rows;
  for (int ky = 0; ky < call.kernel[0]; ky++) {
    const int y = first.y + ky * call.dilation[0];
    const bool row_inside = (uint32_t)y < (uint32_t)call.height;
    for (int s = 0; s < call.source_count; s++, rows += seen)
      for (int i = 0; i < seen; i++) {
        const int x = first.x + i;
        const bool inside = row_inside && (uint32_t)x < (uint32_t)call.width;
        rows[i] = inside ? row_of(call.sources[s], first.image, y, x) : scratch.zeros;
      }
  }
}

// --- one tap of few channels -------------------------------------------------------------------
//
// Finding each pixel's input would take as long as multiplying it. Where the pixels of a tile lie
// side by side, so do their inputs, and one address leads to all of them.

constexpr int STRIP_AHEAD = 2048;  // floats: large maps come from memory, which takes several tiles

template <int PIXELS, int WIDTH>
PAG_OUTLINE void multiply_strip(const float* in, int64_t step, int channels, const float* weights,
                                const Epilogue& e, int column, int columns) {
  constexpr int COUNT = WIDTH < VECTORS * LANES ? WIDTH / LANES : VECTORS;
  constexpr int SHARING = 3;  // pixels that one register leads to: at 0, 1 and 2 steps from it
  Vector sums[PIXELS][COUNT];
  start_tile(e, sums, column, columns);
  const float* at[(PIXELS + SHARING - 1) / SHARING];
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i += SHARING) at[i / SHARING] = in + i * step;
  const float* ahead = in + STRIP_AHEAD;
  for (int k = 0; k < channels; k++, weights += WIDTH, ahead += PIXELS) {
    __builtin_prefetch(ahead, 0, 3);  // at least each line, where pixels lie one behind the other
    Vector w[COUNT];
    PAG_UNROLL
    for (int j = 0; j < COUNT; j++) w[j] = load(weights + j * LANES);
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) {
      Vector x = broadcast(at[i / SHARING][i % SHARING * step]);
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) sums[i][j] += x * w[j];
    }
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i += SHARING) at[i / SHARING]++;
  }
  finish_tile<PIXELS, COUNT>(e, sums, column, columns);
}

template <int WIDTH>
PAG_INLINE void multiply_strips(const float* in, int64_t step, const pag_block& block,
                                const Epilogue& e) {
  constexpr int STEP = VECTORS * LANES;
  for (int at = 0; at < block.columns; at += STEP)
    multiply_strip<TILE, WIDTH>(in, step, block.channels, block.weights + at, e, block.column + at,
                                block.columns - at < STEP ? block.columns - at : STEP);
}

// The input of the first of TILE pixels side by side, or null: there are fewer from there on.
PAG_INLINE const float* find_strip(const pag_plan& plan, int64_t begin, int64_t end) {
  const pag_convolution& call = *plan.call;
  if (end - begin < TILE) return nullptr;
  const int32_t first = index_at(call.list, begin);
  if (index_at(call.list, begin + TILE - 1) != first + TILE - 1) return nullptr;
  if (plan.pointwise) return call.sources[0].data + first * call.sources[0].stride;
  const Pixel p = pixel_at(plan, begin);
  const int32_t last = p.x + (TILE - 1) * call.stride[1];
  if (last >= call.out_width * call.stride[1] - call.padding[1]) return nullptr;
  const bool inside = (uint32_t)p.y < (uint32_t)call.height && p.x >= 0 && last < call.width;
  return inside ? row_of(call.sources[0], p.image, p.y, p.x) : nullptr;
}

// --- few output channels -----------------------------------------------------------------------
//
// With hardly any output channels, most of a vector of them would be padding: vectors lie along the
// input channels instead, and are added up at the end.

constexpr int DOT_PIXELS = 7;  // at once: they share loads of the weights, and do not wait for sums

// The weights as (out_channels, depth): columns of the packed ones.
PAG_INLINE void unpack_columns(const pag_plan& plan, float* to) {
  const pag_convolution& call = *plan.call;
  const int64_t depth = (int64_t)plan.taps * call.channels;
  for (int column = 0; column < call.out_channels; column++)
    for (int64_t k = 0; k < depth; k++)
      *to++ = ((const float*)call.weights)[k * PAG_NARROW + column];
}

// Add the products of one vector of channels; `count` of them if WHOLE is false.
template <bool WHOLE, int PIXELS, int COLUMNS>
PAG_INLINE void add_dots(const float* const* rows, const float* weights, int64_t depth, int64_t k,
                         int count, Vector (&sums)[PIXELS][COLUMNS]) {
  Vector w[COLUMNS];
  PAG_UNROLL
  for (int j = 0; j < COLUMNS; j++) {
    const float* at = weights + j * depth + k;
    w[j] = WHOLE ? load(at) : load_first(at, count);
  }
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i++) {
    const Vector x = WHOLE ? load(rows[i] + k) : load_first(rows[i] + k, count);
    PAG_UNROLL
    for (int j = 0; j < COLUMNS; j++) sums[i][j] += x * w[j];
  }
}

template <int PIXELS, int COLUMNS>
PAG_INLINE void dot_pixels(const Input& input, const float* const* rows, int step,
                           const float* weights, int64_t depth, Vector* to) {
  Vector sums[PIXELS][COLUMNS] = {};
  for (int segment = 0, source = 0; segment < input.segments; segment++, rows += step) {
    const int64_t length = input.lengths[source];
    if (++source == input.sources) source = 0;
    const float* at[PIXELS];
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) at[i] = rows[i];
    int64_t k = 0;
    for (; k + LANES <= length; k += LANES)
      add_dots<true, PIXELS, COLUMNS>(at, weights, depth, k, LANES, sums);
    if (k < length)
      add_dots<false, PIXELS, COLUMNS>(at, weights, depth, k, (int)(length - k), sums);
    weights += length;
  }
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i++)
    PAG_UNROLL
    for (int j = 0; j < COLUMNS; j++) to[i * COLUMNS + j] = sums[i][j];
}

template <int COLUMNS>
PAG_OUTLINE void dot_tile(int pixels, const Input& input, const float* weights, int64_t depth,
                          const Epilogue& e) {
  constexpr int MOST = (MAX_TILE * COLUMNS + LANES - 1) / LANES * LANES;
  Vector products[MOST];
  int i = 0;
  for (; i + DOT_PIXELS <= pixels; i += DOT_PIXELS)
    dot_pixels<DOT_PIXELS, COLUMNS>(input, input.rows + i, pixels, weights, depth,
                                    products + i * COLUMNS);
  for (; i + 2 <= pixels; i += 2)
    dot_pixels<2, COLUMNS>(input, input.rows + i, pixels, weights, depth, products + i * COLUMNS);
  if (i < pixels)
    dot_pixels<1, COLUMNS>(input, input.rows + i, pixels, weights, depth, products + i * COLUMNS);
  const int used = pixels * COLUMNS;
  for (i = used; i % LANES; i++) products[i] = Vector{};
  alignas(64) float sums[MOST];
  for (i = 0; i < used; i += LANES) {
    Vector group[LANES];
    PAG_UNROLL
    for (int j = 0; j < LANES; j++) group[j] = products[i + j];
    store(sums + i, sum_each(group));
  }
  if (e.bias)
    for (i = 0; i < pixels; i++)
      for (int j = 0; j < COLUMNS; j++) sums[i * COLUMNS + j] += e.bias[j];
  bool together = e.plain && e.activation == PAG_NONE && !e.residual[0];
  for (i = 1; i < pixels; i++) together &= e.out[i] == e.out[0] + i * COLUMNS;
  if (together) return copy_floats(e.out[0], sums, used);
  alignas(64) float rows[MAX_TILE * LANES];
  for (i = 0; i < pixels; i++)
    for (int j = 0; j < COLUMNS; j++) rows[i * LANES + j] = sums[i * COLUMNS + j];
  finish(e, rows, pixels, LANES, 0, COLUMNS);
}

PAG_INLINE void dot(int columns, int pixels, const Input& input, const float* weights,
                    int64_t depth, const Epilogue& e) {
  switch (columns) {
    case 1: return dot_tile<1>(pixels, input, weights, depth, e);
    case 2: return dot_tile<2>(pixels, input, weights, depth, e);
    case 3: return dot_tile<3>(pixels, input, weights, depth, e);
    case 4: return dot_tile<4>(pixels, input, weights, depth, e);
  }
}

// One tap at positions [begin, end) of the list: of LANES results at a time, COLUMNS of each pixel.
template <int COLUMNS>
PAG_OUTLINE void dot_pointwise(const pag_plan& plan, const float* weights, int64_t begin,
                               int64_t end) {
  constexpr int PIXELS = LANES / COLUMNS;
  const pag_convolution& call = *plan.call;
  const int channels = call.channels;
  for (; begin < end; begin += PIXELS) {
    const int count = end - begin < PIXELS ? (int)(end - begin) : PIXELS;
    const float* rows[PIXELS];
    float* out[PIXELS];
    for (int i = 0; i < PIXELS; i++) {  // of fewer the last one again
      const int64_t index = index_at(call.list, begin + (i < count ? i : count - 1));
      rows[i] = call.sources[0].data + index * call.sources[0].stride;
      out[i] = call.out + index * call.out_stride;
    }
    for (int first = 0; first < call.out_channels; first += COLUMNS) {
      const int left = call.out_channels - first, columns = left < COLUMNS ? left : COLUMNS;
      const float* at[COLUMNS];
      Vector bias = {}, sums[LANES] = {};
      for (int j = 0; j < COLUMNS; j++) {  // likewise
        const int column = first + (j < columns ? j : columns - 1);
        at[j] = weights + (int64_t)column * channels;
        if (call.bias && COLUMNS == 1) bias = broadcast(call.bias[column]);
        if (call.bias && COLUMNS > 1)
          for (int i = 0; i < PIXELS; i++) bias[i * COLUMNS + j] = call.bias[column];
      }
      for (int c = 0; c < channels; c += LANES) {
        const int valid = channels - c;
        Vector w[COLUMNS];
        PAG_UNROLL
        for (int j = 0; j < COLUMNS; j++) w[j] = load_up_to(at[j] + c, valid);
        PAG_UNROLL
        for (int i = 0; i < PIXELS; i++) {
          const Vector x = load_up_to(rows[i] + c, valid);
          PAG_UNROLL
          for (int j = 0; j < COLUMNS; j++) sums[i * COLUMNS + j] += x * w[j];
        }
      }
      const Vector total = sum_each(sums) + bias;
      float results[LANES];
      with_activation(call.activation, call.slope,
                      [&](auto activate) PAG_LAMBDA { store(results, activate(total)); });
      for (int i = 0; i < count; i++)
        for (int j = 0; j < columns; j++) out[i][first + j] = results[i * COLUMNS + j];
    }
  }
}

// Where the taps of a tile of a depthwise convolution are: at one distance from each pixel's first
// tap where all are inside the input, which saves loading a pointer per tap and pixel.
struct InsideTaps {
  const float* const* first;  // (pixels)
  const int64_t* offsets;     // (taps)
  PAG_INLINE const float* operator()(int tap, int i, int) const { return first[i] + offsets[tap]; }
};
struct AnyTaps {
  const float* const* rows;  // (taps, pixels)
  PAG_INLINE const float* operator()(int tap, int i, int pixels) const {
    return rows[tap * pixels + i];
  }
};

template <int PIXELS, int COUNT, class Taps>
PAG_OUTLINE void depthwise_tile(const pag_plan& plan, Taps taps, const Epilogue& e, int channel) {
  const pag_convolution& call = *plan.call;
  const int64_t padded = (call.channels + 15) / 16 * 16;
  const int channels = call.channels - channel < COUNT * LANES ? call.channels - channel
                                                               : COUNT * LANES;
  const float* weights = (const float*)call.weights + channel;
  Vector sums[PIXELS][COUNT];
  PAG_UNROLL
  for (int j = 0; j < COUNT; j++) {
    Vector start = {};
    if (call.bias) start = load_up_to(call.bias + channel + j * LANES, channels - j * LANES);
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) sums[i][j] = start;
  }
  if (channels < COUNT * LANES) {
    for (int tap = 0; tap < plan.taps; tap++, weights += padded)
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++) {
        const float* row = taps(tap, i, PIXELS) + channel;
        PAG_UNROLL
        for (int j = 0; j < COUNT; j++)
          sums[i][j] += load_up_to(row + j * LANES, channels - j * LANES) *
                        load_up_to(weights + j * LANES, channels - j * LANES);
      }
  } else {
    for (int tap = 0; tap < plan.taps; tap++, weights += padded) {
      Vector w[COUNT];
      PAG_UNROLL
      for (int j = 0; j < COUNT; j++) {
        w[j] = load(weights + j * LANES);
        __builtin_prefetch(weights + (COUNT + j) * LANES);  // of the next channels
      }
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++) {
        const float* row = taps(tap, i, PIXELS) + channel;
        PAG_UNROLL
        for (int j = 0; j < COUNT; j++) sums[i][j] += load(row + j * LANES) * w[j];
      }
    }
  }
  finish_tile<PIXELS, COUNT>(e, sums, channel, channels);
}

template <int COUNT, int PIXELS, class Taps>
PAG_INLINE void depthwise_pixels(int pixels, const pag_plan& plan, Taps taps, const Epilogue& e,
                                 int channel) {
  if constexpr (PIXELS > 0) {
    if (pixels == PIXELS)
      depthwise_tile<PIXELS, COUNT>(plan, taps, e, channel);
    else
      depthwise_pixels<COUNT, PIXELS - 1>(pixels, plan, taps, e, channel);
  }
}

template <int COUNT, class Taps>
PAG_INLINE void depthwise_vectors(int count, int pixels, const pag_plan& plan, Taps taps,
                                  const Epilogue& e, int channel) {
  if constexpr (COUNT > 0) {
    if (count == COUNT)
      depthwise_pixels<COUNT, DEPTHWISE_TILE>(pixels, plan, taps, e, channel);
    else
      depthwise_vectors<COUNT - 1>(count, pixels, plan, taps, e, channel);
  }
}

// --- slim groups ---------------------------------------------------------------------------------
//
// Groups of 2, 4 or 8 input channels and as many output channels fill a vector only together. It is
// multiplied as it lies, as often as a group has channels: product number t of an input channel belongs
// to the output channel whose number differs from its own by the bits of t. What belongs together is
// moved there only when all taps are added up. See packing.py.

constexpr int SLIM_SUMS = LANES == 16 ? 24 : 12;  // vectors of sums of a tile

constexpr int32_t slim_tile(int32_t slim) {
  const int32_t pixels = SLIM_SUMS / (slim < LANES ? slim : LANES);
  return slim > 1 && pixels < DEPTHWISE_TILE ? pixels : DEPTHWISE_TILE;
}

struct Turns {
  alignas(64) int32_t at[LANES][LANES];
};

constexpr Turns make_turns() {
  Turns turns = {};
  for (int turn = 0; turn < LANES; turn++)
    for (int lane = 0; lane < LANES; lane++) turns.at[turn][lane] = lane ^ turn;
  return turns;
}

constexpr Turns TURNS = make_turns();

// One vector of channels. WHOLE: all of them are there.
template <int PIXELS, int GROUP, bool WHOLE, class Taps>
PAG_OUTLINE void multiply_slim(const pag_plan& plan, Taps taps, const Epilogue& e, int channel) {
  constexpr int COUNT = GROUP < LANES ? GROUP : LANES;  // a wider group is several vectors
  const pag_convolution& call = *plan.call;
  const float* weights = (const float*)call.weights +
                         (int64_t)channel / PAG_NARROW * PAG_NARROW * plan.taps * GROUP;
  Vector sums[PIXELS][COUNT] = {};
  for (int tap = 0; tap < plan.taps; tap++)
    PAG_UNROLL
    for (int part = 0; part < GROUP; part += COUNT, weights += COUNT * PAG_NARROW) {
      const int from = channel ^ part, valid = call.channels - from;
      const float* w = weights + from % PAG_NARROW;
      Vector x[PIXELS];
      PAG_UNROLL
      for (int i = 0; i < PIXELS; i++) {
        const float* row = taps(tap, i, PIXELS) + from;
        x[i] = WHOLE ? load(row) : load_up_to(row, valid);
      }
      PAG_UNROLL
      for (int turn = 0; turn < COUNT; turn++, w += PAG_NARROW) {
        const Vector own = load(w);
        PAG_UNROLL
        for (int i = 0; i < PIXELS; i++) sums[i][turn] += x[i] * own;
      }
    }
  Vector totals[PIXELS][1];
  const int columns = WHOLE || call.channels - channel > LANES ? LANES : call.channels - channel;
  start_tile(e, totals, channel, columns);
  PAG_UNROLL
  for (int turn = 0; turn < COUNT; turn++) {
    Integers at;
    memcpy(&at, TURNS.at[turn], sizeof at);
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) totals[i][0] += __builtin_shuffle(sums[i][turn], at);
  }
  finish_tile<PIXELS, 1>(e, totals, channel, columns);
}

template <int PIXELS, int GROUP, class Taps>
PAG_INLINE void slim_pixels(int pixels, const pag_plan& plan, Taps taps, const Epilogue& e,
                            int channel) {
  if constexpr (PIXELS > 0) {
    if (pixels < PIXELS)
      slim_pixels<PIXELS - 1, GROUP>(pixels, plan, taps, e, channel);
    else if (channel / PAG_NARROW * PAG_NARROW + PAG_NARROW <= plan.call->channels)
      multiply_slim<PIXELS, GROUP, true>(plan, taps, e, channel);
    else
      multiply_slim<PIXELS, GROUP, false>(plan, taps, e, channel);
  }
}

// --- vectors along the channels ------------------------------------------------------------------

// Vectors [from, to) of the channels of one tile; one, where groups have several channels.
template <class Taps>
PAG_INLINE void multiply_channels(const pag_plan& plan, int from, int to, int pixels, Taps taps,
                                  const Epilogue& e) {
  const int channel = from * LANES;
  switch (plan.slim) {
    case 2: return slim_pixels<slim_tile(2), 2>(pixels, plan, taps, e, channel);
    case 4: return slim_pixels<slim_tile(4), 4>(pixels, plan, taps, e, channel);
    case 8: return slim_pixels<slim_tile(8), 8>(pixels, plan, taps, e, channel);
    default: depthwise_vectors<DEPTHWISE_VECTORS>(to - from, pixels, plan, taps, e, channel);
  }
}

// A group of tiles goes through the channels together: neighbours share input rows, which stay
// cached only as long as few other channels are read in between.
template <bool SMALL>
void along_channels(const pag_plan& plan, const pag_scratch& scratch, int64_t tile_begin,
                    int64_t tile_end) {
  const pag_convolution& call = *plan.call;
  const int count = (int)(tile_end - tile_begin);
  const int vectors = (call.channels + LANES - 1) / LANES;
  const int together = plan.slim == 1 ? DEPTHWISE_VECTORS : 1;
  const int passes = (vectors + together - 1) / together;
  Epilogue e[PAG_CHANNELS_GROUP];
  const float* first[PAG_CHANNELS_GROUP][MAX_TILE];
  int pixels[PAG_CHANNELS_GROUP];
  bool inside[PAG_CHANNELS_GROUP];
  const int64_t size = (int64_t)plan.segments * plan.tile;
  for (int t = 0; t < count; t++) {
    const int64_t begin = tile_start(plan, tile_begin + t);
    pixels[t] = (int)(tile_start(plan, tile_begin + t + 1) - begin);
    start_epilogue(call, pixels[t], e[t]);
    aim_epilogue<SMALL>(plan, begin, pixels[t], e[t]);
    Run run;
    if (plan.plain && find_run(plan, begin, pixels[t], run) && run.inside) {
      const float* row = row_of(call.sources[0], run.first.image, run.first.y, run.first.x);
      inside[t] = true;
      for (int i = 0; i < pixels[t]; i++)
        first[t][i] = row + i * call.stride[1] * call.sources[0].stride;
      continue;
    }
    Pixel found[MAX_TILE];
    inside[t] = find_pixels(plan, begin, pixels[t], found) && (plan.plain || plan.taps == 1);
    if (!inside[t])
      find_segments(plan, scratch, pixels[t], found, scratch.rows + t * size);
    else
      for (int i = 0; i < pixels[t]; i++)
        first[t][i] = row_of(call.sources[0], found[i].image, found[i].y, found[i].x);
  }
  for (int pass = 0; pass < passes; pass++) {
    const int from = vectors * pass / passes, to = vectors * (pass + 1) / passes;
    for (int t = 0; t < count; t++) {
      if (inside[t])
        multiply_channels(plan, from, to, pixels[t], InsideTaps{first[t], scratch.offsets}, e[t]);
      else
        multiply_channels(plan, from, to, pixels[t], AnyTaps{scratch.rows + t * size}, e[t]);
    }
  }
}

// --- depthwise, one tap ------------------------------------------------------------------------
//
// Each pixel is one of the input, scaled: hardly more than a copy.

constexpr int SCALED_PIXELS = 64;  // of a row, before the next channels

PAG_INLINE bool only_scales(const pag_plan& plan) {
  const pag_convolution& call = *plan.call;
  const int32_t last_y = (call.out_height - 1) * call.stride[0] - call.padding[0];
  const int32_t last_x = (call.out_width - 1) * call.stride[1] - call.padding[1];
  return plan.taps == 1 && !call.scale && !call.residual && call.padding[0] <= 0 &&
         call.padding[1] <= 0 && last_y < call.height && last_x < call.width;
}

// Pixels side by side, `count` channels from the last of COUNT vectors on.
template <int COUNT, class Activation>
PAG_INLINE void scale_run(const pag_plan& plan, const Pixel& first, int pixels, int channel,
                          int count, Activation activate) {
  const pag_convolution& call = *plan.call;
  const pag_source& source = call.sources[0];
  const int last = (COUNT - 1) * LANES, rest = count - last;
  Vector w[COUNT], b[COUNT];
  PAG_UNROLL
  for (int j = 0; j < COUNT; j++) {
    const int at = channel + j * LANES, left = j < COUNT - 1 ? LANES : rest;
    w[j] = load_up_to((const float*)call.weights + at, left);
    b[j] = call.bias ? load_up_to(call.bias + at, left) : Vector{};
  }
  const float* line = row_of(source, first.image, first.y, 0) + channel;
  float* out = call.out + first.index * call.out_stride + channel;
  int32_t x = first.x;
  for (int i = 0; i < pixels; i++, x += call.stride[1], out += call.out_stride) {
    const float* in = line + (x >> source.shift) * source.stride;
    PAG_UNROLL
    for (int j = 0; j < COUNT - 1; j++)
      store(out + j * LANES, activate(load(in + j * LANES) * w[j] + b[j]));
    store_up_to(out + last, activate(load_up_to(in + last, rest) * w[COUNT - 1] + b[COUNT - 1]), rest);
  }
}

void scale_pixels(const pag_plan& plan, int64_t begin, int64_t end) {
  const pag_convolution& call = *plan.call;
  const int32_t edge = call.out_width * call.stride[1] - call.padding[1];
  with_activation(call.activation, call.slope, [&](auto activate) PAG_LAMBDA {
    while (begin < end) {
      const Pixel first = pixel_at(plan, begin);
      int pixels = 1;
      while (pixels < SCALED_PIXELS && begin + pixels < end &&
             first.x + pixels * call.stride[1] < edge &&
             index_at(call.list, begin + pixels) == first.index + pixels)
        pixels++;
      int channel = 0;
      for (; channel + 2 * LANES < call.channels; channel += 2 * LANES)
        scale_run<2>(plan, first, pixels, channel, 2 * LANES, activate);
      if (channel + LANES < call.channels)
        scale_run<2>(plan, first, pixels, channel, call.channels - channel, activate);
      else
        scale_run<1>(plan, first, pixels, channel, call.channels - channel, activate);
      begin += pixels;
    }
  });
}

// What all tiles of one call share.
template <bool SMALL>
struct Multiplication {
  const pag_plan& plan;
  const pag_scratch& scratch;
  int32_t blocks;
  bool keeps;  // compressed weights as floats: more than one tile reads them
  int32_t lengths[PAG_MAX_SOURCES];
  int32_t joined_length, depth;
  const float* gathered[MAX_TILE];
  Epilogue epilogue;

  Multiplication(const pag_plan& plan, const pag_scratch& scratch, int32_t block_begin,
                 int32_t block_end, int64_t pixels)
      : plan(plan), scratch(scratch), blocks(block_end - block_begin), keeps(pixels > plan.tile) {
    const pag_convolution& call = *plan.call;
    depth = plan.taps * call.channels;
    joined_length = call.kernel[1] * call.channels;
    for (int s = 0; s < call.source_count; s++) lengths[s] = call.sources[s].channels;
    for (int i = 0; i < plan.tile; i++) gathered[i] = scratch.panel + (int64_t)i * depth;
    for (int32_t index = 0; index < blocks; index++)
      scratch.blocks[index] = block_at(plan, block_begin + index);
    if (plan.expanded_bytes) prepare_weights();
    if (plan.dot) unpack_columns(plan, scratch.columns);
    start_epilogue(call, plan.tile, epilogue);
  }

  // Give each block its memory for expanded weights, and expand them unless the first tile does.
  void prepare_weights() {
    float* to = scratch.expanded;
    for (int32_t index = 0; index < blocks; index++) {
      pag_block& block = scratch.blocks[index];
      block.expanded = to;
      to += (int64_t)depth * block.width;
      if (plan.expanding) continue;
      if (plan.call->compressed == PAG_IN_DIGITS)
        expand_digits(block, depth, block.expanded);
      else
        expand_block(block, depth, block.expanded);
      use_expanded(block);
    }
  }

  PAG_INLINE void use_expanded(pag_block& block) {
    block.weights = block.expanded;
    block.compressed = nullptr;
  }

  PAG_INLINE void multiply_with(pag_block& block, int pixels, const Input& input) {
    if (!block.compressed) return multiply_block(pixels, input, block, epilogue);
    expand_and_multiply_block(pixels, input, block, keeps ? block.expanded : nullptr, epilogue);
    if (keeps) use_expanded(block);
  }

  // The tile of the pixels at [begin, end) of the list.
  PAG_INLINE void multiply(int64_t begin, int64_t end) {
    const pag_convolution& call = *plan.call;
    aim_epilogue<SMALL>(plan, begin, (int)(end - begin), epilogue);
    const TileRows rows = find_rows(plan, scratch, begin, end);
    Input input = {scratch.rows, rows.segments, call.source_count, lengths, 0};
    if (rows.joined) input.lengths = &joined_length;
    if (rows.gathered) {
      for (int i = 0; i < rows.pixels; i++)
        gather_pixel(plan, scratch, begin + i, scratch.panel + (int64_t)i * depth);
      input = {gathered, 1, 1, &depth, 0};
    }
    if (plan.dot) return dot(call.out_channels, rows.pixels, input, scratch.columns, depth, epilogue);
    if (rows.pixels > TILE) return multiply_as_tall(rows.pixels, input);
    for (int32_t index = 0; index < blocks; index++) {
      pag_block& block = scratch.blocks[index];
      if (call.groups > 1) {
        input.offset = block.channel;
        input.lengths = &block.channels;
      }
      multiply_with(block, rows.pixels, input);
    }
  }

  PAG_INLINE void multiply_as_tall(int pixels, const Input& input) {
    transpose_input(input, pixels, scratch.transposed);
    for (int32_t index = 0; index < blocks; index++)
      multiply_tall(pixels, scratch.transposed, depth, scratch.blocks[index], epilogue);
  }

  // The same where few output channels are computed side by side; false: the pixels are not.
  PAG_INLINE bool multiply_as_run(int64_t begin, int64_t end) {
    Run run;
    const int pixels = (int)(end - begin);
    if (!find_run(plan, begin, pixels, run)) return false;
    aim_epilogue<SMALL>(plan, begin, pixels, epilogue);
    find_seen(plan, scratch, run.first, pixels);
    multiply_runs<TILE>(pixels, plan, scratch.rows, epilogue);
    return true;
  }

  // TILE pixels of one tap from `begin` on; false: they do not lie side by side.
  PAG_INLINE bool multiply_as_strip(int64_t begin, int64_t end) {
    const pag_convolution& call = *plan.call;
    const float* in = find_strip(plan, begin, end);
    if (!in) return false;
    aim_epilogue<SMALL>(plan, begin, TILE, epilogue);
    const int64_t step = call.stride[1] * call.sources[0].stride;
    for (int32_t index = 0; index < blocks; index++) {
      const pag_block& block = scratch.blocks[index];
      if (block.width == 32)
        multiply_strips<32>(in, step, block, epilogue);
      else
        multiply_strips<16>(in, step, block, epilogue);
    }
    return true;
  }
};

template <bool SMALL>
PAG_INLINE void convolve_with(const pag_plan& plan, const pag_scratch& scratch, int32_t block_begin,
                              int32_t block_end, int64_t tile_begin, int64_t tile_end) {
  if (plan.slim == 1 && only_scales(plan))
    return scale_pixels(plan, tile_start(plan, tile_begin), tile_start(plan, tile_end));
  if (plan.slim) {
    for (int64_t at = tile_begin; at < tile_end; at += PAG_CHANNELS_GROUP)
      along_channels<SMALL>(plan, scratch, at,
                            at + PAG_CHANNELS_GROUP < tile_end ? at + PAG_CHANNELS_GROUP : tile_end);
    return;
  }
  const int64_t begin = tile_start(plan, tile_begin), end = tile_start(plan, tile_end);
  Multiplication<SMALL> tiles(plan, scratch, block_begin, block_end, end - begin);
  if (plan.dot && plan.plain_dot) {
    constexpr int MANY_CHANNELS = 128;
    if (plan.call->channels < MANY_CHANNELS || plan.call->out_channels == 1)
      return dot_pointwise<1>(plan, scratch.columns, begin, end);
    if (plan.call->out_channels == 2)
      return dot_pointwise<2>(plan, scratch.columns, begin, end);
    return dot_pointwise<4>(plan, scratch.columns, begin, end);
  }
  if (plan.thin) {
    for (int64_t at = begin; at < end; at += TILE)
      if (!tiles.multiply_as_strip(at, end)) tiles.multiply(at, at + TILE < end ? at + TILE : end);
    return;
  }
  const bool runs = takes_runs(plan) && !plan.dot;
  int64_t times = tile_end - tile_begin;
  if (times > 1 && plan.tile > TILE) times = (end - begin + TILE - 1) / TILE;
  for (int64_t time = 0; time < times; time++) {
    const int64_t from = begin + (end - begin) * time / times;
    const int64_t to = begin + (end - begin) * (time + 1) / times;
    if (!runs || !tiles.multiply_as_run(from, to)) tiles.multiply(from, to);
  }
}

// Blocks [block_begin, block_end) of output channels at tiles [tile_begin, tile_end) of pixels.
void convolution(const pag_plan* shared, const pag_scratch* scratch, int32_t block_begin,
                 int32_t block_end, int64_t tile_begin, int64_t tile_end) {
  if (shared->call->residual && shared->call->residual_shift)
    convolve_with<true>(*shared, *scratch, block_begin, block_end, tile_begin, tile_end);
  else
    convolve_with<false>(*shared, *scratch, block_begin, block_end, tile_begin, tile_end);
}

}  // namespace
