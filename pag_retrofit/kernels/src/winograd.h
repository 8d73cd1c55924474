// 3x3 convolution in tiles of 2x2 output pixels with 16 multiplications for each in place of 36:
// F(2x2, 3x3) of Lavin & Gray, CVPR 2016 (arXiv 1509.09308). The pixels of a tile, and of the patch
// that it reads, lie as far apart as the taps: one next to the other if nothing is dilated.
//
// A tile reads a patch of 4x4 input pixels. Patches are transformed into 16 parts, these are
// multiplied by transformed weights (packing.py), sixteen independent matrix products over a group
// of tiles, and the products are transformed back. Of a tile, only listed pixels are written, and
// only those parts are multiplied that they are made of: 9 for a single one, as many as a direct
// convolution takes. What none of them reads may never have been written, and counts as zero.
//
// In a patch of a map that is read upsampled, the second row repeats as the third, and so do the
// columns: 7 of the 16 parts are zero and nothing is done about them.
#pragma once

#include "convolution.h"

namespace {

constexpr int SIDE = 4, PARTS = PAG_PARTS, CORNERS = 4, REPEATED = 2;

struct Patch {
  int32_t image, y, x;  // of the first output pixel
  uint32_t open;        // which of the four are listed, a bit each
};

PAG_INLINE Patch patch_at(const pag_tiling& tiling, int64_t position) {
  const int32_t index = tiling.tiles[position];
  const int32_t line = quotient(index, tiling.per_columns);
  const int32_t image = quotient(line, tiling.per_rows);
  return {image, tiling.first_rows[line - image * tiling.rows],
          tiling.first_columns[index - line * tiling.columns], tiling.open[index]};
}

// Pixels of a patch that listed output pixels read, a bit each; and parts that they are made of.
PAG_INLINE uint32_t needed_for(uint32_t open) {
  constexpr uint32_t WINDOW = 0x777;  // three pixels of each of three rows of four
  return (open & 1 ? WINDOW : 0) | (open & 2 ? WINDOW << 1 : 0) | (open & 4 ? WINDOW << 4 : 0) |
         (open & 8 ? WINDOW << 5 : 0);
}

PAG_INLINE void find_patch(const pag_convolution& call, const pag_source& source, const Patch& p,
                           const float* zeros, const float** rows) {
  const uint32_t read = needed_for(p.open);
  for (int i = 0; i < SIDE; i++) {
    const int y = p.y + i * call.dilation[0] - call.padding[0];
    const bool row_inside = (uint32_t)y < (uint32_t)call.height;
    const float* line = row_inside ? row_of(source, p.image, y, 0) : zeros;
    for (int j = 0; j < SIDE; j++) {
      const int x = p.x + j * call.dilation[1] - call.padding[1];
      const bool inside =
          row_inside && (uint32_t)x < (uint32_t)call.width && (read >> (i * SIDE + j) & 1);
      rows[i * SIDE + j] = inside ? line + (x >> source.shift) * source.stride : zeros;
    }
  }
}

struct Four {
  Vector at[SIDE];
};

template <bool REPEATS>
PAG_INLINE Four difference(Vector a, Vector b, Vector c, Vector d) {
  if (REPEATS) return {{a - b, b + b, Vector{}, b - d}};
  return {{a - c, b + c, c - b, b - d}};
}

// One source's part of a patch; `part` floats lie between the parts of one channel.
template <bool REPEATS>
PAG_OUTLINE void transform_patch(const float* const* rows, int channels, const float* scale,
                                 float* to, int64_t part) {
  for (int k = 0; k < channels; k += LANES) {
    const int count = channels - k;
    Four columns[SIDE];
    PAG_UNROLL
    for (int j = 0; j < SIDE; j++) {
      if (REPEATS && j == REPEATED) continue;
      Vector d[SIDE];
      PAG_UNROLL
      for (int i = 0; i < SIDE; i++)
        if (!REPEATS || i != REPEATED) d[i] = load_up_to(rows[i * SIDE + j] + k, count);
      if (REPEATS) d[REPEATED] = d[1];
      columns[j] = difference<REPEATS>(d[0], d[1], d[2], d[3]);
    }
    if (REPEATS) columns[REPEATED] = columns[1];
    const Vector factor = scale ? load_up_to(scale + k, count) : broadcast(1.f);
    PAG_UNROLL
    for (int i = 0; i < SIDE; i++) {
      if (REPEATS && i == REPEATED) continue;
      const Four row = difference<REPEATS>(columns[0].at[i], columns[1].at[i], columns[2].at[i],
                                           columns[3].at[i]);
      PAG_UNROLL
      for (int j = 0; j < SIDE; j++)
        if (!REPEATS || j != REPEATED)
          store(to + (i * SIDE + j) * part + k, scale ? row.at[j] * factor : row.at[j]);
    }
  }
}

PAG_INLINE void transform_patches(const pag_plan& plan, const pag_tiling& tiling,
                                  pag_tile_scratch& scratch, int64_t begin, int count) {
  const pag_convolution& call = *plan.call;
  const float* rows[PARTS];
  memset(scratch.needing, 0, sizeof(int32_t) * PARTS);
  for (int t = 0; t < count; t++) {
    const Patch p = patch_at(tiling, begin + t);
    const uint32_t needed = needed_for(p.open);
    for (int part = 0; part < PARTS; part++) {
      scratch.tiles[part * tiling.group + scratch.needing[part]] = t;
      scratch.needing[part] += needed >> part & 1;
    }
    float* to = scratch.patches + t * tiling.patch;
    const float* scale = call.input_scale;
    if (scale) scale += (int64_t)p.image * call.channels;
    for (int s = 0; s < call.source_count; s++) {
      const pag_source& source = call.sources[s];
      find_patch(call, source, p, scratch.zeros, rows);
      if (s < tiling.repeating)
        transform_patch<true>(rows, source.channels, scale, to, tiling.patch_part);
      else
        transform_patch<false>(rows, source.channels, scale, to, tiling.patch_part);
      to += source.channels;
      if (scale) scale += source.channels;
    }
  }
}

// The products of a group's parts with a block of weights.
PAG_INLINE void multiply_patches(const pag_plan& plan, const pag_tiling& tiling,
                                 const pag_tile_scratch& scratch, const pag_block& whole) {
  const pag_convolution& call = *plan.call;
  const float* rows[MAX_TILE];
  Epilogue e = {};
  e.plain = true;
  for (int part = 0; part < PARTS; part++) {
    const bool repeated = part / SIDE == REPEATED || part % SIDE == REPEATED;
    const int32_t left_out = repeated ? tiling.repeating_channels : 0;
    const int32_t length = call.channels - left_out;
    if (!length) continue;
    pag_block block = whole;
    block.column = 0;
    block.columns = block.width;
    const int64_t first = (int64_t)part * call.channels + left_out;  // row of the weights
    if (!block.compressed) {
      block.weights += first * block.width;
    } else {
      block.compressed += first * HALF_BYTES;
      block.weights = scratch.expanded;
      if (!plan.expanding) {
        expand_block(block, length, scratch.expanded);
        block.compressed = nullptr;
      }
    }
    const Input input = {rows, 1, 1, &length, left_out};
    const float* patches = scratch.patches + part * tiling.patch_part;
    float* products = scratch.products + part * tiling.product_part;
    const int32_t* needing = scratch.tiles + part * tiling.group;
    const int count = scratch.needing[part], times = (count + TILE - 1) / TILE;
    for (int time = 0; time < times; time++) {
      const int from = count * time / times, to = count * (time + 1) / times;
      for (int i = from; i < to; i++) {
        rows[i - from] = patches + needing[i] * tiling.patch;
        e.out[i - from] = products + needing[i] * PAG_PRODUCT;
      }
      if (!block.compressed) {
        multiply_block(to - from, input, block, e);
      } else {
        expand_and_multiply_block(to - from, input, block, times > 1 ? scratch.expanded : nullptr, e);
        block.compressed = nullptr;
      }
    }
  }
}

PAG_INLINE void aim_at_corners(const pag_convolution& call, const pag_tile_scratch& scratch,
                               const Patch& p, Epilogue& e) {
  for (int corner = 0; corner < CORNERS; corner++) {
    const bool listed = p.open >> corner & 1;
    const int32_t y = p.y + corner / 2 * call.dilation[0], x = p.x + corner % 2 * call.dilation[1];
    const int64_t index = ((int64_t)p.image * call.out_height + y) * call.out_width + x;
    e.out[corner] = listed ? call.out + index * call.out_stride : scratch.nowhere;
    if (call.residual)
      e.residual[corner] = listed ? residual_line(call, p.image, y) +
                                        (x >> call.residual_shift) * call.residual_stride
                                  : scratch.zeros;
    if (call.scale) e.scale[corner] = call.scale + (int64_t)p.image * call.out_channels;
  }
}

// Products back to pixels: bias, residual and activation as in any convolution.
PAG_OUTLINE void finish_patches(const pag_plan& plan, const pag_tiling& tiling,
                                const pag_tile_scratch& scratch, const pag_block& block,
                                int64_t begin, int count) {
  const pag_convolution& call = *plan.call;
  Epilogue e;
  start_epilogue(call, CORNERS, e);
  for (int t = 0; t < count; t++) {
    aim_at_corners(call, scratch, patch_at(tiling, begin + t), e);
    for (int j = 0; j < block.columns; j += LANES) {
      const int columns = block.columns - j;
      const float* products = scratch.products + t * PAG_PRODUCT + j;
      Vector upper[SIDE], lower[SIDE], sums[CORNERS][1];
      PAG_UNROLL
      for (int i = 0; i < SIDE; i++) {
        const float* column = products + i * tiling.product_part;
        const Vector a = load(column), b = load(column + SIDE * tiling.product_part),
                     c = load(column + 2 * SIDE * tiling.product_part),
                     d = load(column + 3 * SIDE * tiling.product_part);
        upper[i] = a + b + c;
        lower[i] = b - c - d;
      }
      Vector bias = {};
      if (call.bias && !call.compressed) bias = load_up_to(call.bias + block.column + j, columns);
      sums[0][0] = upper[0] + upper[1] + upper[2] + bias;
      sums[1][0] = upper[1] - upper[2] - upper[3] + bias;
      sums[2][0] = lower[0] + lower[1] + lower[2] + bias;
      sums[3][0] = lower[1] - lower[2] - lower[3] + bias;
      finish_tile<CORNERS, 1>(e, sums, block.column + j, columns < LANES ? columns : LANES);
    }
  }
}

// Blocks [block_begin, block_end) of output channels of tiles [begin, end).
void winograd(const pag_plan* shared, const pag_tiling* tiling, pag_tile_scratch* scratch,
              int32_t block_begin, int32_t block_end, int64_t begin, int64_t end) {
  const pag_plan& plan = *shared;
  const int64_t groups = (end - begin + tiling->group - 1) / tiling->group;
  for (int64_t group = 0; group < groups; group++) {
    const int64_t from = begin + (end - begin) * group / groups;
    const int count = (int)(begin + (end - begin) * (group + 1) / groups - from);
    transform_patches(plan, *tiling, *scratch, from, count);
    for (int32_t index = block_begin; index < block_end; index++) {
      const pag_block block = block_at(plan, index);
      multiply_patches(plan, *tiling, *scratch, block);
      finish_patches(plan, *tiling, *scratch, block, from, count);
    }
  }
}

}  // namespace
