// Convolution by instructions that multiply matrices of whole numbers (Intel AMX).
//
// Weights and input are whole numbers of 24 bits: multiples of a step, one of each output channel and
// one of each pixel that is computed, with which the largest one just fits. A number is three digits of
// 8 bits with signs: 256 (256 high + middle) + low. Of the nine products of digits of two numbers the
// three smallest are left out: together they are about as large as what rounding to 24 bits loses. The
// others are added up exactly, those of each weight (2^32, 2^24, 2^16) by themselves.
#pragma once

#include "convolution.h"

namespace {

#if defined(__AMX_INT8__)
constexpr int TILE_ROWS = PAG_NARROW;
constexpr float LARGEST = 127 * 65536;  // of three digits: 127, 127, 127
constexpr float LEAST_SCALED = 1e-30f;  // what is smaller than this at all of a pixel counts as zero

// What is stored by vectors may not be moved behind a tile that is loaded, and so on: the compiler
// does not know what these read.
#define PAG_FENCE asm volatile("" ::: "memory")

struct TileConfiguration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles, as text, for they become names of registers. Tiles 0 to 5 hold sums.
#define PAG_INPUT 6
#define PAG_WEIGHTS 7

// While it lives, tiles of sums and input have so many rows.
struct Tiles {
  explicit Tiles(int rows) {
    alignas(64) TileConfiguration configuration;
    for (int tile = 0; tile <= PAG_WEIGHTS; tile++) {
      configuration.bytes[tile] = 64;
      configuration.rows[tile] = (uint8_t)(tile == PAG_WEIGHTS ? TILE_ROWS : rows);
    }
    PAG_FENCE;
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
};

// --- input as digits ---------------------------------------------------------------------------

// The largest of the bits of `length` floats without their signs: in the order of their sizes, and
// those of what is not finite above all others.
PAG_INLINE __m512i largest_bits(const float* x, int64_t length, __m512i largest) {
  const __m512i unsign = _mm512_set1_epi32(0x7fffffff);
  for (int64_t k = 0; k < length; k += LANES)
    largest = _mm512_max_epu32(largest, _mm512_and_si512(unsign, _mm512_loadu_si512(x + k)));
  return largest;
}

struct Steps {
  float of_input, per_input;  // step, and 1 / step
};

PAG_INLINE Steps steps_of(__m512i largest) {
  constexpr uint32_t INFINITE = 0x7f800000;
  const uint32_t bits = _mm512_reduce_max_epu32(largest);
  float size;
  memcpy(&size, &bits, sizeof size);
  if (bits >= INFINITE) return {NAN, 0};
  if (size < LEAST_SCALED) return {0, 0};
  return {size / LARGEST, LARGEST / size};
}

struct Digits {
  alignas(64) uint8_t at[4 * LANES];
};

// Bytes of sixteen numbers, those of each digit together.
constexpr Digits make_digits() {
  Digits digits = {};
  for (int i = 0; i < 4 * LANES; i++) digits.at[i] = (uint8_t)(i % LANES * 4 + i / LANES);
  return digits;
}

constexpr Digits DIGITS_TOGETHER = make_digits();

// Sixteen numbers: their lowest digits, then the middle ones, then the highest, each plus 128.
PAG_INLINE __m512i digits_of(__m512 x, __m512 per_step) {
  const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(x, per_step));
  const __m512i positive = _mm512_add_epi32(number, _mm512_set1_epi32(0x808080));
  return _mm512_permutexvar_epi8(_mm512_load_si512(DIGITS_TOGETHER.at), positive);
}

// One row of a tile: `length` floats, a multiple of DIGITS_DEPTH.
PAG_INLINE int8_t* write_digits(const float* x, int64_t length, float per_step, int8_t* to) {
  const __m512 factor = _mm512_set1_ps(per_step);
  const __m512i sign = _mm512_set1_epi8((char)0x80);
  for (int64_t k = 0; k < length; k += DIGITS_DEPTH, to += STEP_BYTES) {
    __m512i v[4];
    PAG_UNROLL
    for (int i = 0; i < 4; i++) v[i] = digits_of(_mm512_loadu_ps(x + k + i * LANES), factor);
    const __m512i first = _mm512_shuffle_i32x4(v[0], v[1], 0x44);
    const __m512i second = _mm512_shuffle_i32x4(v[2], v[3], 0x44);
    const __m512i third = _mm512_shuffle_i32x4(v[0], v[1], 0xee);
    const __m512i fourth = _mm512_shuffle_i32x4(v[2], v[3], 0xee);
    const __m512i low = _mm512_shuffle_i32x4(first, second, 0x88);
    const __m512i middle = _mm512_shuffle_i32x4(first, second, 0xdd);
    const __m512i high = _mm512_shuffle_i32x4(third, fourth, 0x88);
    _mm512_store_si512(to, _mm512_xor_si512(high, sign));
    _mm512_store_si512(to + DIGIT_BYTES, _mm512_xor_si512(middle, sign));
    _mm512_store_si512(to + 2 * DIGIT_BYTES, _mm512_xor_si512(low, sign));
  }
  return to;
}

// --- multiplication ----------------------------------------------------------------------------

// Sums of one tile of pixels and up to 32 columns: (digits' weight, 16 columns, pixel, column).
struct DigitSums {
  alignas(64) int32_t at[DIGITS][2][TILE_ROWS][LANES];
};

// What is asked for while a tile is multiplied: so many lines in each step.
struct Ahead {
  const int8_t* at;
  int64_t lines;
};

constexpr int DIGITS_AHEAD = 2 * STEP_BYTES;

// Ask for the weights of a digit two steps on.
template <bool ASK>
PAG_INLINE void ask_ahead(const int8_t* weights) {
  if (ASK)
    for (int at = 0; at < DIGIT_BYTES; at += 64) __builtin_prefetch(weights + DIGITS_AHEAD + at, 0, 3);
}

// ONCE: weights are read for this tile alone, and waited for; else they were asked for before.
template <int HALVES, bool ONCE>
PAG_OUTLINE void multiply_digits(const int8_t* input, const int8_t* weights, int64_t half,
                                 int64_t steps, Ahead ahead, DigitSums& sums) {
  _tile_zero(0);
  _tile_zero(2);
  _tile_zero(4);
  if (HALVES == 2) {
    _tile_zero(1);
    _tile_zero(3);
    _tile_zero(5);
  }
// One digit of the input and one of the weights, for the sums of both halves.
#define PAG_MULTIPLY(DIGIT, SUM, OTHER, FIRST)                                        \
  _tile_loadd(PAG_WEIGHTS, weights + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH);            \
  ask_ahead<ONCE && FIRST>(weights + (DIGIT) * DIGIT_BYTES);                          \
  _tile_dpbssd(SUM, PAG_INPUT, PAG_WEIGHTS);                                          \
  if (HALVES == 2) {                                                                  \
    _tile_loadd(PAG_WEIGHTS, weights + half + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH);   \
    ask_ahead<ONCE && FIRST>(weights + half + (DIGIT) * DIGIT_BYTES);                 \
    _tile_dpbssd(OTHER, PAG_INPUT, PAG_WEIGHTS);                                      \
  }
  for (int64_t step = 0; step < steps; step++, input += STEP_BYTES, weights += STEP_BYTES) {
    for (int64_t line = 0; !ONCE && line < ahead.lines; line++, ahead.at += 64)
      __builtin_prefetch(ahead.at, 0, 2);
    _tile_loadd(PAG_INPUT, input, DIGITS_DEPTH);  // the highest digits
    PAG_MULTIPLY(0, 0, 1, true)
    PAG_MULTIPLY(1, 2, 3, true)
    PAG_MULTIPLY(2, 4, 5, true)
    _tile_loadd(PAG_INPUT, input + DIGIT_BYTES, DIGITS_DEPTH);
    PAG_MULTIPLY(0, 2, 3, false)
    PAG_MULTIPLY(1, 4, 5, false)
    _tile_loadd(PAG_INPUT, input + 2 * DIGIT_BYTES, DIGITS_DEPTH);
    PAG_MULTIPLY(0, 4, 5, false)
  }
#undef PAG_MULTIPLY
  _tile_stored(0, sums.at[0][0], DIGITS_DEPTH);
  _tile_stored(2, sums.at[1][0], DIGITS_DEPTH);
  _tile_stored(4, sums.at[2][0], DIGITS_DEPTH);
  if (HALVES == 2) {
    _tile_stored(1, sums.at[0][1], DIGITS_DEPTH);
    _tile_stored(3, sums.at[1][1], DIGITS_DEPTH);
    _tile_stored(5, sums.at[2][1], DIGITS_DEPTH);
  }
}

// --- all of it ---------------------------------------------------------------------------------

constexpr float PRODUCT = 65536.f * 256;  // of the lowest digits that count, and of expanded weights
constexpr int BLOCK = PAG_DIGITS_BLOCK;   // columns

// Some taps, that are multiplied before the next ones: all their weights for a block stay cached.
struct TapRange {
  int begin, end;
  int64_t first_step, steps;
  bool first, last;
};

template <bool SMALL>
struct DigitConvolution {
  const pag_plan& plan;
  const pag_scratch& scratch;
  int64_t depth, tile_bytes;
  int32_t lengths[PAG_MAX_SOURCES];
  int32_t joined_length;

  DigitConvolution(const pag_plan& plan, const pag_scratch& scratch)
      : plan(plan), scratch(scratch) {
    const pag_convolution& call = *plan.call;
    depth = (int64_t)plan.taps * call.channels;
    joined_length = call.kernel[1] * call.channels;
    for (int s = 0; s < call.source_count; s++) lengths[s] = call.sources[s].channels;
    tile_bytes = plan.digits_bytes / plan.group;
  }

  TapRange range(int part) const {
    if (plan.parts == 1) return {0, plan.taps, 0, digit_steps(depth), true, true};
    const int begin = plan.taps * part / plan.parts, end = plan.taps * (part + 1) / plan.parts;
    const int64_t each = plan.call->channels / DIGITS_DEPTH;
    return {begin, end, begin * each, (end - begin) * each, part == 0, part == plan.parts - 1};
  }

  // Where one pixel reads at a tap what the pixel `back` places before it reads at the next one, as
  // neighbours do, its digits are copied.
  struct Sharing {
    const float* const* rows;
    int pixels, sources, end, back;

    Sharing(const TileRows& tile, const float* const* rows, const pag_convolution& call, int end)
        : rows(rows), pixels(tile.pixels), sources(call.source_count), end(end),
          back(call.dilation[1] % call.stride[1] ? MAX_TILE : call.dilation[1] / call.stride[1]) {}

    PAG_INLINE const float* row(int tap, int source, int i) const {
      return rows[(int64_t)(tap * sources + source) * pixels + i];
    }

    PAG_INLINE bool operator()(int tap, int source, int i) const {
      return i >= back && tap + 1 < end &&
             row(tap, source, i) == row(tap + 1, source, i - back);
    }
  };

  // The input of a tile whose pixels share a step. False: a number is not finite.
  bool write_shared(const TileRows& tile, const TapRange& taps, int8_t* to, float* of_input) {
    const pag_convolution& call = *plan.call;
    const Sharing shared(tile, scratch.rows, call, taps.end);
    __m512i largest = _mm512_setzero_si512();
    for (int tap = taps.begin; tap < taps.end; tap++)
      for (int s = 0; s < call.source_count; s++)
        for (int i = 0; i < tile.pixels; i++)
          if (!shared(tap, s, i)) largest = largest_bits(shared.row(tap, s, i), lengths[s], largest);
    const Steps both = steps_of(largest);
    if (both.of_input != both.of_input) return false;
    const int64_t tap_bytes = (int64_t)call.channels / DIGITS_DEPTH * STEP_BYTES;
    for (int i = 0; i < tile.pixels; i++) {
      int8_t* row = to + i * DIGITS_DEPTH;
      of_input[i] = both.of_input;
      for (int tap = taps.begin; tap < taps.end; tap++)
        for (int s = 0; s < call.source_count; s++) {
          if (!shared(tap, s, i)) {
            row = write_digits(shared.row(tap, s, i), lengths[s], both.per_input, row);
            continue;
          }
          const int8_t* from = row + tap_bytes - shared.back * DIGITS_DEPTH;
          const int64_t count = lengths[s] / DIGITS_DEPTH * DIGITS;
          for (int64_t k = 0; k < count; k++, row += DIGIT_BYTES, from += DIGIT_BYTES)
            _mm512_store_si512(row, _mm512_load_si512(from));
        }
    }
    return true;
  }

  // The same where each pixel has a step of its own.
  void write_pixel(const TileRows& tile, const TapRange& taps, int i, int8_t* to, float* of_input) {
    const int sources = plan.call->source_count;
    const float* const* rows = scratch.rows + i;
    __m512i largest = _mm512_setzero_si512();
    for (int s = taps.begin * sources; s < taps.end * sources; s++)
      largest = largest_bits(rows[(int64_t)s * tile.pixels], lengths[s % sources], largest);
    const Steps both = steps_of(largest);
    *of_input = both.of_input;
    for (int s = taps.begin * sources; s < taps.end * sources; s++)
      to = write_digits(rows[(int64_t)s * tile.pixels], lengths[s % sources], both.per_input, to);
  }

  // The same of input that is not in whole steps: it is copied together first.
  void write_gathered(const TileRows& tile, int64_t position, int i, int8_t* to, float* of_input) {
    const int sources = tile.joined ? 1 : plan.call->source_count;
    const int32_t* own = tile.joined ? &joined_length : lengths;
    const int64_t padded = digit_steps(depth) * DIGITS_DEPTH;
    float* at = scratch.panel;
    if (tile.gathered) {
      gather_pixel(plan, scratch, position, at);
    } else {
      for (int s = 0; s < tile.segments; at += own[s % sources], s++)
        copy_floats(at, scratch.rows[(int64_t)s * tile.pixels + i], own[s % sources]);
    }
    memset(scratch.panel + depth, 0, sizeof(float) * (padded - depth));
    const Steps both = steps_of(largest_bits(scratch.panel, padded, _mm512_setzero_si512()));
    *of_input = both.of_input;
    write_digits(scratch.panel, padded, both.per_input, to);
  }

  void write_tile(int64_t begin, int64_t end, const TapRange& taps, int8_t* to, float* of_input) {
    const TileRows tile = find_rows(plan, scratch, begin, end);
    const bool whole = plan.whole_steps && !tile.gathered;
    if (whole && plan.taps > 1 && write_shared(tile, taps, to, of_input)) return;
    for (int i = 0; i < tile.pixels; i++)
      if (whole)
        write_pixel(tile, taps, i, to + i * DIGITS_DEPTH, of_input + i);
      else
        write_gathered(tile, begin + i, i, to + i * DIGITS_DEPTH, of_input + i);
  }

  // Sums as floats: added to those of taps before, and finished and written, or kept for taps behind.
  template <int HALVES>
  PAG_INLINE void finish_tile(const Epilogue& e, const DigitSums& sums, const TapRange& taps,
                              const float* of_input, int pixels, const pag_block& block,
                              float* kept) {
    alignas(64) float buffer[TILE_ROWS * HALVES * LANES];
    const float high = e.activation == PAG_RELU6 ? 6.f : INFINITY;
    float* to = taps.last ? buffer : kept;
    Vector step[HALVES], bias[HALVES];
    PAG_UNROLL
    for (int j = 0; j < HALVES; j++) {
      const int count = block.columns - j * LANES, at = block.column + j * LANES;
      step[j] = load_up_to(e.steps + at, count) * PRODUCT;
      bias[j] = e.bias && taps.last ? load_up_to(e.bias + at, count) : Vector{};
    }
    for (int i = 0; i < pixels; i++) {
      PAG_UNROLL
      for (int j = 0; j < HALVES; j++) {
        const int count = block.columns - j * LANES, at = block.column + j * LANES;
        const int place = (i * HALVES + j) * LANES;
        Vector part[DIGITS];
        PAG_UNROLL
        for (int d = 0; d < DIGITS; d++)
          part[d] = (Vector)_mm512_cvtepi32_ps(_mm512_load_si512(sums.at[d][j][i]));
        Vector y = (part[0] * 256.f + part[1]) * 256.f + part[2];
        y = y * (step[j] * of_input[i]) + bias[j];
        if (!taps.first) y += load(kept + place);
        if (!e.plain || !taps.last) {
          store(to + place, y);
          continue;
        }
        if (e.residual[i]) y += load_up_to(e.residual[i] + at, count);
        if (e.activation != PAG_NONE) y = at_most(at_least(y, 0.f), high);
        store_up_to(e.out[i] + at, y, count);
      }
    }
    if (!e.plain && taps.last)
      finish(e, buffer, pixels, HALVES * LANES, block.column, block.columns);
  }

  template <int HALVES, bool ONCE>
  PAG_INLINE void multiply(const pag_block& block, const TapRange& taps, Ahead ahead,
                           const int8_t* input, const float* of_input, int pixels,
                           const Epilogue& e, float* kept) {
    DigitSums sums;
    const int8_t* weights = (const int8_t*)block.compressed + taps.first_step * STEP_BYTES;
    multiply_digits<HALVES, ONCE>(input, weights, block.half, taps.steps, ahead, sums);
    PAG_FENCE;
    finish_tile<HALVES>(e, sums, taps, of_input, pixels, block, kept);
  }

  // Tiles whose input stays cached while the weights of some taps pass by.
  void run_group(int32_t block_begin, int32_t block_end, int64_t tile_begin, int64_t tile_end) {
    Epilogue e[PAG_DIGITS_GROUP];
    float of_input[PAG_DIGITS_GROUP][TILE_ROWS];
    int64_t begin[PAG_DIGITS_GROUP + 1];
    const int count = (int)(tile_end - tile_begin);
    for (int t = 0; t <= count; t++) begin[t] = tile_start(plan, tile_begin + t);
    for (int t = 0; t < count; t++) {
      start_epilogue(*plan.call, (int)(begin[t + 1] - begin[t]), e[t]);
      aim_epilogue<SMALL>(plan, begin[t], (int)(begin[t + 1] - begin[t]), e[t]);
    }
    for (int part = 0; part < plan.parts; part++) {
      const TapRange taps = range(part);
      for (int t = 0; t < count; t++)
        write_tile(begin[t], begin[t + 1], taps, scratch.digits + t * tile_bytes, of_input[t]);
      PAG_FENCE;
      // While a block is multiplied, the memory is asked for as many weights as the next one has.
      const int64_t lines = (2 * STEP_BYTES / 64 + count - 1) / count;
      for (int32_t index = block_begin; index < block_end; index++) {
        const pag_block block = block_at(plan, index);
        const int8_t* next =
            (const int8_t*)block.compressed + 2 * block.half + taps.first_step * STEP_BYTES;
        float* kept = scratch.kept + (int64_t)(index - block_begin) * plan.group * TILE_ROWS * BLOCK;
        for (int t = 0; t < count; t++, kept += TILE_ROWS * BLOCK) {
          const int8_t* input = scratch.digits + t * tile_bytes;
          const int pixels = (int)(begin[t + 1] - begin[t]);
          const Ahead ahead = {next + t * lines * taps.steps * 64, lines};
          if (block.width < BLOCK)
            multiply<1, false>(block, taps, ahead, input, of_input[t], pixels, e[t], kept);
          else if (count == 1)
            multiply<2, true>(block, taps, ahead, input, of_input[t], pixels, e[t], kept);
          else
            multiply<2, false>(block, taps, ahead, input, of_input[t], pixels, e[t], kept);
        }
      }
    }
  }
};

template <bool SMALL>
void convolve_digits(const pag_plan& plan, const pag_scratch& scratch, int32_t block_begin,
                     int32_t block_end, int64_t tile_begin, int64_t tile_end) {
  DigitConvolution<SMALL> all(plan, scratch);
  const int64_t groups = (tile_end - tile_begin + plan.group - 1) / plan.group;
  const Tiles tiles((int)((plan.pixels + plan.tiles - 1) / plan.tiles));
  for (int64_t group = 0; group < groups; group++)
    all.run_group(block_begin, block_end, tile_begin + (tile_end - tile_begin) * group / groups,
                  tile_begin + (tile_end - tile_begin) * (group + 1) / groups);
}

void convolution_of_digits(const pag_plan* plan, const pag_scratch* scratch, int32_t block_begin,
                           int32_t block_end, int64_t tile_begin, int64_t tile_end) {
  if (plan->call->residual && plan->call->residual_shift)
    convolve_digits<true>(*plan, *scratch, block_begin, block_end, tile_begin, tile_end);
  else
    convolve_digits<false>(*plan, *scratch, block_begin, block_end, tile_begin, tile_end);
}
#else
constexpr decltype(pag_kernels::digits) convolution_of_digits = nullptr;
#endif

}  // namespace
