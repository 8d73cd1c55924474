// What happens to a pixel's sums before they are written: scale, residual, activation.
#pragma once

#include <math.h>

#include "vectors.h"

namespace {

constexpr int MAX_TILE = 28;      // pixels
constexpr int MAX_COLUMNS = 64;   // output channels

// The rows of one tile of pixels, and how its results are finished.
struct Epilogue {
  float* out[MAX_TILE];
  const float* residual[MAX_TILE];  // all null, or none
  const float* scale[MAX_TILE];     // all null, or none
  const float* bias;                // or null
  const float* steps;               // of compressed weights, or null
  int activation;
  int after;  // residual added after the activation
  float slope;
  bool plain;  // at most a residual before, and a ReLU: done on the accumulators
};

// Finish `pixels` rows of sums (bias included) of `width` floats, of which `columns` are real.
template <class Activation>
PAG_INLINE void finish_rows(const Epilogue& e, const float* sums, int pixels, int width, int column,
                            int columns, Activation activate) {
  for (int i = 0; i < pixels; i++, sums += width) {
    for (int j = 0; j < columns; j += LANES) {
      const int valid = columns - j, at = column + j;
      Vector y = load(sums + j);
      if (e.scale[i]) y *= load_up_to(e.scale[i] + at, valid);
      if (e.residual[i] && !e.after) y += load_up_to(e.residual[i] + at, valid);
      y = activate(y);
      if (e.residual[i] && e.after) y += load_up_to(e.residual[i] + at, valid);
      store_up_to(e.out[i] + at, y, valid);
    }
  }
}

PAG_OUTLINE void finish(const Epilogue& e, const float* sums, int pixels, int width, int column,
                        int columns) {
  with_activation(e.activation, e.slope, [&](auto activate) PAG_LAMBDA {
    finish_rows(e, sums, pixels, width, column, columns, activate);
  });
}

// Apply to each accumulator of a tile that has real columns: function(sum, row, column, count).
template <int PIXELS, int VECTORS, class Function>
PAG_INLINE void for_each_sum(Vector (&sums)[PIXELS][VECTORS], int columns, Function function) {
  if (columns == VECTORS * LANES) {
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++)
      PAG_UNROLL
      for (int j = 0; j < VECTORS; j++) function(sums[i][j], i, j * LANES, LANES);
  } else {
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++)
      PAG_UNROLL
      for (int j = 0; j < VECTORS; j++)
        if (j * LANES < columns) function(sums[i][j], i, j * LANES, columns - j * LANES);
  }
}

// Start a tile of accumulators at the bias; that of compressed weights is added at the end.
template <int PIXELS, int VECTORS>
PAG_INLINE void start_tile(const Epilogue& e, Vector (&sums)[PIXELS][VECTORS], int column,
                           int columns) {
  Vector start[VECTORS] = {};
  if (e.bias && !e.steps)
    PAG_UNROLL
    for (int j = 0; j < VECTORS; j++) {
      const int count = columns - j * LANES;
      start[j] = count > 0 ? load_up_to(e.bias + column + j * LANES, count) : Vector{};
    }
  PAG_UNROLL
  for (int i = 0; i < PIXELS; i++)
    PAG_UNROLL
    for (int j = 0; j < VECTORS; j++) sums[i][j] = start[j];
}

// Sums of multiples of the steps as what they stand for, and the bias.
template <int PIXELS, int VECTORS>
PAG_INLINE void take_steps(const Epilogue& e, Vector (&sums)[PIXELS][VECTORS], int column,
                           int columns) {
  PAG_UNROLL
  for (int j = 0; j < VECTORS; j++) {
    const int count = columns - j * LANES, at = column + j * LANES;
    if (count <= 0) continue;
    const Vector step = load_up_to(e.steps + at, count);
    const Vector bias = e.bias ? load_up_to(e.bias + at, count) : Vector{};
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++) sums[i][j] = sums[i][j] * step + bias;
  }
}

// Finish a tile of accumulators held in registers.
template <int PIXELS, int VECTORS>
PAG_INLINE void finish_tile(const Epilogue& e, Vector (&sums)[PIXELS][VECTORS], int column,
                            int columns) {
  if (e.steps) take_steps(e, sums, column, columns);
  if (!e.plain) {
    alignas(64) float buffer[PIXELS * VECTORS * LANES];
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++)
      PAG_UNROLL
      for (int j = 0; j < VECTORS; j++) store(buffer + (i * VECTORS + j) * LANES, sums[i][j]);
    finish(e, buffer, PIXELS, VECTORS * LANES, column, columns);
    return;
  }
  if (e.residual[0])
    for_each_sum(sums, columns, [&](Vector& sum, int i, int at, int count) PAG_LAMBDA {
      sum += load_up_to(e.residual[i] + column + at, count);
    });
  if (e.activation != PAG_NONE) {
    const float high = e.activation == PAG_RELU6 ? 6.f : INFINITY;
    PAG_UNROLL
    for (int i = 0; i < PIXELS; i++)
      PAG_UNROLL
      for (int j = 0; j < VECTORS; j++) sums[i][j] = at_most(at_least(sums[i][j], 0.f), high);
  }
  for_each_sum(sums, columns, [&](Vector& sum, int i, int at, int count) PAG_LAMBDA {
    store_up_to(e.out[i] + column + at, sum, count);
  });
}

}  // namespace
