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

// Tiles, as text, for they become names of registers. Tiles 0 to 5 hold sums, or input.
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
//
// What one digit of the weights and one of the input make belongs to one of three sums. Tiles of
// weights have to come from memory, or a cache, as often as they are multiplied with another tile of
// input, unless registers hold them, so it depends on how many tiles of pixels there are.

// Of 16 columns and two tiles of pixels, or of 32 columns and one: (digits' weight, which of the two,
// pixel, column).
struct DigitSums {
  alignas(64) int32_t at[DIGITS][2][TILE_ROWS][LANES];
};

template <bool BOTH>
PAG_INLINE void start_sums() {
  _tile_zero(0);
  _tile_zero(2);
  _tile_zero(4);
  if (BOTH) {
    _tile_zero(1);
    _tile_zero(3);
    _tile_zero(5);
  }
}

template <bool BOTH>
PAG_INLINE void store_sums(DigitSums& sums) {
  _tile_stored(0, sums.at[0][0], DIGITS_DEPTH);
  _tile_stored(2, sums.at[1][0], DIGITS_DEPTH);
  _tile_stored(4, sums.at[2][0], DIGITS_DEPTH);
  if (BOTH) {
    _tile_stored(1, sums.at[0][1], DIGITS_DEPTH);
    _tile_stored(3, sums.at[1][1], DIGITS_DEPTH);
    _tile_stored(5, sums.at[2][1], DIGITS_DEPTH);
  }
}

// Ask for some bytes of weights, to be kept in the first cache or the second.
template <int CACHE>
PAG_INLINE void ask_for(const int8_t* weights, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(weights + at, 0, 4 - CACHE);
}

// 16 columns of one tile. All its digits are held, weights pass by once. Each step asks for the next
// one; the last for the first of what comes next.
PAG_OUTLINE void multiply_one(const int8_t* input, const int8_t* weights, int64_t steps,
                              const int8_t* next, DigitSums& sums) {
  start_sums<false>();
  for (int64_t step = 1; step <= steps; step++, input += STEP_BYTES, weights += STEP_BYTES) {
    const int8_t* ahead = step < steps ? weights + STEP_BYTES : next;
    _tile_loadd(1, input, DIGITS_DEPTH);  // the highest digits
    _tile_loadd(3, input + DIGIT_BYTES, DIGITS_DEPTH);
    _tile_loadd(5, input + 2 * DIGIT_BYTES, DIGITS_DEPTH);
    _tile_loadd(PAG_WEIGHTS, weights, DIGITS_DEPTH);
    ask_for<1>(ahead, DIGIT_BYTES);
    _tile_dpbssd(0, 1, PAG_WEIGHTS);
    _tile_dpbssd(2, 3, PAG_WEIGHTS);
    _tile_dpbssd(4, 5, PAG_WEIGHTS);
    _tile_loadd(PAG_WEIGHTS, weights + DIGIT_BYTES, DIGITS_DEPTH);
    ask_for<1>(ahead + DIGIT_BYTES, DIGIT_BYTES);
    _tile_dpbssd(2, 1, PAG_WEIGHTS);
    _tile_dpbssd(4, 3, PAG_WEIGHTS);
    _tile_loadd(PAG_WEIGHTS, weights + 2 * DIGIT_BYTES, DIGITS_DEPTH);
    ask_for<1>(ahead + 2 * DIGIT_BYTES, DIGIT_BYTES);
    _tile_dpbssd(4, 1, PAG_WEIGHTS);
  }
  store_sums<false>(sums);
}

// All products; digit 0 is the highest. HOLD loads one of one operand, MULTIPLY one of the other, for
// two sums.
#define PAG_PRODUCTS(HOLD, MULTIPLY)                            \
  HOLD(0) MULTIPLY(0, 0, 1) MULTIPLY(1, 2, 3) MULTIPLY(2, 4, 5) \
  HOLD(1) MULTIPLY(0, 2, 3) MULTIPLY(1, 4, 5)                   \
  HOLD(2) MULTIPLY(0, 4, 5)

// 16 columns of two tiles, the second `other` bytes behind the first. Asks for what is some steps ahead:
// multiplying takes longer here, and leaves the memory more time.
PAG_OUTLINE void multiply_two(const int8_t* input, int64_t other, const int8_t* weights,
                              int64_t steps, const int8_t* next, DigitSums& sums) {
  constexpr int64_t AHEAD = 3;
  start_sums<true>();
#define PAG_HOLD(DIGIT) _tile_loadd(PAG_WEIGHTS, weights + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH);
#define PAG_MULTIPLY(DIGIT, SUM, OTHER_SUM)                                    \
  _tile_loadd(PAG_INPUT, input + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH);         \
  _tile_dpbssd(SUM, PAG_INPUT, PAG_WEIGHTS);                                   \
  ask_for<2>(ahead, DIGIT_BYTES / 2);                                          \
  ahead += DIGIT_BYTES / 2;                                                    \
  _tile_loadd(PAG_INPUT, input + other + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH); \
  _tile_dpbssd(OTHER_SUM, PAG_INPUT, PAG_WEIGHTS);
  for (int64_t step = 1; step <= steps; step++, input += STEP_BYTES, weights += STEP_BYTES) {
    const int64_t beyond = step + AHEAD - 1 - steps;
    const int8_t* ahead = beyond < 0 ? weights + AHEAD * STEP_BYTES : next + beyond * STEP_BYTES;
    PAG_PRODUCTS(PAG_HOLD, PAG_MULTIPLY)
  }
#undef PAG_HOLD
#undef PAG_MULTIPLY
  store_sums<true>(sums);
}

// One of many tiles, with up to 32 columns, whose weights are cached. After each product it may ask for
// a line of what comes next. Of few tiles that is not all of it, but asking for more took longer, too.
template <int HALVES, bool ASK>
PAG_OUTLINE void multiply_many(const int8_t* input, const int8_t* weights, int64_t half,
                               int64_t steps, const int8_t* next, DigitSums& sums) {
  start_sums<HALVES == 2>();
#define PAG_HOLD(DIGIT) _tile_loadd(PAG_INPUT, input + (DIGIT) * DIGIT_BYTES, DIGITS_DEPTH);
#define PAG_MULTIPLY_HALF(AT, SUM)              \
  _tile_loadd(PAG_WEIGHTS, AT, DIGITS_DEPTH);   \
  _tile_dpbssd(SUM, PAG_INPUT, PAG_WEIGHTS);    \
  if (ASK) {                                    \
    ask_for<2>(next, 64);                       \
    next += 64;                                 \
  }
#define PAG_MULTIPLY(DIGIT, SUM, OTHER_SUM)                                                   \
  PAG_MULTIPLY_HALF(weights + (DIGIT) * DIGIT_BYTES, SUM)                                     \
  if (HALVES == 2) {                                                                          \
    PAG_MULTIPLY_HALF(weights + half + (DIGIT) * DIGIT_BYTES, OTHER_SUM)                      \
  }
  for (int64_t step = 0; step < steps; step++, input += STEP_BYTES, weights += STEP_BYTES) {
    PAG_PRODUCTS(PAG_HOLD, PAG_MULTIPLY)
  }
#undef PAG_HOLD
#undef PAG_MULTIPLY
#undef PAG_MULTIPLY_HALF
  store_sums<HALVES == 2>(sums);
}
#undef PAG_PRODUCTS

// --- all of it ---------------------------------------------------------------------------------

constexpr float PRODUCT = 65536.f * 256;  // of the lowest digits that count, and of expanded weights
constexpr int BLOCK = PAG_DIGITS_BLOCK;   // columns

// Some taps, that are multiplied before the next ones: all their weights for a block stay cached.
struct TapRange {
  int begin, end;
  int64_t first_step, steps;
  bool first, last;
};

// Tiles whose digits are made together.
struct TileGroup {
  int count;
  Epilogue epilogue[PAG_DIGITS_GROUP];
  float of_input[PAG_DIGITS_GROUP][TILE_ROWS];
  int64_t begin[PAG_DIGITS_GROUP + 1];  // of their pixels, among all that are listed

  int pixels(int t) const { return (int)(begin[t + 1] - begin[t]); }
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
  // `first` is where those of the first column are, in DigitSums.
  template <int HALVES>
  PAG_INLINE void finish_tile(const Epilogue& e, const DigitSums& sums, int first,
                              const TapRange& taps, const float* of_input, int pixels,
                              const pag_block& block, float* kept) {
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
          part[d] = (Vector)_mm512_cvtepi32_ps(_mm512_load_si512(sums.at[d][first + j][i]));
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

  const int8_t* weights_of(const pag_block& block, const TapRange& taps) const {
    return (const int8_t*)block.compressed + taps.first_step * STEP_BYTES;
  }

  // One or two tiles, for each half of a block.
  void multiply_few(const pag_block& block, const TapRange& taps, const TileGroup& group,
                    float* kept) {
    DigitSums sums;
    const int8_t* weights = weights_of(block, taps);
    pag_block part = block;
    for (int half = 0; part.columns > 0; half++, weights += block.half) {
      const int8_t* next = weights + block.half;
      if (group.count == 1)
        multiply_one(scratch.digits, weights, taps.steps, next, sums);
      else
        multiply_two(scratch.digits, tile_bytes, weights, taps.steps, next, sums);
      PAG_FENCE;
      part.columns = std::min(part.columns, LANES);
      for (int t = 0; t < group.count; t++)
        finish_tile<1>(group.epilogue[t], sums, t, taps, group.of_input[t], group.pixels(t), part,
                       kept + (2 * t + half) * TILE_ROWS * LANES);
      part.column += LANES;
      part.columns = block.columns - (half + 1) * LANES;
    }
  }

  // More tiles. The first eight ask the memory for an eighth each of the weights of the next block.
  template <int HALVES>
  void multiply_all(const pag_block& block, const TapRange& taps, const TileGroup& group,
                    float* kept) {
    constexpr int ASKING = 8;
    DigitSums sums;
    const int8_t *weights = weights_of(block, taps), *next = weights + HALVES * block.half;
    for (int t = 0; t < group.count; t++, kept += TILE_ROWS * BLOCK) {
      const int8_t* input = scratch.digits + t * tile_bytes;
      if (t < ASKING)
        multiply_many<HALVES, true>(input, weights, block.half, taps.steps, next, sums);
      else
        multiply_many<HALVES, false>(input, weights, block.half, taps.steps, next, sums);
      next += taps.steps * HALVES * (STEP_BYTES / ASKING);
      PAG_FENCE;
      finish_tile<HALVES>(group.epilogue[t], sums, 0, taps, group.of_input[t], group.pixels(t),
                          block, kept);
    }
  }

  // Tiles whose input stays cached while the weights of some taps pass by.
  void run_group(int32_t block_begin, int32_t block_end, int64_t tile_begin, int64_t tile_end) {
    TileGroup group;
    group.count = (int)(tile_end - tile_begin);
    for (int t = 0; t <= group.count; t++) group.begin[t] = tile_start(plan, tile_begin + t);
    for (int t = 0; t < group.count; t++) {
      start_epilogue(*plan.call, group.pixels(t), group.epilogue[t]);
      aim_epilogue<SMALL>(plan, group.begin[t], group.pixels(t), group.epilogue[t]);
    }
    for (int part = 0; part < plan.parts; part++) {
      const TapRange taps = range(part);
      for (int t = 0; t < group.count; t++)
        write_tile(group.begin[t], group.begin[t + 1], taps, scratch.digits + t * tile_bytes,
                   group.of_input[t]);
      PAG_FENCE;
      float* kept = scratch.kept;
      for (int32_t index = block_begin; index < block_end; index++) {
        const pag_block block = block_at(plan, index);
        if (group.count <= 2)
          multiply_few(block, taps, group, kept);
        else if (block.width < BLOCK)
          multiply_all<1>(block, taps, group, kept);
        else
          multiply_all<2>(block, taps, group, kept);
        kept += plan.group * TILE_ROWS * BLOCK;
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
