// 7x7 convolution with stride 2 of at most four channels, the first layer of many networks, in tiles
// of 2x2 output pixels: 81 multiplications for each of them and each channel in place of 196.
//
// Along an axis even taps read even pixels, and odd taps odd ones: two convolutions with stride 1, of
// four and of three taps, F(2, 4) and F(2, 3) of Lavin & Gray, CVPR 2016 (arXiv 1509.09308). Both are
// products of polynomials, taken at 0, 1, -1 and infinity, and the first one at 2 as well. What is taken
// at the same point is added before it is transformed back.
//
// A patch of 9x9 pixels becomes 9x9 parts: along each axis five of the even pixels, then four of the
// odd ones. Tiles are transformed 16 at a time, which lie side by side in vectors. A pixel is made of seven
// of nine parts along an axis, so single ones take 49 multiplications, as many as a direct convolution.
#pragma once

#include "winograd.h"

namespace {

constexpr int SPAN = PAG_SPAN, POINTS = 5, SHARED = SPAN - POINTS;  // of both kinds of taps
constexpr int INFINITE = 3, TWO = 4;  // places of those points; before them 0, 1 and -1
constexpr int TOGETHER = PAG_TOGETHER;
// Tiles that are multiplied together, by one vector of output channels, whose weights stay in the first
// cache: the sums of all points take five registers each.
#if defined(__AVX512F__)
constexpr int TILES_AT_ONCE = 6;
#else
constexpr int TILES_AT_ONCE = 2;
#endif
static_assert(TOGETHER % LANES == 0, "they are whole vectors");

// Parts along an axis, a bit each, that the first pixel of a tile is made of, the second one, and both.
constexpr uint32_t FIRST = 0x0f7, SECOND = 0x1de, BOTH = FIRST | SECOND;

PAG_INLINE uint32_t parts_down(uint32_t open) {
  return (open & 3 ? FIRST : 0) | (open & 12 ? SECOND : 0);
}

PAG_INLINE uint32_t parts_across(uint32_t open) {
  return (open & 5 ? FIRST : 0) | (open & 10 ? SECOND : 0);
}

PAG_INLINE bool are_alike(uint32_t open, uint32_t other) {
  return parts_down(open) == parts_down(other) && parts_across(open) == parts_across(other);
}

// Rows of a patch that listed pixels read; of a map that is computed a few rows at a time there may be no
// others.
struct Lines {
  int begin, end;
};

PAG_INLINE Lines lines_of(uint32_t open) { return {open & 3 ? 0 : 2, open & 12 ? SPAN : SPAN - 2}; }

// A patch that is not read as it lies, zeros where there is nothing.
PAG_OUTLINE void copy_patch(const pag_convolution& call, const Patch& p, int top, int left,
                            float* to) {
  const Lines lines = lines_of(p.open);
  const float* scale = call.input_scale;
  if (scale) scale += (int64_t)p.image * call.channels;
  memset(to, 0, sizeof(float) * SPAN * SPAN * call.channels);
  to += lines.begin * SPAN * call.channels;
  for (int i = lines.begin; i < lines.end; i++)
    for (int j = 0; j < SPAN; j++, to += call.channels) {
      if ((uint32_t)(top + i) >= (uint32_t)call.height || (uint32_t)(left + j) >= (uint32_t)call.width)
        continue;
      for (int s = 0, channel = 0; s < call.source_count; s++) {
        const float* from = row_of(call.sources[s], p.image, top + i, left + j);
        for (int k = 0; k < call.sources[s].channels; k++, channel++)
          to[channel] = scale ? from[k] * scale[channel] : from[k];
      }
    }
}

// Where the rows of a patch lie, or others for those that no listed pixel reads. What lies there may never
// have been written, and does no harm: a pixel is made of parts that are made of what it reads.
PAG_INLINE void find_strided_patch(const pag_convolution& call, const Patch& p, float* copy,
                                   const float** rows) {
  const pag_source& source = call.sources[0];
  const int top = 2 * p.y - call.padding[0], left = 2 * p.x - call.padding[1];
  const Lines lines = lines_of(p.open);
  const bool inside = top + lines.begin >= 0 && top + lines.end <= call.height && left >= 0 &&
                      left + SPAN <= call.width;
  const bool whole = inside && call.source_count == 1 && !source.shift &&
                     source.stride == call.channels && !call.input_scale;
  if (!whole) copy_patch(call, p, top, left, copy);
  for (int i = 0; i < SPAN; i++) {
    const int line = i < lines.begin ? lines.begin : i < lines.end ? i : lines.end - 1;
    rows[i] = whole ? row_of(source, p.image, top + line, left) : copy + i * SPAN * call.channels;
  }
}

// Nine pixels of a line as nine parts.
PAG_INLINE void transform_line(const Vector (&x)[SPAN], Vector (&to)[SPAN]) {
  const Vector across = x[6] - x[2];
  to[0] = (x[0] - x[4]) * 2.f + across;
  to[1] = across - (x[2] + x[4]);
  to[2] = (x[2] - x[4]) * 3.f + across;
  to[INFINITE] = x[8] - x[4] - across * 2.f;
  to[TWO] = across;
  to[POINTS] = x[1] - x[5];
  to[POINTS + 1] = x[3] + x[5];
  to[POINTS + 2] = x[5] - x[3];
  to[POINTS + INFINITE] = x[7] - x[3];
}

// Rows of patches as (rows, pixels, channels, TOGETHER).
PAG_INLINE void turn_patches(const float* const (&rows)[TOGETHER][SPAN], int channels, float* to) {
  const int length = SPAN * channels;
  for (int row = 0; row < SPAN; row++, to += length * TOGETHER)
    for (int first = 0; first < TOGETHER; first += LANES)
      for (int k = 0; k < length; k += LANES) {
        const int count = length - k < LANES ? length - k : LANES;
        Vector v[LANES];
        PAG_UNROLL
        for (int i = 0; i < LANES; i++) v[i] = load_up_to(rows[first + i][row] + k, count);
        transpose(v);
        for (int i = 0; i < count; i++) store(to + (k + i) * TOGETHER + first, v[i]);
      }
}

// From (rows, pixels, channels, TOGETHER) to (parts across, channels, parts down, TOGETHER).
PAG_OUTLINE void transform_turned(const float* turned, int channels, float* parts) {
  for (int c = 0; c < channels; c++)
    for (int first = 0; first < TOGETHER; first += LANES) {
      Vector down[SPAN][SPAN];
      for (int j = 0; j < SPAN; j++) {
        Vector x[SPAN];
        PAG_UNROLL
        for (int i = 0; i < SPAN; i++)
          x[i] = load(turned + ((i * SPAN + j) * channels + c) * TOGETHER + first);
        transform_line(x, down[j]);
      }
      for (int i = 0; i < SPAN; i++) {
        Vector x[SPAN], across[SPAN];
        PAG_UNROLL
        for (int j = 0; j < SPAN; j++) x[j] = down[j][i];
        transform_line(x, across);
        PAG_UNROLL
        for (int j = 0; j < SPAN; j++)
          store(parts + ((j * channels + c) * SPAN + i) * TOGETHER + first, across[j]);
      }
    }
}

// Adds what some parts down of one part across contribute to the sums of all points.
template <int TILES, uint32_t DOWN>
PAG_INLINE void add_products(const float* parts, const float* weights, int channels,
                             Vector (&sums)[POINTS][TILES]) {
  for (int c = 0; c < channels; c++)
    PAG_UNROLL
    for (int i = 0; i < SPAN; i++, parts += TOGETHER, weights += HALF) {
      if (!(DOWN >> i & 1)) continue;
      Vector w = load(weights);
      PAG_ONE_REGISTER(w);
      PAG_UNROLL
      for (int t = 0; t < TILES; t++) sums[i < POINTS ? i : i - POINTS][t] += broadcast(parts[t]) * w;
    }
}

// Five points of a line as two pixels.
PAG_INLINE void transform_back(const Vector (&at)[POINTS], Vector& first, Vector& second) {
  first = at[0] + (at[1] + at[2]) + at[TWO];
  second = at[1] - at[2] + at[INFINITE] + at[TWO] * 2.f;
}

// Some tiles of a vector of output channels, transformed back down: (points across, 2, TILES, LANES).
template <int TILES, uint32_t DOWN>
PAG_OUTLINE void multiply_parts(const float* parts, const float* weights, int channels, uint32_t needed,
                                float* to) {
  const int step = channels * SPAN;  // parts of one part across
  for (int point = 0; point < POINTS; point++, to += 2 * TILES * LANES) {
    Vector sums[POINTS][TILES] = {};
    for (int across = point; across < SPAN; across += POINTS)
      if (needed >> across & 1)
        add_products<TILES, DOWN>(parts + across * step * TOGETHER, weights + across * step * HALF,
                                  channels, sums);
    PAG_UNROLL
    for (int t = 0; t < TILES; t++) {
      const Vector down[POINTS] = {sums[0][t], sums[1][t], sums[2][t], sums[3][t], sums[4][t]};
      Vector first, second;
      transform_back(down, first, second);
      store(to + t * LANES, first);
      store(to + (TILES + t) * LANES, second);
    }
  }
}

template <int TILES>
PAG_INLINE void multiply_some_parts(int tiles, const float* parts, const float* weights, int channels,
                                    uint32_t down, uint32_t across, float* to) {
  if constexpr (TILES > 0) {
    if (tiles != TILES)
      multiply_some_parts<TILES - 1>(tiles, parts, weights, channels, down, across, to);
    else if (down == BOTH)
      multiply_parts<TILES, BOTH>(parts, weights, channels, across, to);
    else if (down == FIRST)
      multiply_parts<TILES, FIRST>(parts, weights, channels, across, to);
    else
      multiply_parts<TILES, SECOND>(parts, weights, channels, across, to);
  }
}

// Tiles that are transformed back down as pixels.
PAG_OUTLINE void finish_strided(const pag_plan& plan, const pag_tile_scratch& scratch,
                                const float* lines, int column, int columns, const Patch* found,
                                int tiles) {
  const pag_convolution& call = *plan.call;
  Epilogue e;
  start_epilogue(call, CORNERS, e);
  const Vector bias = call.bias ? load_up_to(call.bias + column, columns) : Vector{};
  for (int t = 0; t < tiles; t++) {
    aim_at_corners(call, scratch, found[t], e);
    Vector sums[CORNERS][1];
    PAG_UNROLL
    for (int row = 0; row < 2; row++) {
      Vector line[POINTS];
      PAG_UNROLL
      for (int point = 0; point < POINTS; point++)
        line[point] = load(lines + ((2 * point + row) * tiles + t) * LANES);
      transform_back(line, sums[2 * row][0], sums[2 * row + 1][0]);
    }
    PAG_UNROLL
    for (int corner = 0; corner < CORNERS; corner++) sums[corner][0] += bias;
    finish_tile<CORNERS, 1>(e, sums, column, columns < LANES ? columns : LANES);
  }
}

// Blocks [block_begin, block_end) of output channels of tiles that are made of the same parts.
PAG_INLINE void compute_alike(const pag_plan& plan, const pag_tile_scratch& scratch,
                              int32_t block_begin, int32_t block_end, const Patch* found, int count) {
  const pag_convolution& call = *plan.call;
  const int64_t patch = (int64_t)SPAN * SPAN * call.channels;  // floats
  float *turned = scratch.patches, *parts = turned + patch * TOGETHER;
  float* copies = parts + patch * TOGETHER;
  const float* rows[TOGETHER][SPAN];
  for (int t = 0; t < count; t++) find_strided_patch(call, found[t], copies + t * patch, rows[t]);
  for (int t = count; t < TOGETHER; t++) memcpy(rows[t], rows[0], sizeof rows[0]);
  turn_patches(rows, call.channels, turned);
  transform_turned(turned, call.channels, parts);

  alignas(64) float lines[POINTS * 2 * TILES_AT_ONCE * LANES];
  const uint32_t down = parts_down(found[0].open), across = parts_across(found[0].open);
  const int times = (count + TILES_AT_ONCE - 1) / TILES_AT_ONCE;
  for (int32_t index = block_begin; index < block_end; index++) {
    const pag_block block = block_at(plan, index);
    for (int at = 0; at < block.columns; at += LANES) {
      const float* weights = block.weights + at / HALF * HALF * patch + at % HALF;
      for (int time = 0; time < times; time++) {
        const int first = count * time / times, tiles = count * (time + 1) / times - first;
        multiply_some_parts<TILES_AT_ONCE>(tiles, parts + first, weights, call.channels, down, across,
                                           lines);
        finish_strided(plan, scratch, lines, block.column + at, block.columns - at, found + first,
                       tiles);
      }
    }
  }
}

// Of tiles [begin, end).
void strided(const pag_plan* plan, const pag_tiling* tiling, pag_tile_scratch* scratch,
             int32_t block_begin, int32_t block_end, int64_t begin, int64_t end) {
  while (begin < end) {
    Patch found[TOGETHER];
    int count = 0;
    for (; count < TOGETHER && begin < end; count++, begin++) {
      found[count] = patch_at(*tiling, begin);
      if (!are_alike(found[count].open, found[0].open)) break;
    }
    compute_alike(*plan, *scratch, block_begin, block_end, found, count);
  }
}

}  // namespace
