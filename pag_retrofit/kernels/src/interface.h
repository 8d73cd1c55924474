// The plain C interface of the native kernels; native.py mirrors these structures.
//
// Every map is NHWC float32 and dense-addressed: pixel i of a batch (images, then rows, then columns)
// starts at data + i * stride. A stride larger than the channels addresses a channel slice of a
// wider map. Lists hold flat pixel indices of the output, each at most once.
#pragma once

#include <stdint.h>

#define PAG_EXPORT extern "C" __attribute__((visibility("default")))

enum { PAG_MAX_SOURCES = 6 };

enum pag_status { PAG_OK = 0, PAG_BAD_INDEX = 1, PAG_BAD_COUNT = 2, PAG_NO_MEMORY = 3 };

// How weights are held: packing.py.
enum pag_weights { PAG_FLOATS, PAG_WHOLE_NUMBERS, PAG_IN_DIGITS };

enum pag_activation {
  PAG_NONE, PAG_RELU, PAG_RELU6, PAG_SILU, PAG_GELU, PAG_GELU_TANH,
  PAG_HARDSWISH, PAG_HARDSIGMOID, PAG_SIGMOID, PAG_LEAKY_RELU,
};

// One of the maps whose channels, one after the other, are the input. A map that is upsampled is
// read at (y >> shift, x >> shift): nearest-neighbour upsampling by 2^shift without a copy.
struct pag_source {
  const float* data;
  int64_t stride;
  int32_t channels, height, width, shift;
};

struct pag_list {
  const int32_t* pixels;  // null: every pixel (or, with no capacity, none)
  const int32_t* count;   // how many are valid; null: all
  int64_t capacity;       // how many there are; without a list, all pixels of the output
};

// y = after(act(scale * (conv(input_scale * x) + bias) + before)), at listed pixels.
struct pag_convolution {
  int32_t batch, height, width;  // input, after upsampling
  int32_t out_height, out_width, channels, out_channels, groups;
  int32_t kernel[2], stride[2], dilation[2], padding[2];  // (vertical, horizontal); top and left
  int32_t activation, residual_after_activation;
  float slope;  // of PAG_LEAKY_RELU
  int32_t source_count;
  int32_t winograd;         // transformed weights, 3x3 or strided 7x7: see winograd.h and strided.h
  int32_t activate_if_all;  // leave the activation to others unless all pixels are listed
  int32_t compressed;       // of pag_weights; one group only, unless they are floats
  pag_source sources[PAG_MAX_SOURCES];
  pag_list list;
  const void* weights;       // packed floats, or compressed: see packing.py
  const float* steps;        // (out_channels): what compressed weights are multiples of
  const float* bias;         // (out_channels) or null
  const float* scale;        // (batch, out_channels) or null
  const float* input_scale;  // (batch, channels) or null
  const float* residual;     // dense-addressed like the output, or null; may be the output itself
  int64_t residual_stride, residual_shift;  // it is read upsampled, as a source with that shift is
  float* out;
  int64_t out_stride;
};

// Rows of `channels` floats at listed pixels of a dense-addressed map of batch * pixels rows.
struct pag_rows {
  int32_t batch, pixels, channels;
  pag_list list;
  const float* in;
  int64_t in_stride;
  float* out;  // layer norm: dense-addressed rows; mean: (batch, channels), contiguous
  int64_t out_stride;
  const float* weight;  // layer norm: (channels) or null
  const float* bias;    // layer norm: (channels) or null
  float epsilon;
};

// A pixel's score is weight . (scale * in[offset + stride * pixel]) + bias. Open are those with a
// score of at least 0, or the `keep` pixels of each image with the largest, of equal ones the first.
// The input, if it is one map, is activated as it is read, but not that which was computed, and so
// activated, at all of its pixels.
struct pag_gate {
  int32_t batch, out_height, out_width, channels, stride[2], offset[2];
  int32_t source_count, activation;
  pag_source sources[PAG_MAX_SOURCES];
  const float* scale;   // (batch, channels) or null
  const float* weight;  // (channels)
  const float* bias;    // one number
  const int64_t* keep;  // null, or negative: all of at least 0
  uint8_t* mask;        // (batch, out_height, out_width)
  float* scores;        // (batch, out_height, out_width), written in place of the mask, or null
  const int32_t* computed;  // pixels of the first source, or null
  float slope;              // of PAG_LEAKY_RELU
};

// A dense-addressed map, of which listed pixels are changed.
struct pag_map {
  int32_t batch, height, width, channels;
  pag_list list;
  float* x;
  int64_t stride;
  const int32_t* computed;  // PAG_ACTIVATE: if these are all pixels, they are activated; or null
  int32_t activation;
  float slope;  // of PAG_LEAKY_RELU
};

enum pag_operation { PAG_AND, PAG_OR, PAG_NOT };

// Indices where (mask != 0), or a combination of that with another mask, is as wanted, ascending, and
// how many; the list holds nothing of use behind.
struct pag_listing {
  const uint8_t* mask;
  const uint8_t* other;  // or null
  int64_t pixels, wanted;
  int64_t operation;  // PAG_AND or PAG_OR
  int32_t* list;  // (pixels)
  int32_t* found;
};

// Pixels (batch, height, width) of a map, upsampled by 2^shift, that a window operation reads for the
// output pixels of a mask.
struct pag_reading {
  int32_t batch, out_height, out_width, height, width, shift;
  int32_t kernel[2], stride[2], dilation[2], padding[2];
  const uint8_t* mask;  // (batch, out_height, out_width)
  uint8_t* needed;
};

// Of two masks, or of the first alone; entries are 0 or 1.
struct pag_combination {
  const uint8_t* first;
  const uint8_t* second;
  uint8_t* result;
  int64_t pixels, operation;
};

// Maximum over windows; what is outside of the map does not count.
struct pag_pool {
  int32_t batch, height, width, out_height, out_width, channels;
  int32_t kernel[2], stride[2], dilation[2], padding[2];
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
};

// A whole map of another size: output rows are weighted sums of `taps[0]` input rows from `first[0]`
// on, and output columns likewise.
struct pag_resizing {
  int32_t batch, height, width, out_height, out_width, channels;
  int32_t taps[2];          // (vertical, horizontal), here and below
  const int32_t* first[2];  // of each output row or column
  const float* weights[2];  // (rows or columns, taps)
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
};

// Group norm of a whole map, and an activation of the result.
struct pag_grouping {
  int32_t batch, pixels, channels, groups;
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
  const float* weight;  // (channels) or null
  const float* bias;    // (channels) or null
  float epsilon;
  int32_t activation;
  float slope;  // of PAG_LEAKY_RELU
};

enum { PAG_MOST_STAGES = 4, PAG_MOST_TOGETHER = 4 };

// The calls that follow, by stages: convolutions that write one map, which nothing but those of the next
// stage reads. The last one may be a max pool. What is between need not be written: see run_in_bands.
struct pag_bands {
  int64_t stages;
  int64_t calls[PAG_MOST_STAGES];  // of each: PAG_MOST_TOGETHER at most
};

struct pag_copy {
  void* to;
  const void* from;  // null: zeros
  int64_t rows, bytes;          // of each row
  int64_t to_step, from_step;   // bytes from one row to the next
};

// What a call computes, and the structure it takes.
enum pag_kind {
  PAG_CONVOLVE = 1,   // pag_convolution
  PAG_LAYER_NORM,     // pag_rows
  PAG_MEAN,           // pag_rows
  PAG_INTERPOLATE,    // pag_map: listed pixels but those at even rows and columns become the means
                      // of the two or four next to them that are, activated
  PAG_DECIDE,         // pag_gate
  PAG_LIST,           // pag_listing
  PAG_READ,           // pag_reading
  PAG_COMBINE,        // pag_combination
  PAG_COPY,           // pag_copy
  PAG_POOL,           // pag_pool
  PAG_ACTIVATE,       // pag_map: listed pixels are activated
  PAG_RESIZE,         // pag_resizing
  PAG_GROUP_NORM,     // pag_grouping
  PAG_IN_BANDS,       // pag_bands
};

struct pag_call {
  int64_t kind;
  const void* arguments;
};

// Bytes of the structure that a kind of call takes, 0 for an unknown kind: a caller that was written
// for another version of this file can tell.
PAG_EXPORT int64_t pag_argument_bytes(int kind);
// Instruction sets, in rising order: "portable", "avx2", "avx512", "amx".
PAG_EXPORT const char* pag_instruction_set(void);
// Whether the instruction set in use reads compressed weights as fast as floats.
PAG_EXPORT int pag_expands(void);
// Whether it multiplies weights in digits.
PAG_EXPORT int pag_multiplies_digits(void);
// Use the named set; returns 0 (and changes nothing) where it is unknown or the processor lacks it.
PAG_EXPORT int pag_use_instruction_set(const char* name);
// Run loops on an OpenMP runtime that is already loaded: the address of its GOMP_parallel.
PAG_EXPORT void pag_use_openmp(void* gomp_parallel);

// Calls one after the other, up to the first that fails; its status.
PAG_EXPORT int pag_run(const pag_call* calls, int64_t count, int threads);
// Ask for large pages behind memory that was not touched yet: reading it takes fewer address
// translations, which cost more than the memory itself on a virtual machine.
PAG_EXPORT void pag_use_large_pages(void* memory, int64_t bytes);
