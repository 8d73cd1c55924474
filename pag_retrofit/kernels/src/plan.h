// What is the same for all tiles of one convolution; made once per call, read by every thread.
#pragma once

#include "interface.h"

// A range of output channels that one pass over the weights computes.
struct pag_block {
  int32_t channel, channels;        // of the input, of each tap
  int32_t column, columns, width;   // of the output; the width in the packed weights
  const float* weights;             // (taps * channels, width)
  const uint8_t* compressed;        // null, or the same, while they are not yet expanded: bytes
  int64_t half;                     // bytes from one half of its columns to the other
  float* expanded;                  // memory for that
};

struct pag_plan {
  const pag_convolution* call;
  int32_t taps, segments;  // a segment is one tap of one source
  int32_t bundle_channels, bundle_columns, bundles;  // groups are computed in bundles, see packing.py
  int32_t blocks_per_bundle, blocks;
  int32_t tile;     // pixels
  int64_t pixels, tiles;
  double per_width, per_height;  // 1 / out_width, 1 / out_height
  int32_t slim;    // channels of a group, in and out, if they are 1 (depthwise), 2, 4 or 8; else 0
  bool pointwise;  // output pixel i reads input pixel i alone
  bool plain;      // no source is read upsampled
  bool joined;     // the taps of a row are contiguous: one segment, where all of them are inside
  bool gathered;   // a tile's input is copied together before it is multiplied, if not joined
  bool plain_dot;  // one tap of one source: more than few output channels may be computed so
  bool dot;        // few output channels: vectors lie along the input channels
  bool thin;       // one tap of few channels, at ascending pixels: see strips
  bool expanding;  // compressed weights are expanded as they are multiplied, not before
  bool by_digits;    // see digits.h
  bool whole_steps;  // the input of each tap is whole steps of digits
  int32_t parts;     // in which the taps are multiplied
  int32_t group;     // tiles whose digits are made together
  int64_t rows_bytes, offsets_bytes, blocks_bytes, zeros_bytes, panel_bytes;  // of pag_scratch
  int64_t columns_bytes, expanded_bytes, transposed_bytes, digits_bytes, kept_bytes;
};

// Memory of one thread.
struct pag_scratch {
  const float** rows;   // (tiles of a group, segments, pixels of a tile): where each segment starts
  int64_t* offsets;     // (segments): distance of a segment from a pixel's first tap
  pag_block* blocks;    // those that one call computes
  float* zeros;         // what padding reads
  float* panel;         // (tile, taps * channels): gathered input
  float* columns;       // (out_channels, taps * channels): weights for dot products
  float* expanded;      // (blocks, taps * channels, 32): weights that were compressed
  float* transposed;    // (taps * channels, tile): input of a tall tile
  int8_t* digits;       // (tiles of a group, taps * channels in steps): see PAG_DIGITS_DEPTH
  float* kept;          // (blocks, tiles of a group, 16, 32): sums of parts of the taps
};

// Tiles of a convolution in slim groups that go through the channels together.
enum { PAG_CHANNELS_GROUP = 8 };

enum { PAG_PARTS = 16, PAG_PRODUCT = 32 };  // of a tile; output channels of a block
enum { PAG_SPAN = 9, PAG_TOGETHER = 16 };   // strided.h: parts along an axis; tiles that go together
enum { PAG_NARROW = 16 };                   // output channels of a block that is narrower

// Weights as digits, and input, lie in steps of so many rows of the matrix: (step, digit, 16 rows, 64)
// bytes. A row of weights holds four numbers of each of 16 columns, one of input is a pixel's.
enum { PAG_DIGITS = 3, PAG_DIGITS_DEPTH = 64, PAG_DIGITS_BLOCK = 32 };
enum { PAG_DIGITS_GROUP = 32 };  // tiles at most

// How a convolution is cut into tiles of 2x2 pixels, see winograd.h and strided.h; for every thread.
struct pag_tiling {
  const int32_t* tiles;  // those with listed pixels
  const uint8_t* open;   // of all tiles: which pixels are listed
  int32_t rows, columns;         // of tiles
  const int32_t *first_rows, *first_columns;  // where the tiles of each begin
  double per_rows, per_columns;  // 1 / rows, 1 / columns
  int32_t group;                 // tiles that are transformed together
  int32_t repeating;             // leading sources whose patches repeat a row and a column
  int32_t repeating_channels;
  int64_t patch, patch_part;     // floats from a tile to the next, and from a part to the next
  int64_t product_part;
  int64_t patches_bytes, products_bytes, row_bytes, tiles_bytes, expanded_bytes;  // of pag_tile_scratch
};

// Memory of one thread.
struct pag_tile_scratch {
  float* patches;   // (parts, tiles of a group, channels)
  float* products;  // (parts, tiles of a group, output channels of a block), zero at first
  float* zeros;     // what padding and unlisted pixels read
  float* nowhere;   // what unlisted pixels write
  float* expanded;  // (channels, 32): weights of a part that were compressed
  int32_t* tiles;   // (parts, tiles of a group): those of the group that need a part,
  int32_t needing[PAG_PARTS];  // and how many they are
};

// The functions of one instruction set.
struct pag_kernels {
  const char* name;
  bool (*expands)();  // see pag_expands
  int32_t tile, tall_tile;
  int32_t (*slim_tile)(int32_t slim);
  void (*convolution)(const pag_plan*, const pag_scratch*, int32_t block_begin, int32_t block_end,
                      int64_t tile_begin, int64_t tile_end);
  // The same by digits, or null: the instruction set cannot.
  void (*digits)(const pag_plan*, const pag_scratch*, int32_t block_begin, int32_t block_end,
                 int64_t tile_begin, int64_t tile_end);
  void (*winograd)(const pag_plan*, const pag_tiling*, pag_tile_scratch*, int32_t block_begin,
                   int32_t block_end, int64_t begin, int64_t end);
  // The same of windows that are two pixels apart.
  void (*strided)(const pag_plan*, const pag_tiling*, pag_tile_scratch*, int32_t block_begin,
                  int32_t block_end, int64_t begin, int64_t end);
  void (*layer_norm)(const pag_rows*, int64_t begin, int64_t end);
  void (*mean)(const pag_rows*, int64_t count, const int64_t* counts, int32_t channel_begin,
               int32_t channel_end);
  void (*interpolate)(const pag_map*, int64_t begin, int64_t end);
  void (*decide)(const pag_gate*, int64_t begin, int64_t end);
  void (*list_pixels)(const pag_listing*);
  void (*pool)(const pag_pool*, int64_t begin, int64_t end);
  void (*activate)(const pag_map*, int64_t begin, int64_t end);
  void (*resize)(const pag_resizing*, int64_t begin, int64_t end);
  void (*moments)(const pag_grouping*, int32_t image, int32_t channel_begin, int32_t channel_end,
                  double* sums, double* squares);
  void (*rescale)(const pag_grouping*, int32_t image, const float* scales, const float* shifts,
                  int64_t begin, int64_t end);
};
