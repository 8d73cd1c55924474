// The C interface: chooses the instruction set, checks lists, and splits work over threads.
#include "interface.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#if defined(PAG_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <new>
#include <thread>
#include <vector>

#include "plan.h"

extern const pag_kernels pag_kernels_portable;
#if defined(__x86_64__)
extern const pag_kernels pag_kernels_avx2;
extern const pag_kernels pag_kernels_avx512;
#if defined(PAG_WITH_AMX)
extern const pag_kernels pag_kernels_amx;
#endif
#endif

namespace {

constexpr int64_t LINE = 64;              // bytes of a cache line
constexpr int64_t SMALLEST_SHARE = 1 << 16;  // operations worth waking a thread for
constexpr int UNITS_PER_THREAD = 4;       // so that an interrupted thread does not hold up the rest

#if defined(PAG_WITH_AMX)
// Whether the processor multiplies tiles of bytes, moves bytes anywhere, and the system lets us: tiles
// are state that a process has to ask for.
bool may_use_amx() {
  constexpr unsigned TILES_AND_INT8 = 3u << 24;
  constexpr long ASK_FOR_STATE = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi") &&
         __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES_AND_INT8) == TILES_AND_INT8 &&
         !syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA);
}
#endif

const pag_kernels* supported(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(PAG_WITH_AMX)
  static const bool amx = avx512 && may_use_amx();
  if (amx && (!name || !strcmp(name, "amx"))) return &pag_kernels_amx;
#endif
  if (avx512 && (!name || !strcmp(name, "avx512"))) return &pag_kernels_avx512;
  if (avx2 && (!name || !strcmp(name, "avx2"))) return &pag_kernels_avx2;
#endif
  return !name || !strcmp(name, "portable") ? &pag_kernels_portable : nullptr;
}

std::atomic<const pag_kernels*> chosen{nullptr};

const pag_kernels& kernels() {
  const pag_kernels* table = chosen.load(std::memory_order_relaxed);
  if (!table) chosen.store(table = supported(nullptr), std::memory_order_relaxed);
  return *table;
}

// --- threads ---------------------------------------------------------------------------------

using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Gomp> openmp{nullptr};

// How many threads the calls that this thread makes may have.
thread_local int team = 1;

unsigned number_of_thread() {
  static std::atomic<unsigned> threads{0};
  thread_local const unsigned number = threads.fetch_add(1, std::memory_order_relaxed);
  return number;
}

// Units of work, in as many ranges as threads are to do them. A thread begins with the same range in
// each call, then helps with the others: what it reads, it often wrote itself in the call before, into
// its own cache.
template <class Unit>
struct Work {
  static constexpr unsigned MOST_RANGES = 64;
  struct alignas(LINE) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  const Unit* unit;
  unsigned threads, count;
  std::atomic<unsigned> came{0};
  Range ranges[MOST_RANGES];

  Work(const Unit& unit, int64_t units, unsigned threads)
      : unit(&unit), threads(threads), count(std::min(threads, MOST_RANGES)) {
    for (unsigned i = 0; i < count; i++) {
      ranges[i].next.store(units * i / count, std::memory_order_relaxed);
      ranges[i].end = units * (i + 1) / count;
    }
  }

  static void run(void* self) {
    Work& work = *static_cast<Work*>(self);
    if (work.came.fetch_add(1) >= work.threads) return;
    const unsigned own = number_of_thread() % work.count;
    for (unsigned turn = 0; turn < work.count; turn++) {
      Range& range = work.ranges[(own + turn) % work.count];
      for (int64_t i; (i = range.next.fetch_add(1)) < range.end;) (*work.unit)(i);
    }
  }
};

// Call unit(0) ... unit(count - 1) on up to `threads` threads, this one included. The runtime that
// torch uses already has workers; a second pool would compete with them for the same cores. Where it is
// asked for fewer threads than before it ends the others, and makes new ones for the next call, so the
// whole team is called each time.
template <class Unit>
void share(int64_t count, int threads, const Unit& unit) {
  threads = (int)std::min<int64_t>(threads, count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) unit(i);
    return;
  }
  Work<Unit> work(unit, count, (unsigned)threads);
  if (const Gomp parallel = openmp.load(std::memory_order_relaxed))
    return parallel(Work<Unit>::run, &work, (unsigned)std::max(threads, team), 0);
  std::vector<std::thread> helpers;
  helpers.reserve(threads - 1);
  try {
    for (int i = 1; i < threads; i++) helpers.emplace_back(Work<Unit>::run, &work);
  } catch (const std::exception&) {
  }  // no more threads to be had: those that started, and this one, do all
  Work<Unit>::run(&work);
  for (std::thread& helper : helpers) helper.join();
}

int worthwhile(int threads, int64_t operations) {
  return (int)std::clamp<int64_t>(operations / SMALLEST_SHARE, 1, std::max(threads, 1));
}

// --- memory ----------------------------------------------------------------------------------

// Memory of one thread, which only grows.
struct Scratch {
  char* data = nullptr;
  int64_t size = 0;

  ~Scratch() { free(data); }

  char* at_least(int64_t bytes) {
    if (bytes > size) {
      free(data);
      size = 0;
      data = static_cast<char*>(aligned_alloc(LINE, bytes));
      if (data) size = bytes;
    }
    return data;
  }
};

thread_local Scratch thread_scratch;
thread_local Scratch thread_tiles;  // of the thread that calls; all that help read it
thread_local Scratch thread_band;

int64_t whole_lines(int64_t bytes) { return (bytes + LINE - 1) / LINE * LINE; }

bool take_scratch(const pag_plan& plan, pag_scratch& scratch) {
  char* at = thread_scratch.at_least(plan.rows_bytes + plan.offsets_bytes + plan.blocks_bytes +
                                     plan.zeros_bytes + plan.panel_bytes + plan.columns_bytes +
                                     plan.expanded_bytes + plan.transposed_bytes +
                                     plan.digits_bytes + plan.kept_bytes);
  if (!at) return false;
  scratch.rows = reinterpret_cast<const float**>(at);
  scratch.offsets = reinterpret_cast<int64_t*>(at += plan.rows_bytes);
  scratch.blocks = reinterpret_cast<pag_block*>(at += plan.offsets_bytes);
  scratch.zeros = reinterpret_cast<float*>(at += plan.blocks_bytes);
  scratch.panel = reinterpret_cast<float*>(at += plan.zeros_bytes);
  scratch.columns = reinterpret_cast<float*>(at += plan.panel_bytes);
  scratch.expanded = reinterpret_cast<float*>(at += plan.columns_bytes);
  scratch.transposed = reinterpret_cast<float*>(at += plan.expanded_bytes);
  scratch.digits = reinterpret_cast<int8_t*>(at += plan.transposed_bytes);
  scratch.kept = reinterpret_cast<float*>(at += plan.digits_bytes);
  memset(scratch.zeros, 0, plan.zeros_bytes);
  const pag_convolution& call = *plan.call;
  int64_t* offset = scratch.offsets;
  for (int64_t ky = 0; ky < call.kernel[0]; ky++)
    for (int64_t kx = 0; kx < call.kernel[1]; kx++)
      for (int s = 0; s < call.source_count; s++)
        *offset++ = (ky * call.dilation[0] * call.sources[s].width + kx * call.dilation[1]) *
                    call.sources[s].stride;
  return true;
}

// --- convolution -----------------------------------------------------------------------------

// How many pixels are listed, or a negative status: nothing in the list may be used then.
int64_t check_list(const pag_list& list, int64_t pixels) {
  const int64_t count = list.count ? *list.count : list.capacity;
  if (count < 0 || count > list.capacity) return -PAG_BAD_COUNT;
  if (!list.pixels && list.capacity) return count == pixels ? count : -PAG_BAD_COUNT;
  bool outside = false;
  for (int64_t i = 0; i < count; i++) outside |= (uint32_t)list.pixels[i] >= (uint32_t)pixels;
  return outside ? -PAG_BAD_INDEX : count;
}

bool is_ascending(const pag_list& list, int64_t count) {
  if (!list.pixels) return true;
  bool falls = false;
  for (int64_t i = 1; i < count; i++) falls |= list.pixels[i] <= list.pixels[i - 1];
  return !falls;
}

bool is_pointwise(const pag_convolution& call) {
  bool result = call.kernel[0] * call.kernel[1] == 1 && !call.padding[0] && !call.padding[1] &&
                call.stride[0] * call.stride[1] == 1 && call.height == call.out_height &&
                call.width == call.out_width;
  for (int s = 0; s < call.source_count; s++)
    result &= call.sources[s].height == call.height && call.sources[s].width == call.width;
  return result;
}

int64_t weights_budget() {  // half the cache of a core, the other half is for the maps
  static const int64_t bytes = [] {
    long size = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return std::max<int64_t>(size, 1 << 19) / 2;
  }();
  return bytes;
}

// How a convolution by digits is cut. Of many taps and channels, some taps are multiplied before the
// others, so that weights of a block, and those of the next one, stay cached beside the tiles' input.
void size_digits(pag_plan& plan) {
  constexpr int64_t DEEP = 2048;
  const pag_convolution& call = *plan.call;
  const int64_t depth = (int64_t)plan.taps * call.channels;
  const int64_t padded = (depth + PAG_DIGITS_DEPTH - 1) / PAG_DIGITS_DEPTH * PAG_DIGITS_DEPTH;
  plan.whole_steps = !plan.gathered;
  for (int s = 0; s < call.source_count; s++)
    plan.whole_steps &= call.sources[s].channels % PAG_DIGITS_DEPTH == 0;
  plan.joined &= !plan.whole_steps;  // neighbours share the digits of a tap
  plan.parts = 1;
  if (plan.whole_steps) plan.parts = (int32_t)std::clamp<int64_t>((depth + DEEP - 1) / DEEP, 1, plan.taps);
  const int64_t taps = (plan.taps + plan.parts - 1) / plan.parts;
  const int64_t bytes = (plan.parts > 1 ? taps * call.channels : padded) * PAG_DIGITS * PAG_NARROW;
  const int64_t kept =
      plan.parts > 1 ? sizeof(float) * plan.blocks * PAG_NARROW * PAG_DIGITS_BLOCK : 0;
  const int64_t most = std::min<int64_t>(plan.tiles, PAG_DIGITS_GROUP);
  plan.group = (int32_t)std::clamp<int64_t>(weights_budget() / (bytes + kept), 1, most);
  plan.digits_bytes = plan.group * bytes;
  plan.kept_bytes = plan.group * kept;
  plan.panel_bytes = whole_lines(sizeof(float) * padded);
}

bool is_strided(const pag_convolution& call) { return call.winograd && call.stride[0] > 1; }

// Matrices of weights: taps, or what Winograd's algorithm makes of them.
int32_t matrices(const pag_convolution& call) {
  if (is_strided(call)) return PAG_SPAN * PAG_SPAN;
  return call.winograd ? PAG_PARTS : call.kernel[0] * call.kernel[1];
}

pag_plan make_plan(const pag_convolution& call, int64_t pixels, const pag_kernels& table) {
  constexpr int FEW_CHANNELS = 8;  // then a tap is too short a loop
  constexpr int THIN_CHANNELS = 64;
  // Dot products: with these many input channels, and pixels to unpack the weights for.
  constexpr int FEW_OUT_CHANNELS = 4, MOST_DOTS = 12, LEAST_CHANNELS = 16, LEAST_PIXELS = 64;
  pag_plan plan = {};
  plan.call = &call;
  plan.taps = matrices(call);
  plan.segments = plan.taps * call.source_count;
  const int group_columns = call.out_channels / call.groups;
  const int joined = call.groups > 1 ? std::max(1, 16 / group_columns) : 1;
  plan.bundle_channels = joined * (call.channels / call.groups);
  plan.bundle_columns = joined * group_columns;
  plan.bundles = (call.groups + joined - 1) / joined;
  plan.blocks_per_bundle = (plan.bundle_columns + 31) / 32;
  plan.blocks = plan.bundles * plan.blocks_per_bundle;
  const bool slim = group_columns == 1 || group_columns == 2 || group_columns == 4 || group_columns == 8;
  if (slim && call.groups > 1 && call.channels == call.out_channels) plan.slim = group_columns;
  plan.pointwise = is_pointwise(call);
  plan.plain = true;
  for (int s = 0; s < call.source_count; s++) plan.plain &= !call.sources[s].shift;
  plan.joined = call.source_count == 1 && call.groups == 1 && call.dilation[1] == 1 &&
                !call.input_scale && !call.sources[0].shift &&
                call.sources[0].stride == call.channels;
  plan.gathered =
      call.input_scale || (call.groups == 1 && plan.taps > 1 && call.channels <= FEW_CHANNELS);
  plan.expanding = call.compressed == PAG_WHOLE_NUMBERS && table.expands();
  plan.by_digits = call.compressed == PAG_IN_DIGITS && table.digits;
  plan.tile = plan.slim        ? table.slim_tile(plan.slim)
              : plan.expanding ? table.tall_tile
              : plan.by_digits ? PAG_NARROW
                               : table.tile;
  plan.pixels = pixels;
  plan.per_width = 1.0 / call.out_width;
  plan.per_height = 1.0 / call.out_height;
  plan.tiles = (plan.pixels + plan.tile - 1) / plan.tile;
  int64_t widest = 0;
  for (int s = 0; s < call.source_count; s++)
    widest = std::max<int64_t>(widest, call.sources[s].channels);
  plan.rows_bytes = whole_lines(sizeof(float*) * plan.segments * plan.tile *
                                (plan.slim ? PAG_CHANNELS_GROUP : 1));
  plan.offsets_bytes = whole_lines(sizeof(int64_t) * plan.segments);
  plan.blocks_bytes = whole_lines(sizeof(pag_block) * plan.blocks);
  plan.zeros_bytes = whole_lines(sizeof(float) * widest);
  if (plan.gathered)
    plan.panel_bytes = whole_lines(sizeof(float) * plan.taps * call.channels * plan.tile);
  plan.plain_dot = plan.pointwise && plan.plain && !plan.gathered && call.source_count == 1 &&
                   !call.residual && !call.scale;
  // Per pixel, dot products take the channels times the output channels, and sums of vectors; blocks
  // of output channels take the channels times the width of a block.
  const int few = plan.plain_dot ? std::clamp<int>(call.channels / 16, FEW_OUT_CHANNELS, MOST_DOTS)
                                 : FEW_OUT_CHANNELS;
  plan.dot = call.groups == 1 && !call.winograd && !call.compressed && call.out_channels <= few &&
             call.channels >= LEAST_CHANNELS && pixels >= LEAST_PIXELS;
  plan.thin = plan.taps == 1 && call.groups == 1 && call.source_count == 1 && plan.plain &&
              !plan.gathered && !plan.dot && !call.compressed && call.channels <= THIN_CHANNELS &&
              is_ascending(call.list, pixels);
  if (plan.by_digits) size_digits(plan);
  if (plan.expanding && plan.tile > table.tile)
    plan.transposed_bytes = whole_lines(sizeof(float) * plan.taps * call.channels * plan.tile);
  if (plan.dot)
    plan.columns_bytes =
        whole_lines(sizeof(float) * plan.taps * call.channels * call.out_channels);
  return plan;
}

// Whether compressed weights are expanded for the only tile, and not kept.
bool reads_once(const pag_plan& plan) { return plan.expanding && plan.tiles == 1; }

// Into how many shares threads divide the output channels: where pixels are too few to go round, or where
// all weights, which each thread would have to read and expand, are more than all input. Else 1: they
// divide the pixels.
int64_t shares_of_channels(const pag_plan& plan, int threads) {
  const int64_t group_columns = plan.call->out_channels / plan.call->groups;
  const bool heavy = plan.taps * group_columns > plan.pixels && plan.blocks % threads == 0;
  if (threads == 1 || plan.slim || (plan.tiles >= threads && !heavy)) return 1;
  // More shares than threads make up for interruptions, but each transposes the input of a single tile.
  const bool twice = plan.tiles > 1 && plan.blocks % (2 * threads) == 0;
  return std::min<int64_t>(plan.blocks, twice ? 2 * threads : threads);
}

// Blocks of output channels that are computed together, tile by tile: their weights stay cached. Those
// that a single tile reads need not.
int32_t blocks_together(const pag_plan& plan, int64_t shares) {
  if (plan.slim) return 1;
  const int64_t bytes = (int64_t)plan.taps * plan.bundle_channels * 32 * sizeof(float);
  int64_t fitting = std::clamp<int64_t>(weights_budget() / bytes, 1, plan.blocks);
  if (reads_once(plan)) fitting = plan.blocks;
  const int64_t parts = (plan.blocks + fitting - 1) / fitting;
  const int64_t even = (parts + shares - 1) / shares * shares;
  return (int32_t)((plan.blocks + even - 1) / even);
}

// --- convolution by tiles --------------------------------------------------------------------

// Leading sources that are read upsampled, so that both pixels of a tile's second and third row, and
// column, are the same one.
void find_repeating(const pag_convolution& call, pag_tiling& tiling) {
  if (call.height % 2 || call.width % 2 || call.padding[0] % 2 == 0 || call.padding[1] % 2 == 0 ||
      call.dilation[0] * call.dilation[1] > 1 || is_strided(call))
    return;
  while (tiling.repeating < call.source_count && call.sources[tiling.repeating].shift)
    tiling.repeating_channels += call.sources[tiling.repeating++].channels;
}

int32_t tiles_along(int32_t size, int32_t dilation) {
  return (size + 2 * dilation - 1) / (2 * dilation) * dilation;
}

// Memory for groups of tiles.
void size_groups(const pag_convolution& call, int tile, pag_tiling& tiling) {
  constexpr int64_t PAD = LINE / sizeof(float);  // keeps rows from competing for the same lines
  tiling.row_bytes = whole_lines(sizeof(float) * std::max(call.channels, call.out_channels));
  if (is_strided(call)) {
    constexpr int64_t TIMES = 3;  // as they lie, turned and transformed
    tiling.group = PAG_TOGETHER;
    tiling.patches_bytes =
        whole_lines(TIMES * sizeof(float) * PAG_TOGETHER * PAG_SPAN * PAG_SPAN * call.channels);
    return;
  }
  tiling.patch = (call.channels + PAD - 1) / PAD * PAD + PAD;
  const int64_t bytes = PAG_PARTS * sizeof(float) * (tiling.patch + PAG_PRODUCT);
  // Weights that outgrow the cache are read anew for every group: larger ones then, though their
  // patches do not stay cached either.
  const int64_t weights = sizeof(float) * PAG_PARTS * call.channels * call.out_channels;
  const int64_t room = weights_budget() * (weights > 4 * weights_budget() ? 4 : 1);
  tiling.group = (int32_t)std::clamp<int64_t>(room / bytes / tile, 1, 16) * tile;
  tiling.patch_part = tiling.group * tiling.patch + PAD;
  tiling.product_part = tiling.group * PAG_PRODUCT + PAD;
  tiling.patches_bytes = whole_lines(PAG_PARTS * sizeof(float) * tiling.patch_part);
  tiling.products_bytes = whole_lines(PAG_PARTS * sizeof(float) * tiling.product_part);
  tiling.tiles_bytes = whole_lines(sizeof(int32_t) * (PAG_PARTS * tiling.group + 1));
  if (call.compressed) tiling.expanded_bytes = sizeof(float) * 32 * call.channels;
}

pag_tiling make_tiling(const pag_plan& plan, int tile, int32_t before) {
  const pag_convolution& call = *plan.call;
  pag_tiling tiling = {};
  tiling.rows = tiles_along(before + call.out_height, call.dilation[0]);
  tiling.columns = tiles_along(call.out_width, call.dilation[1]);
  tiling.per_rows = 1.0 / tiling.rows;
  tiling.per_columns = 1.0 / tiling.columns;
  find_repeating(call, tiling);
  size_groups(call, tile, tiling);
  return tiling;
}

// Along one axis: the tile of each pixel, whether it is its second one, and where tiles begin: so many
// pixels before the first one.
struct Axis {
  int32_t *tile, *second, *first;

  Axis(int32_t*& memory, int32_t size, int32_t tiles, int32_t dilation, int32_t before)
      : tile(memory), second(tile + size), first(second + size) {
    memory = first + tiles;
    for (int32_t at = 0; at < size; at++) {
      const int32_t pair = (at + before) / (2 * dilation), inside = (at + before) % (2 * dilation);
      tile[at] = pair * dilation + inside % dilation;
      second[at] = inside / dilation;
    }
    for (int32_t at = 0; at < tiles; at++)
      first[at] = at / dilation * 2 * dilation + at % dilation - before;
  }
};

// Which pixels of each tile are listed.
void mark_tiles(const pag_plan& plan, const pag_tiling& tiling, const Axis& rows,
                const Axis& columns, uint8_t* open) {
  const pag_convolution& call = *plan.call;
  const int64_t width = call.out_width, height = call.out_height;
  memset(open, 0, (int64_t)call.batch * tiling.rows * tiling.columns);
  int64_t begin = 0, end = 0;  // pixels of the line of the last one: most lie in the same
  uint8_t* row = open;
  int shift = 0;
  for (int64_t i = 0; i < plan.pixels; i++) {
    const int64_t index = call.list.pixels ? call.list.pixels[i] : i;
    if (index < begin || index >= end) {
      const int64_t line = index / width, image = line / height, y = line % height;
      begin = line * width;
      end = begin + width;
      row = open + (image * tiling.rows + rows.tile[y]) * tiling.columns;
      shift = 2 * rows.second[y];
    }
    row[columns.tile[index - begin]] |= 1 << (shift + columns.second[index - begin]);
  }
}

// Tiles with listed pixels; if asked for those of the same rows and columns one after the other. Returns
// how many.
int64_t list_tiles(const uint8_t* open, int64_t all, bool sorted, int32_t* tiles) {
  constexpr int KINDS = 9;  // first row, second or both, and the same of columns
  int64_t ends[KINDS + 1] = {};
  uint8_t kind[1 << 4];
  for (int bits = 0; bits < 1 << 4; bits++) {
    const int rows = (bits & 3 ? 1 : 0) + (bits & 12 ? 2 : 0);
    const int columns = (bits & 5 ? 1 : 0) + (bits & 10 ? 2 : 0);
    kind[bits] = bits && sorted ? 3 * (rows - 1) + columns - 1 : 0;
  }
  for (int64_t i = 0; i < all; i++) ends[kind[open[i]] + 1] += open[i] != 0;
  for (int i = 0; i < KINDS; i++) ends[i + 1] += ends[i];
  const int64_t count = ends[KINDS];
  for (int64_t i = 0; i < all; i++)
    if (open[i]) tiles[ends[kind[open[i]]]++] = (int32_t)i;
  return count;
}

bool take_tile_scratch(const pag_tiling& tiling, pag_tile_scratch& scratch) {
  char* at = thread_scratch.at_least(tiling.patches_bytes + tiling.products_bytes +
                                     2 * tiling.row_bytes + tiling.tiles_bytes +
                                     tiling.expanded_bytes);
  if (!at) return false;
  scratch.patches = reinterpret_cast<float*>(at);
  scratch.products = reinterpret_cast<float*>(at += tiling.patches_bytes);
  scratch.zeros = reinterpret_cast<float*>(at += tiling.products_bytes);
  scratch.nowhere = reinterpret_cast<float*>(at += tiling.row_bytes);
  scratch.expanded = reinterpret_cast<float*>(at += tiling.row_bytes);
  scratch.tiles = reinterpret_cast<int32_t*>(at += tiling.expanded_bytes);
  memset(scratch.products, 0, tiling.products_bytes + tiling.row_bytes);
  return true;
}

// Tiles begin some rows before the first one.
int convolve_tiles(const pag_plan& plan, int threads, int32_t before) {
  const pag_kernels& table = kernels();
  const pag_convolution& call = *plan.call;
  pag_tiling tiling = make_tiling(plan, table.tile, before);
  const int64_t all = (int64_t)call.batch * tiling.rows * tiling.columns;
  const int64_t numbers = all + 2 * (call.out_height + call.out_width) + tiling.rows + tiling.columns;
  char* memory = thread_tiles.at_least(whole_lines(numbers * sizeof(int32_t) + all));
  if (!memory) return PAG_NO_MEMORY;
  int32_t* at = reinterpret_cast<int32_t*>(memory);
  const Axis rows(at, call.out_height, tiling.rows, call.dilation[0], before);
  const Axis columns(at, call.out_width, tiling.columns, call.dilation[1], 0);
  uint8_t* open = reinterpret_cast<uint8_t*>(at + all);
  mark_tiles(plan, tiling, rows, columns, open);
  const int64_t count = list_tiles(open, all, is_strided(call), at);
  tiling.tiles = at;
  tiling.open = open;
  tiling.first_rows = rows.first;
  tiling.first_columns = columns.first;
  const int64_t macs = count * plan.taps * call.channels * call.out_channels;
  threads = worthwhile(threads, macs / 8);
  const auto compute = is_strided(call) ? table.strided : table.winograd;
  // Each share reads all of its weights: no more shares than groups, but then some for every thread.
  const int64_t groups = (count + tiling.group - 1) / tiling.group;
  const int64_t chunks = std::min<int64_t>(threads == 1 ? 1 : groups, threads * UNITS_PER_THREAD);
  const int64_t wanted = (2 * threads + chunks - 1) / chunks;  // each transforms its patches anew
  const int64_t parts = std::min<int64_t>({wanted, threads, plan.blocks});
  std::atomic<bool> failed{false};
  share(chunks * parts, threads, [&](int64_t unit) {
    const int64_t chunk = unit / parts, part = unit % parts;
    pag_tile_scratch scratch;
    if (take_tile_scratch(tiling, scratch))
      compute(&plan, &tiling, &scratch, (int32_t)(plan.blocks * part / parts),
              (int32_t)(plan.blocks * (part + 1) / parts), count * chunk / chunks,
              count * (chunk + 1) / chunks);
    else
      failed.store(true);
  });
  return failed.load() ? PAG_NO_MEMORY : PAG_OK;
}

// Shares of tiles, each of which reads all weights, or where these are more than the input, of output
// channels: each makes the digits of its tiles anew then.
int convolve_digits(const pag_plan& plan, int threads) {
  const pag_kernels& table = kernels();
  int64_t groups = (plan.tiles + plan.group - 1) / plan.group;
  if (plan.pixels > plan.call->out_channels)
    groups = std::max(groups, std::min<int64_t>(plan.tiles, 2 * threads));
  const int64_t chunks = std::min<int64_t>(threads == 1 ? 1 : groups, threads * UNITS_PER_THREAD);
  const int64_t wanted = (2 * threads + chunks - 1) / chunks;
  const int64_t parts = std::min<int64_t>({wanted, threads, plan.blocks});
  std::atomic<bool> failed{false};
  share(chunks * parts, threads, [&](int64_t unit) {
    const int64_t chunk = unit / parts, part = unit % parts;
    pag_scratch scratch;
    if (take_scratch(plan, scratch))
      table.digits(&plan, &scratch, (int32_t)(plan.blocks * part / parts),
                   (int32_t)(plan.blocks * (part + 1) / parts), plan.tiles * chunk / chunks,
                   plan.tiles * (chunk + 1) / chunks);
    else
      failed.store(true);
  });
  return failed.load() ? PAG_NO_MEMORY : PAG_OK;
}

// `before`: output rows that a map has before those of the call, of which tiles would begin at every
// other one.
int convolve(const pag_convolution* given, int threads, int32_t before = 0) {
  const pag_kernels& table = kernels();
  const int64_t all = (int64_t)given->batch * given->out_height * given->out_width;
  const int64_t pixels = check_list(given->list, all);
  if (pixels <= 0) return (int)-pixels;
  pag_convolution linear;
  const pag_convolution* call = given;
  if (given->activate_if_all && pixels < all) {
    linear = *given;
    linear.activation = PAG_NONE;
    call = &linear;
  }
  pag_plan plan = make_plan(*call, pixels, table);
  if (call->winograd) return convolve_tiles(plan, threads, before % (2 * call->dilation[0]));
  const int64_t weights =
      (int64_t)plan.taps * call->out_channels * call->channels / call->groups;
  const int64_t floats = plan.pixels * (call->channels + call->out_channels) + weights;
  threads = worthwhile(threads, std::max(plan.pixels * weights / 8, floats));
  if (plan.by_digits) return convolve_digits(plan, threads);
  const int64_t shares = shares_of_channels(plan, threads);
  const int32_t together = blocks_together(plan, shares);
  const int32_t parts = plan.slim ? 1 : (plan.blocks + together - 1) / together;
  if (call->compressed && !reads_once(plan))
    plan.expanded_bytes = sizeof(float) * together * 32 * plan.taps * call->channels;
  const int64_t chunks = threads == 1 || shares >= threads
                             ? 1
                             : std::min<int64_t>(plan.tiles, (int64_t)threads * UNITS_PER_THREAD);
  std::atomic<bool> failed{false};
  share(parts * chunks, threads, [&](int64_t unit) {
    const int64_t part = unit / chunks, chunk = unit % chunks;
    pag_scratch scratch;
    if (!take_scratch(plan, scratch)) {
      failed.store(true);
      return;
    }
    table.convolution(&plan, &scratch, (int32_t)part * together,
                      std::min<int32_t>((int32_t)(part + 1) * together, plan.blocks),
                      plan.tiles * chunk / chunks, plan.tiles * (chunk + 1) / chunks);
  });
  return failed.load() ? PAG_NO_MEMORY : PAG_OK;
}

int layer_norm(const pag_rows* call, int threads) {
  const pag_kernels& table = kernels();
  const int64_t count = check_list(call->list, (int64_t)call->batch * call->pixels);
  if (count < 0) return (int)-count;
  const int64_t chunks = worthwhile(threads, count * call->channels);
  share(chunks, (int)chunks, [&](int64_t i) {
    table.layer_norm(call, count * i / chunks, count * (i + 1) / chunks);
  });
  return PAG_OK;
}

// What changes listed pixels of a map, pixel by pixel.
int change(const pag_map* call, int threads, void (*function)(const pag_map*, int64_t, int64_t)) {
  const int64_t pixels = (int64_t)call->batch * call->height * call->width;
  const int64_t count = check_list(call->list, pixels);
  if (count < 0) return (int)-count;
  const int64_t chunks = worthwhile(threads, count * call->channels);
  share(chunks, (int)chunks, [&](int64_t i) {
    function(call, count * i / chunks, count * (i + 1) / chunks);
  });
  return PAG_OK;
}

int interpolate(const pag_map* call, int threads) {
  return change(call, threads, kernels().interpolate);
}

int activate(const pag_map* call, int threads) {
  if (call->computed && *call->computed == (int64_t)call->batch * call->height * call->width)
    return PAG_OK;
  return change(call, threads, kernels().activate);
}

int mean(const pag_rows* call, int threads) {
  const pag_kernels& table = kernels();
  const int64_t count = check_list(call->list, (int64_t)call->batch * call->pixels);
  if (count < 0) return (int)-count;
  if (!call->batch) return PAG_OK;
  char* memory = thread_scratch.at_least(whole_lines(sizeof(int64_t) * call->batch));
  if (!memory) return PAG_NO_MEMORY;
  int64_t* counts = reinterpret_cast<int64_t*>(memory);
  std::fill_n(counts, call->batch, call->list.pixels ? 0 : (int64_t)call->pixels);
  if (call->list.pixels)
    for (int64_t i = 0; i < count; i++) counts[call->list.pixels[i] / call->pixels]++;
  constexpr int32_t STEP = 64;  // channels: whole lines, so that no two threads write one
  const int32_t steps = (call->channels + STEP - 1) / STEP;
  const int64_t chunks = std::min(steps, worthwhile(threads, count * call->channels));
  share(chunks, (int)chunks, [&](int64_t i) {
    table.mean(call, count, counts, (int32_t)(steps * i / chunks) * STEP,
               std::min<int32_t>((int32_t)(steps * (i + 1) / chunks) * STEP, call->channels));
  });
  return PAG_OK;
}

// Whole numbers in the order of floats, 0 and -0 alike; NaN with a clear sign is the largest.
uint32_t rank_of(float score) {
  uint32_t bits;
  score += 0.0f;
  memcpy(&bits, &score, sizeof bits);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Opens the `keep` pixels with the largest scores, of equal ones the first. Instead of sorting, a
// histogram finds among which pixels the last one is; `between` has room for all of them.
void open_largest(const float* scores, int64_t pixels, int64_t keep, uint32_t* between,
                  uint8_t* mask) {
  constexpr int SHIFT = 20;
  if (keep <= 0 || keep >= pixels) {
    memset(mask, keep > 0, pixels);
    return;
  }
  int64_t histogram[1 << (32 - SHIFT)] = {};
  for (int64_t i = 0; i < pixels; i++) histogram[rank_of(scores[i]) >> SHIFT]++;
  uint32_t bucket = (1 << (32 - SHIFT)) - 1;
  int64_t left = keep;
  while (histogram[bucket] < left) left -= histogram[bucket--];
  int64_t found = 0;
  for (int64_t i = 0; i < pixels; i++) {
    const uint32_t rank = rank_of(scores[i]);
    between[found] = rank;
    found += rank >> SHIFT == bucket;
  }
  std::nth_element(between, between + left - 1, between + found, std::greater<uint32_t>());
  const uint32_t last = between[left - 1];
  left -= std::count_if(between, between + left, [=](uint32_t rank) { return rank > last; });
  for (int64_t i = 0; i < pixels; i++) {
    const uint32_t rank = rank_of(scores[i]);
    const bool tie = rank == last && left > 0;
    left -= tie;
    mask[i] = rank > last || tie;
  }
}

// Whether all pixels that repeat one of a single, upsampled map are decided alike.
bool repeats(const pag_gate& call) {
  const pag_source& source = call.sources[0];
  return call.source_count == 1 && source.shift && call.stride[0] * call.stride[1] == 1 &&
         !call.offset[0] && !call.offset[1] && call.out_height == source.height << source.shift &&
         call.out_width == source.width << source.shift;
}

int decide(const pag_gate* call, int threads);

int decide_once(const pag_gate* call, int threads) {
  pag_gate small = *call;
  const int shift = call->sources[0].shift;
  small.sources[0].shift = 0;
  small.out_height = call->sources[0].height;
  small.out_width = call->sources[0].width;
  const int64_t lines = (int64_t)call->batch * call->out_height, width = call->out_width;
  small.mask = reinterpret_cast<uint8_t*>(thread_scratch.at_least(
      whole_lines((int64_t)call->batch * small.out_height * small.out_width + 1)));
  if (!small.mask) return PAG_NO_MEMORY;
  decide(&small, threads);
  for (int64_t line = 0; line < lines; line++) {
    const uint8_t* from = small.mask + (line >> shift) * small.out_width;
    uint8_t* to = call->mask + line * width;
    for (int64_t x = 0; x < width; x++) to[x] = from[x >> shift];
  }
  return PAG_OK;
}

int decide(const pag_gate* call, int threads) {
  constexpr int32_t LEAST_CHANNELS = 16;  // fewer take as long
  const pag_kernels& table = kernels();
  if (!(call->keep && *call->keep >= 0) && repeats(*call)) return decide_once(call, threads);
  const int64_t each = (int64_t)call->out_height * call->out_width, pixels = call->batch * each;
  const int64_t keep = call->keep ? *call->keep : -1;
  pag_gate ranked = *call;
  const pag_source& first = call->sources[0];
  if (call->computed && *call->computed == (int64_t)call->batch * first.height * first.width)
    ranked.activation = PAG_NONE;
  if (keep >= 0) {
    const int64_t bytes = whole_lines(sizeof(float) * (pixels + 1));
    ranked.scores = reinterpret_cast<float*>(thread_scratch.at_least(2 * bytes));
    if (!ranked.scores) return PAG_NO_MEMORY;
  }
  const int64_t rows = (int64_t)call->batch * call->out_height;
  const int64_t operations = pixels * std::max(call->channels, LEAST_CHANNELS);
  const int64_t chunks = std::min<int64_t>(rows, worthwhile(threads, operations));
  share(chunks, (int)chunks, [&](int64_t i) {
    table.decide(&ranked, rows * i / chunks, rows * (i + 1) / chunks);
  });
  if (keep < 0) return PAG_OK;
  uint32_t* between = reinterpret_cast<uint32_t*>(
      reinterpret_cast<char*>(ranked.scores) + whole_lines(sizeof(float) * (pixels + 1)));
  for (int64_t image = 0; image < call->batch; image++)
    open_largest(ranked.scores + image * each, each, keep, between, call->mask + image * each);
  return PAG_OK;
}

int pool(const pag_pool* call, int threads) {
  const pag_kernels& table = kernels();
  const int64_t rows = (int64_t)call->batch * call->out_height;
  const int64_t reads = rows * call->out_width * call->channels * call->kernel[0] * call->kernel[1];
  const int64_t chunks = std::min<int64_t>(rows, worthwhile(threads, reads));
  share(chunks, (int)chunks, [&](int64_t i) {
    table.pool(call, rows * i / chunks, rows * (i + 1) / chunks);
  });
  return PAG_OK;
}

// --- in bands --------------------------------------------------------------------------------

// Some rows of a map that is read as it is computed: what lies in the cache of a core is neither
// written to memory nor read from there.
struct Band {
  float* memory = nullptr;
  int64_t line = 0, rows = 0;  // floats of a row; how many fit
  int64_t begin = 0, end = 0;  // rows that are there, counted through all images

  // Where the map would begin.
  float* map() const { return memory - begin * line; }

  // Make room for rows up to a last one, and let go of those before a first one.
  void move(int64_t first, int64_t last) {
    if (first >= end) {
      begin = end = first;
    } else if (last - begin > rows) {
      memmove(memory, memory + (first - begin) * line, (end - first) * line * sizeof(float));
      begin = first;
    }
  }
};

// Rows [begin, end) of a map, counted through all images.
struct Rows {
  int64_t begin, end;
};

// Calls that write one map: convolutions, or a pool.
struct Stage {
  const pag_convolution* calls[PAG_MOST_TOGETHER];
  int64_t counts[PAG_MOST_TOGETHER];  // of their pixels
  int64_t number = 0, touched = 0;    // of calls; of pixels
  const pag_pool* pool = nullptr;
  int64_t batch, height, width, stride;  // of the map, and floats from a pixel to the next
  const float* out;
  int64_t in_height, step, above, below;  // a row reads from `step` times its number - above to + below

  // What is read for some rows of one image.
  Rows read(Rows rows) const {
    const int64_t image = rows.begin / height, top = image * in_height;
    const int64_t first = (rows.begin - image * height) * step - above;
    const int64_t last = (rows.end - 1 - image * height) * step + below + 1;
    return {top + std::clamp<int64_t>(first, 0, in_height), top + std::clamp<int64_t>(last, 0, in_height)};
  }

  int64_t most_read(int64_t rows) const { return (rows - 1) * step + above + below + 1; }
};

// Whether a convolution can be done row by row: weights are read anew for each few rows.
bool can_band(const pag_convolution& call, int64_t count) {
  const int64_t weights = (int64_t)matrices(call) * call.out_channels * call.channels / call.groups;
  bool plain = true;
  for (int s = 0; s < call.source_count; s++) plain &= call.list.pixels || !call.sources[s].shift;
  return plain && 2 * (int64_t)sizeof(float) * weights <= weights_budget() &&
         !(call.residual && call.residual_shift) && !call.scale && !call.input_scale &&
         !call.activate_if_all && call.compressed != PAG_WHOLE_NUMBERS && count >= 0 &&
         is_ascending(call.list, count);
}

bool add_to_stage(const pag_convolution& call, Stage& stage) {
  const int64_t all = (int64_t)call.batch * call.out_height * call.out_width;
  const int64_t count = check_list(call.list, all);
  if (!can_band(call, count)) return false;
  const int64_t below = (call.kernel[0] - 1) * call.dilation[0] - call.padding[0];
  if (!stage.number) {
    stage.batch = call.batch;
    stage.height = call.out_height;
    stage.width = call.out_width;
    stage.stride = call.out_stride;
    stage.out = call.out;
    stage.in_height = call.height;
    stage.step = call.stride[0];
    stage.above = call.padding[0];
    stage.below = below;
  }
  const bool alike = stage.batch == call.batch && stage.height == call.out_height &&
                     stage.width == call.out_width && stage.stride == call.out_stride &&
                     stage.out == call.out && stage.in_height == call.height &&
                     stage.step == call.stride[0];
  stage.above = std::max<int64_t>(stage.above, call.padding[0]);
  stage.below = std::max<int64_t>(stage.below, below);
  stage.counts[stage.number] = count;
  stage.calls[stage.number++] = &call;
  stage.touched += count;
  return alike;
}

void add_pool(const pag_pool& pool, Stage& stage) {
  stage.pool = &pool;
  stage.batch = pool.batch;
  stage.height = pool.out_height;
  stage.in_height = pool.height;
  stage.step = pool.stride[0];
  stage.above = pool.padding[0];
  stage.below = (pool.kernel[0] - 1) * pool.dilation[0] - pool.padding[0];
}

bool reads_map(const Stage& map, int64_t height, int64_t width, const float* data, int64_t stride) {
  return data == map.out && stride == map.stride && height == map.height && width == map.width;
}

// Whether what a stage convolves or pools is what the one before writes.
bool reads_stage(const Stage& stage, const Stage& before) {
  if (stage.batch != before.batch) return false;
  if (const pag_pool* pool = stage.pool)
    return reads_map(before, pool->height, pool->width, pool->in, pool->in_stride);
  bool result = true;
  for (int64_t i = 0; i < stage.number; i++) {
    const pag_source& source = stage.calls[i]->sources[0];
    result &= stage.calls[i]->source_count == 1 && !source.shift &&
              reads_map(before, source.height, source.width, source.data, source.stride);
  }
  return result;
}

// False: the calls are others than announced, or cannot be done row by row.
bool find_stages(const pag_bands& bands, const pag_call* calls, Stage* stages) {
  if (bands.stages < 2 || bands.stages > PAG_MOST_STAGES) return false;
  for (int64_t s = 0; s < bands.stages; s++) {
    const int64_t number = bands.calls[s];
    if (number < 1 || number > PAG_MOST_TOGETHER) return false;
    if (calls->kind == PAG_POOL && number == 1 && s == bands.stages - 1) {
      add_pool(*static_cast<const pag_pool*>(calls->arguments), stages[s]);
    } else {
      for (int64_t i = 0; i < number; i++)
        if (calls[i].kind != PAG_CONVOLVE ||
            !add_to_stage(*static_cast<const pag_convolution*>(calls[i].arguments), stages[s]))
          return false;
    }
    if (s && !reads_stage(stages[s], stages[s - 1])) return false;
    calls += number;
  }
  return true;
}

// Rows of one image as an image of their own: all of their pixels are computed.
pag_convolution rows_alone(const pag_convolution& call, Rows rows) {
  pag_convolution part = call;
  const int64_t image = rows.begin / call.out_height;
  const int64_t first = (rows.begin - image * call.out_height) * call.stride[0] - call.padding[0];
  const int64_t from = std::clamp<int64_t>(first, 0, call.height);
  part.batch = 1;
  part.out_height = (int32_t)(rows.end - rows.begin);
  part.height = (int32_t)(call.height - from);
  part.padding[0] = (int32_t)(from - first);
  for (int s = 0; s < call.source_count; s++) {
    pag_source& source = part.sources[s];
    source.data += (image * source.height + from) * source.width * source.stride;
    source.height = part.height;
  }
  const int64_t pixel = rows.begin * call.out_width;
  part.out += pixel * call.out_stride;
  if (call.residual) part.residual += pixel * call.residual_stride;
  part.list.capacity = (rows.end - rows.begin) * call.out_width;
  return part;
}

// The pixels of a convolution that lie in some rows; of the map that it writes, and of the one it reads
// where that is a band, there is only where they would begin.
int convolve_rows(const pag_convolution& whole, int64_t count, Rows rows, const float* in, float* out) {
  pag_convolution call = whole;
  if (in) call.sources[0].data = in;
  if (call.residual == call.out) call.residual = out;
  call.out = out;
  const int32_t *first = call.list.pixels, *last = first + count;
  if (!first) {
    const pag_convolution part = rows_alone(call, rows);
    return count ? convolve(&part, 1, (int32_t)(rows.begin % call.out_height)) : PAG_OK;
  }
  const int32_t* from = std::lower_bound(first, last, rows.begin * call.out_width);
  const int32_t* to = std::lower_bound(from, last, rows.end * call.out_width);
  call.list = {from, nullptr, to - from};
  return to > from ? convolve(&call, 1) : PAG_OK;
}

int run_stage(const Stage& stage, Rows rows, const Band* before, float* out) {
  const float* in = before ? before->map() : nullptr;
  if (stage.pool) {
    pag_pool part = *stage.pool;
    part.in = in;
    kernels().pool(&part, rows.begin, rows.end);
    return PAG_OK;
  }
  for (int64_t i = 0; i < stage.number; i++)
    if (const int status = convolve_rows(*stage.calls[i], stage.counts[i], rows, in,
                                         out ? out : stage.calls[i]->out))
      return status;
  return PAG_OK;
}

// Floats of all bands, for so many rows of the last stage at once; and how many rows each has.
int64_t size_bands(const Stage* stages, int64_t number, int64_t rows, Band* bands) {
  int64_t floats = 0;
  for (int64_t s = number - 2; s >= 0; s--) {
    rows = stages[s + 1].most_read(rows);
    bands[s].line = stages[s].width * stages[s].stride;
    bands[s].rows = rows;
    floats += rows * bands[s].line;
  }
  return floats;
}

// Rows of the last stage at once: as many as leave their bands in half of a core's cache; 0 if those
// of a single one do not fit into all of it.
int64_t rows_at_once(const Stage* stages, int64_t number, Band* bands) {
  const int64_t half = weights_budget() / (int64_t)sizeof(float);
  if (size_bands(stages, number, 1, bands) > 2 * half) return 0;
  int64_t rows = 1;
  while (rows < stages[number - 1].height && size_bands(stages, number, rows + 1, bands) <= half) rows++;
  return rows;
}

// Rows of what the last stage writes.
int run_rows(const Stage* stages, int64_t number, int64_t at_once, Rows all) {
  Band bands[PAG_MOST_STAGES];
  const int64_t floats = size_bands(stages, number, at_once, bands), last = number - 1;
  float* memory =
      reinterpret_cast<float*>(thread_band.at_least(whole_lines(floats * (int64_t)sizeof(float))));
  if (!memory) return PAG_NO_MEMORY;
  for (int64_t s = 0; s < last; s++) {
    bands[s].memory = memory;
    memory += bands[s].rows * bands[s].line;
  }
  while (all.begin < all.end) {
    const int64_t height = stages[last].height, image = all.begin / height;
    Rows rows[PAG_MOST_STAGES];  // to be computed
    rows[last] = {all.begin, std::min({all.begin + at_once, all.end, (image + 1) * height})};
    for (int64_t s = last - 1; s >= 0; s--) {
      const Rows above = rows[s + 1];
      const Rows read = above.begin < above.end ? stages[s + 1].read(above) : Rows{0, 0};
      if (read.begin < read.end) bands[s].move(read.begin, read.end);
      rows[s] = {bands[s].end, std::max(bands[s].end, read.end)};
    }
    for (int64_t s = 0; s < number; s++) {
      if (rows[s].begin == rows[s].end) continue;
      const Band* before = s ? &bands[s - 1] : nullptr;
      if (const int status = run_stage(stages[s], rows[s], before, s < last ? bands[s].map() : nullptr))
        return status;
      bands[s].end = rows[s].end;
    }
    all.begin = rows[last].end;
  }
  return PAG_OK;
}

// Whether a map lies in other memory than what the last stage writes; or is the same map, of which
// pixels are read, row by row, no later than they are overwritten.
bool is_safe(const Stage& last, int64_t height, int64_t width, const float* data, int64_t stride,
             bool row_by_row) {
  const float* end = last.out + last.batch * last.height * last.width * last.stride;
  if (data >= end || data + last.batch * height * width * stride <= last.out) return true;
  return row_by_row && reads_map(last, height, width, data, stride);
}

// Whether the last stage overwrites what others read before all of them have.
bool overwrites_input(const Stage* stages, int64_t number, int threads) {
  const Stage &first = stages[0], &last = stages[number - 1];
  if (last.pool) return false;
  const bool pointwise = first.step == 1 && !first.above && !first.below;
  bool safe = true;
  for (int64_t i = 0; i < first.number; i++)
    for (int s = 0; s < first.calls[i]->source_count; s++) {
      const pag_source& source = first.calls[i]->sources[s];
      safe &= is_safe(last, source.height, source.width, source.data, source.stride,
                      threads == 1 && pointwise);
    }
  for (int64_t s = 0; s + 1 < number; s++)
    for (int64_t i = 0; i < stages[s].number; i++)
      if (const float* residual = stages[s].calls[i]->residual)
        safe &= is_safe(last, stages[s].height, stages[s].width, residual,
                        stages[s].calls[i]->residual_stride, threads == 1);
  return !safe;
}

int64_t work_of(const Stage* stages, int64_t number) {
  int64_t work = 0;
  for (int64_t s = 0; s < number; s++)
    for (int64_t i = 0; i < stages[s].number; i++) {
      const pag_convolution& call = *stages[s].calls[i];
      const int64_t taps = call.kernel[0] * call.kernel[1];
      work += stages[s].counts[i] * call.out_channels * (1 + taps * call.channels / call.groups / 8);
    }
  return work;
}

// Whether what the first call writes may outgrow the cache of a core, and so not stay there anyway.
bool may_be_large(const pag_call& first) {
  if (first.kind != PAG_CONVOLVE) return false;
  const auto& call = *static_cast<const pag_convolution*>(first.arguments);
  const int64_t pixels = (int64_t)call.batch * call.out_height * call.out_width;
  return pixels * call.out_stride * (int64_t)sizeof(float) > 2 * weights_budget();
}

// The calls of all stages, a few rows at a time; or -1: they have to be done one after the other.
int run_in_bands(const pag_bands& announced, const pag_call* calls, int threads) {
  Stage stages[PAG_MOST_STAGES];
  if (!may_be_large(*calls) || !find_stages(announced, calls, stages)) return -1;
  int64_t number = announced.stages, largest = 0;
  const Stage* alone = nullptr;
  if (overwrites_input(stages, number, threads)) alone = &stages[--number];
  for (int64_t s = 0; s + 1 < number; s++)
    largest = std::max<int64_t>(largest, stages[s].touched * stages[s].stride * sizeof(float));
  Band bands[PAG_MOST_STAGES];
  const int64_t at_once = number > 1 ? rows_at_once(stages, number, bands) : 0;
  if (!at_once || largest <= 2 * weights_budget()) return -1;
  const int64_t all = stages[number - 1].batch * stages[number - 1].height;
  threads = worthwhile(threads, work_of(stages, number));
  const int64_t parts = std::min<int64_t>(all, threads == 1 ? 1 : 2 * threads);
  std::atomic<int> status{PAG_OK};
  share(parts, threads, [&](int64_t i) {
    const int failed = run_rows(stages, number, at_once, {all * i / parts, all * (i + 1) / parts});
    if (failed) status.store(failed);
  });
  for (int64_t i = 0; alone && i < alone->number && status.load() == PAG_OK; i++)
    status.store(convolve(alone->calls[i], threads));
  return status.load();
}

int resize(const pag_resizing* call, int threads) {
  const pag_kernels& table = kernels();
  const int64_t rows = (int64_t)call->batch * call->out_height;
  const int64_t operations = rows * call->out_width * call->channels * call->taps[0] * call->taps[1];
  const int64_t chunks = std::min<int64_t>(rows, worthwhile(threads, operations));
  share(chunks, (int)chunks, [&](int64_t i) {
    table.resize(call, rows * i / chunks, rows * (i + 1) / chunks);
  });
  return PAG_OK;
}

// From sums over channels to a factor and a summand of each.
void combine_groups(const pag_grouping& call, int32_t image, const double* sums,
                    const double* squares, float* scales, float* shifts) {
  const int32_t size = call.channels / call.groups;
  const float* first = call.in + (int64_t)image * call.pixels * call.in_stride;
  const double pixels = call.pixels;
  for (int32_t begin = 0; begin < call.channels; begin += size) {
    double mean = 0, squared = 0;
    for (int32_t c = begin; c < begin + size; c++) mean += (first[c] + sums[c] / pixels) / size;
    for (int32_t c = begin; c < begin + size; c++) {
      const double off = first[c] + sums[c] / pixels - mean;
      squared += squares[c] / pixels - sums[c] / pixels * (sums[c] / pixels) + off * off;
    }
    const double scale = 1 / std::sqrt(std::max(squared / size, 0.0) + call.epsilon);
    for (int32_t c = begin; c < begin + size; c++) {
      const double factor = call.weight ? scale * call.weight[c] : scale;
      scales[c] = (float)factor;
      shifts[c] = (float)((call.bias ? call.bias[c] : 0) - mean * factor);
    }
  }
}

int group_norm(const pag_grouping* call, int threads) {
  constexpr int32_t CHANNELS = 64;  // of one share
  const pag_kernels& table = kernels();
  const int32_t channels = call->channels;
  double* sums = reinterpret_cast<double*>(
      thread_tiles.at_least(whole_lines(2 * channels * (sizeof(double) + sizeof(float)))));
  if (!sums) return PAG_NO_MEMORY;
  double* squares = sums + channels;
  float *scales = reinterpret_cast<float*>(squares + channels), *shifts = scales + channels;
  const int64_t pixels = call->pixels, parts = (channels + CHANNELS - 1) / CHANNELS;
  const int64_t chunks = std::min<int64_t>(pixels, worthwhile(threads, pixels * channels));
  for (int32_t image = 0; image < call->batch; image++) {
    share(parts, (int)chunks, [&](int64_t i) {
      const int32_t begin = (int32_t)i * CHANNELS;
      table.moments(call, image, begin, std::min(begin + CHANNELS, channels), sums, squares);
    });
    combine_groups(*call, image, sums, squares, scales, shifts);
    share(chunks, (int)chunks, [&](int64_t i) {
      table.rescale(call, image, scales, shifts, pixels * i / chunks, pixels * (i + 1) / chunks);
    });
  }
  return PAG_OK;
}

int list_pixels(const pag_listing* call, int) {
  kernels().list_pixels(call);
  return PAG_OK;
}

// The open pixels of a row as far apart as their windows, so that each tap adds them side by side.
const uint8_t* spread(const uint8_t* open, int64_t count, int64_t stride, uint8_t* room) {
  if (stride == 1) return open;
  memset(room, 0, count * stride);
  for (int64_t x = 0; x < count; x++) room[x * stride] = open[x];
  return room;
}

bool any_open(const uint8_t* open, int64_t count) {
  uint8_t found = 0;
  for (int64_t x = 0; x < count; x++) found |= open[x];
  return found;
}

int read_pixels(const pag_reading* call, int) {
  const int shift = call->shift;
  const int64_t height = (int64_t)call->height << shift, width = (int64_t)call->width << shift;
  const int64_t out_width = call->out_width, reach = out_width * call->stride[1];
  uint8_t* room = reinterpret_cast<uint8_t*>(thread_scratch.at_least(whole_lines(reach + 1)));
  if (!room) return PAG_NO_MEMORY;
  memset(call->needed, 0, (int64_t)call->batch * call->height * call->width);
  for (int64_t row = 0; row < (int64_t)call->batch * call->out_height; row++) {
    const int64_t image = row / call->out_height;
    const int64_t top = row % call->out_height * call->stride[0] - call->padding[0];
    const uint8_t* open = call->mask + row * out_width;
    if (!any_open(open, out_width)) continue;
    const uint8_t* apart = spread(open, out_width, call->stride[1], room);
    for (int64_t ky = 0; ky < call->kernel[0]; ky++) {
      const int64_t y = top + ky * call->dilation[0];
      if (y < 0 || y >= height) continue;
      uint8_t* line = call->needed + (image * call->height + (y >> shift)) * call->width;
      for (int64_t kx = 0; kx < call->kernel[1]; kx++) {
        const int64_t left = kx * call->dilation[1] - call->padding[1];
        const int64_t begin = std::max<int64_t>(-left, 0), end = std::min(reach, width - left);
        if (shift)
          for (int64_t x = begin; x < end; x++) line[(left + x) >> shift] |= apart[x];
        else
          for (int64_t x = begin; x < end; x++) line[left + x] |= apart[x];
      }
    }
  }
  return PAG_OK;
}

template <class Operation>
void combine_all(const pag_combination* call, Operation operation) {
  const int64_t pixels = call->pixels;
  const uint8_t *first = call->first, *second = call->second;
  uint8_t* result = call->result;  // may be one of them
  for (int64_t i = 0; i < pixels; i++) result[i] = operation(first[i], second[i]);
}

int combine(const pag_combination* call, int) {
  switch (call->operation) {
    case PAG_AND: combine_all(call, [](uint8_t a, uint8_t b) -> uint8_t { return a & b; }); break;
    case PAG_OR: combine_all(call, [](uint8_t a, uint8_t b) -> uint8_t { return a | b; }); break;
    default: combine_all(call, [](uint8_t a, uint8_t) -> uint8_t { return a ^ 1; });
  }
  return PAG_OK;
}

int copy(const pag_copy* call, int threads) {
  const int64_t chunks = worthwhile(threads, call->rows * call->bytes / sizeof(float));
  const int64_t parts = call->rows > 1 ? 1 : chunks;  // of each row
  share(chunks, (int)chunks, [&](int64_t i) {
    const int64_t part = i % parts, shares = chunks / parts;
    const int64_t begin = call->bytes * part / parts, end = call->bytes * (part + 1) / parts;
    for (int64_t row = call->rows * (i / parts) / shares; row < call->rows * (i / parts + 1) / shares; row++) {
      char* to = static_cast<char*>(call->to) + row * call->to_step + begin;
      if (call->from)
        memcpy(to, static_cast<const char*>(call->from) + row * call->from_step + begin, end - begin);
      else
        memset(to, 0, end - begin);
    }
  });
  return PAG_OK;
}

int nothing(const pag_bands*, int) { return PAG_OK; }

// Each kind of call, its structure and the function that takes it.
#define PAG_EACH_KIND(DO)                          \
  DO(PAG_CONVOLVE, pag_convolution, convolve)      \
  DO(PAG_LAYER_NORM, pag_rows, layer_norm)         \
  DO(PAG_MEAN, pag_rows, mean)                     \
  DO(PAG_INTERPOLATE, pag_map, interpolate)        \
  DO(PAG_DECIDE, pag_gate, decide)                 \
  DO(PAG_LIST, pag_listing, list_pixels)           \
  DO(PAG_READ, pag_reading, read_pixels)           \
  DO(PAG_COMBINE, pag_combination, combine)        \
  DO(PAG_COPY, pag_copy, copy)                     \
  DO(PAG_POOL, pag_pool, pool)                     \
  DO(PAG_ACTIVATE, pag_map, activate)              \
  DO(PAG_RESIZE, pag_resizing, resize)             \
  DO(PAG_GROUP_NORM, pag_grouping, group_norm)     \
  DO(PAG_IN_BANDS, pag_bands, nothing)

int run(const pag_call& call, int threads) {
#define PAG_RUN(KIND, STRUCTURE, FUNCTION) \
  case KIND: return FUNCTION(static_cast<const STRUCTURE*>(call.arguments), threads);
  switch (call.kind) { PAG_EACH_KIND(PAG_RUN) }
#undef PAG_RUN
  return PAG_OK;
}

}  // namespace

int64_t pag_argument_bytes(int kind) {
#define PAG_BYTES(KIND, STRUCTURE, FUNCTION) \
  case KIND: return sizeof(STRUCTURE);
  switch (kind) { PAG_EACH_KIND(PAG_BYTES) }
#undef PAG_BYTES
  return 0;
}

int pag_expands(void) { return kernels().expands(); }

int pag_multiplies_digits(void) { return kernels().digits != nullptr; }

const char* pag_instruction_set(void) { return kernels().name; }

int pag_use_instruction_set(const char* name) {
  const pag_kernels* table = supported(name);
  if (table) chosen.store(table, std::memory_order_relaxed);
  return table != nullptr;
}

void pag_use_openmp(void* gomp_parallel) { openmp.store(reinterpret_cast<Gomp>(gomp_parallel)); }

int pag_run(const pag_call* calls, int64_t count, int threads) {
  team = threads;
  for (int64_t i = 0; i < count; i++) {
    if (calls[i].kind == PAG_IN_BANDS) {
      const pag_bands& bands = *static_cast<const pag_bands*>(calls[i].arguments);
      int64_t number = 0;
      for (int64_t s = 0; s < std::min<int64_t>(bands.stages, PAG_MOST_STAGES); s++)
        number += bands.calls[s];
      const int status = i + number < count ? run_in_bands(bands, calls + i + 1, threads) : -1;
      if (status > PAG_OK) return status;
      if (status == PAG_OK) i += number;
    } else if (const int status = run(calls[i], threads)) {
      return status;
    }
  }
  return PAG_OK;
}

void pag_use_large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  static const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  const uintptr_t at = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}
