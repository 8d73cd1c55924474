// Float vectors of the width that this translation unit is compiled for, and activations on them.
//
// Everything is in an unnamed namespace and no standard C++ header is included: this file is compiled
// once per instruction set, and a shared inline function could reach a processor that lacks one.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "interface.h"

#define PAG_INLINE inline __attribute__((always_inline))
#define PAG_OUTLINE __attribute__((noinline))  // a loop that needs all registers for itself
#define PAG_LAMBDA __attribute__((always_inline))
#define PAG_UNROLL _Pragma("GCC unroll 32")

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

PAG_INLINE Vector load(const float* p) { return *(const Unaligned*)p; }
PAG_INLINE void store(float* p, Vector v) { *(Unaligned*)p = v; }
// Keeps the compiler from loading a value anew for each of its uses.
#if defined(__AVX512F__)
#define PAG_ONE_REGISTER(X) asm("" : "+v"(X))
#else
#define PAG_ONE_REGISTER(X)
#endif

PAG_INLINE Vector broadcast(float x) { return x - Vector{}; }

// The first `count` < LANES floats, then zeros; nothing behind them is touched.
PAG_INLINE Vector load_first(const float* p, int count) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#else
  float lanes[LANES] = {};
  memcpy(lanes, p, sizeof(float) * count);
  return load(lanes);
#endif
}

PAG_INLINE void store_first(float* p, Vector v, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  memcpy(p, lanes, sizeof(float) * count);
#endif
}

PAG_INLINE Vector load_up_to(const float* p, int count) {
  return count >= LANES ? load(p) : load_first(p, count);
}

PAG_INLINE void store_up_to(float* p, Vector v, int count) {
  if (count >= LANES)
    store(p, v);
  else
    store_first(p, v, count);
}

PAG_INLINE Vector square_root(Vector v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)v);
#else
  for (int i = 0; i < LANES; i++) v[i] = sqrtf(v[i]);
  return v;
#endif
}

// Lanes of two vectors whose halves of blocks are to be added, by block size (2^i of them).
struct Halves {
  alignas(64) int32_t low[8][LANES], high[8][LANES];
};

constexpr Halves make_halves() {
  Halves halves = {};
  for (int i = 0, block = 1; block <= LANES; i++, block *= 2)
    for (int lane = 0; lane < LANES; lane++) {
      const int at = lane % block, half = block / 2;
      halves.low[i][lane] = lane - at + (at < half ? at : at - half + LANES);
      halves.high[i][lane] = halves.low[i][lane] + half;
    }
  return halves;
}

constexpr Halves HALVES = make_halves();  // worked out in a loop each time, they cost the most

// The sums of LANES vectors, in order: halves of two are added, then halves of halves.
PAG_INLINE Vector sum_each(Vector (&v)[LANES]) {
  constexpr int STEPS = LANES == 16 ? 4 : LANES == 8 ? 3 : 2;
  PAG_UNROLL
  for (int step = STEPS; step > 0; step--) {
    Integers low, high;
    memcpy(&low, HALVES.low[step], sizeof low);
    memcpy(&high, HALVES.high[step], sizeof high);
    PAG_UNROLL
    for (int i = 0; i < 1 << (step - 1); i++) {
      const Vector other = v[i + (1 << (step - 1))];
      v[i] = __builtin_shuffle(v[i], other, low) + __builtin_shuffle(v[i], other, high);
    }
  }
  return v[0];
}

// Of two vectors, their lanes in turn: the first halves, and the second ones.
struct Interleaving {
  alignas(64) int32_t first[LANES], second[LANES];
};

constexpr Interleaving make_interleaving() {
  Interleaving made = {};
  for (int i = 0; i < LANES; i++) {
    made.first[i] = i / 2 + i % 2 * LANES;
    made.second[i] = made.first[i] + LANES / 2;
  }
  return made;
}

constexpr Interleaving INTERLEAVING = make_interleaving();

// Interleaving each vector with that half of them behind turns the bits of all indices by one.
PAG_INLINE void transpose(Vector (&v)[LANES]) {
  Integers first, second;
  memcpy(&first, INTERLEAVING.first, sizeof first);
  memcpy(&second, INTERLEAVING.second, sizeof second);
  PAG_UNROLL
  for (int step = LANES; step > 1; step /= 2) {
    Vector turned[LANES];
    PAG_UNROLL
    for (int i = 0; i < LANES / 2; i++) {
      turned[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], first);
      turned[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], second);
    }
    PAG_UNROLL
    for (int i = 0; i < LANES; i++) v[i] = turned[i];
  }
}

// Written so that a NaN passes, as in torch: of the instructions' operands it is the second one.
#if defined(__AVX512F__)
PAG_INLINE Vector at_least(Vector x, float low) {
  return (Vector)_mm512_max_ps((__m512)broadcast(low), (__m512)x);
}
PAG_INLINE Vector at_most(Vector x, float high) {
  return (Vector)_mm512_min_ps((__m512)broadcast(high), (__m512)x);
}
#else
PAG_INLINE Vector at_least(Vector x, float low) { return x < low ? broadcast(low) : x; }
PAG_INLINE Vector at_most(Vector x, float high) { return x > high ? broadcast(high) : x; }
#endif

// e^x = 2^n e^r with |r| <= ln(2)/2 and the Taylor polynomial of e^r, whose rest is below 1e-7.
PAG_INLINE Vector exponential(Vector x) {
  x = at_most(at_least(x, -87.f), 88.f);
  const Vector shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Vector shifted = x * 1.44269504f + shifter;
  Vector n = shifted - shifter;
  Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  Vector p = broadcast(1.f / 720);
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  Integers exponent = ((Integers)shifted - (Integers)shifter + 127) << 23;
  return p * (Vector)exponent;
}

struct None {
  PAG_INLINE Vector operator()(Vector x) const { return x; }
};
struct Relu {
  PAG_INLINE Vector operator()(Vector x) const { return at_least(x, 0.f); }
};
struct Relu6 {
  PAG_INLINE Vector operator()(Vector x) const { return at_most(at_least(x, 0.f), 6.f); }
};
struct Sigmoid {
  PAG_INLINE Vector operator()(Vector x) const { return 1.f / (1.f + exponential(-x)); }
};
struct Silu {
  PAG_INLINE Vector operator()(Vector x) const { return x / (1.f + exponential(-x)); }
};
struct GeluTanh {  // 0.5 (1 + tanh(z)) = sigmoid(2z), z = sqrt(2/pi) (x + 0.044715 x^3)
  PAG_INLINE Vector operator()(Vector x) const {
    return x / (1.f + exponential(x * (x * x * -0.0713548163f - 1.59576912f)));
  }
};
#if defined(__AVX512F__)
struct Gelu {
  // x * Phi(x), Phi the normal distribution function. Near each multiple of 0.35 there is another
  // polynomial of Phi(|x|) - 1/2, in what |x| is off that multiple (near minimax; 2e-7 off).
  PAG_INLINE Vector operator()(Vector x) const {
    alignas(64) static const float coefficients[5][LANES] = {
      {6.49174835e-05f, 2.34283609e-04f, 3.40557133e-04f, 2.84981477e-04f,
       1.36481613e-04f, -4.85374858e-06f, -8.04391384e-05f, -9.07547073e-05f,
       -6.70224108e-05f, -3.82366125e-05f, -1.78103110e-05f, -6.95207109e-06f,
       -2.30764545e-06f, -6.57391297e-07f, -1.61722525e-07f, 0.00000000e+00f},
      {-2.87904707e-03f, -2.34127301e-03f, -1.13670179e-03f, 1.60878291e-04f,
       1.01709587e-03f, 1.26451487e-03f, 1.06933934e-03f, 7.09927757e-04f,
       3.88765155e-04f, 1.79758252e-04f, 7.11062094e-05f, 2.42595488e-05f,
       7.17764897e-06f, 1.84874227e-06f, 4.15711327e-07f, 0.00000000e+00f},
      {5.03327692e-06f, -8.04398209e-03f, -1.33876065e-02f, -1.47841340e-02f,
       -1.28391497e-02f, -9.24797077e-03f, -5.65750478e-03f, -2.97689927e-03f,
       -1.35750568e-03f, -5.39101195e-04f, -1.87064579e-04f, -5.68502619e-05f,
       -1.51582844e-05f, -3.55073234e-06f, -7.31443379e-07f, 0.00000000e+00f},
      {1.39629483e-01f, 1.31333396e-01f, 1.09288797e-01f, 8.04592147e-02f,
       5.24052382e-02f, 3.01975030e-02f, 1.53944101e-02f, 6.94302469e-03f,
       2.77029094e-03f, 9.77890566e-04f, 3.05379508e-04f, 8.43666057e-05f,
       2.06194982e-05f, 4.45818068e-06f, 8.52715402e-07f, 0.00000000e+00f},
      {3.13141135e-09f, 1.36830643e-01f, 2.58036345e-01f, 3.53140950e-01f,
       4.19243336e-01f, 4.59940851e-01f, 4.82135594e-01f, 4.92857188e-01f,
       4.97444868e-01f, 4.99183655e-01f, 4.99767363e-01f, 4.99940932e-01f,
       4.99986649e-01f, 4.99997318e-01f, 4.99999523e-01f, 5.00000000e-01f},
    };
    const Vector size = (Vector)_mm512_abs_ps((__m512)x);
    const Vector steps = at_most(size, 15 * 0.35f) * (1 / 0.35f);
    const Vector shifter = broadcast(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vector shifted = steps + shifter;
    const Vector off = steps - (shifted - shifter);
    const auto of_nearest = [&](int power) PAG_LAMBDA {
      return (Vector)_mm512_permutexvar_ps((__m512i)shifted, (__m512)load(coefficients[power]));
    };
    Vector p = of_nearest(0);
    PAG_UNROLL
    for (int i = 1; i < 5; i++) p = p * off + of_nearest(i);
    return size * p + x * 0.5f;
  }
};
#else
struct Gelu {
  // x * Phi(x), Phi the normal distribution function. Phi(x) - 1/2 is x times a polynomial in
  // 2 (x/5)^2 - 1 where |x| < 5 (reweighted least squares at Chebyshev nodes; 1.6e-7 off), and
  // one half beyond, where it is 3e-7 off.
  PAG_INLINE Vector operator()(Vector x) const {
    static const float coefficients[] = {
        6.0872349e-4f, -1.6132673e-3f, 1.7228131e-3f,  -2.6855704e-3f, 6.4104930e-3f,
        -1.1164343e-2f, 1.6402185e-2f, -2.3268651e-2f, 3.1442169e-2f,  -4.0442608e-2f,
        5.1520523e-2f, -7.0296280e-2f, 1.4136378e-1f};
    Vector t = x * x * 0.08f - 1.f;
    Vector p = broadcast(coefficients[0]);
    PAG_UNROLL
    for (int i = 1; i < 13; i++) p = p * t + coefficients[i];
    Vector half = x * p;
    half = x >= 5.f ? broadcast(0.5f) : half;
    half = x <= -5.f ? broadcast(-0.5f) : half;
    return x * (0.5f + half);
  }
};
#endif
struct Hardsigmoid {
  PAG_INLINE Vector operator()(Vector x) const {
    return at_most(at_least(x + 3.f, 0.f), 6.f) * (1.f / 6);
  }
};
struct Hardswish {
  PAG_INLINE Vector operator()(Vector x) const { return x * Hardsigmoid()(x); }
};
struct LeakyRelu {
  float slope;
  PAG_INLINE Vector operator()(Vector x) const { return x < 0.f ? x * slope : x; }
};

// Call a function with the activation of a number.
template <class Function>
PAG_INLINE void with_activation(int activation, float slope, Function function) {
  switch (activation) {
    case PAG_NONE: return function(None());
    case PAG_RELU: return function(Relu());
    case PAG_RELU6: return function(Relu6());
    case PAG_SILU: return function(Silu());
    case PAG_GELU: return function(Gelu());
    case PAG_GELU_TANH: return function(GeluTanh());
    case PAG_HARDSWISH: return function(Hardswish());
    case PAG_HARDSIGMOID: return function(Hardsigmoid());
    case PAG_SIGMOID: return function(Sigmoid());
    case PAG_LEAKY_RELU: return function(LeakyRelu{slope});
  }
}

}  // namespace
