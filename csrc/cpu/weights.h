// A weight matrix as the steps of a sequence want it: cut in blocks of columns of the product, packed into panels where
// that pays, and multiplied block by block.
#pragma once
#include "../arena.h"
#include "../params.h"
#include "product.h"
#include "team.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

FUSEDRNN_INLINE int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Rows of a state are this far apart: whole vectors, and never a power of two, which would put all rows into the same
// few sets of the first-level cache.
template <class F>
FUSEDRNN_INLINE int64_t padded_row(int64_t count, int64_t block) {
  return blocks_of(count, block) * block + int64_t(kCacheLine / sizeof(F));
}

// w (kGates * units, depth) row-major: the product is a w^T. A block holds the same kUnitVectors vectors of units of every
// gate, gate after gate, so that whoever has the sums of a block has all gates of its units.
template <class F, class S, int kGates>
struct RowWeights {
  static constexpr int kLanes = Vec<F>::kLanes;
  static constexpr int kUnitVectors = kGates % kPanelVectors == 0 ? 1 : kPanelVectors;  // to make whole panels
  static constexpr int kUnits = kUnitVectors * kLanes, kWidth = kGates * kUnits;
  static constexpr int kPanels = kGates * kUnitVectors / kPanelVectors;
  const S* w;
  int64_t units, depth, gate_rows;  // gate_rows: of w from gate to gate, where there are other heads' between
  F* panels;  // (blocks, block_size()) as multiply_panels reads them, null: never packed

  // Of the head n behind this one.
  RowWeights head(int64_t n) const {
    return {w + n * units * depth, units, depth, gate_rows, panels ? panels + n * blocks() * block_size() : nullptr};
  }

  int64_t blocks() const { return blocks_of(units, kUnits); }
  int64_t block_size() const { return depth * kWidth; }
  bool far() const { return blocks() * block_size() * int64_t(sizeof(F)) > kNearBytes; }
  int64_t valid(int64_t block) const { return units - block * kUnits < kUnits ? units - block * kUnits : kUnits; }

  void pack(int64_t block) const {
    constexpr int kPanelWidth = kPanelVectors * kLanes;
    F* packed = panels + block * block_size();
    const int64_t count = valid(block);
    constexpr int64_t kStrip = 128;  // k at a time, so that the lines written to stay in cache
    static_assert(kTileDepth % kStrip == 0 && kStrip % kLanes == 0, "a strip lies within a pass");
    for (int64_t k = 0; k < depth; k += kStrip) {
      const int64_t end = k + kStrip < depth ? k + kStrip : depth;
      const int64_t pass_begin = k / kTileDepth * kTileDepth;
      const int64_t pass = depth - pass_begin < kTileDepth ? depth - pass_begin : kTileDepth;
      for (int64_t g = 0; g < kGates; ++g)
        for (int64_t u = 0; u < kUnits; u += kLanes) {
          const int64_t at = g * kUnits + u, panel = at / kPanelWidth;
          F* columns = packed + (pass_begin * kPanels + panel * pass - pass_begin) * kPanelWidth + at % kPanelWidth;
          const S* rows = w + (g * gate_rows + block * kUnits + u) * depth;
          for (int64_t i = k; i < end; i += kLanes)
            pack_square(columns + i * kPanelWidth, kPanelWidth, rows + i, count - u, lanes_left<F>(i, end));
        }
    }
  }

  // kLanes rows from `rows` on, `count` of them real, and of each `n` values, become columns.
  FUSEDRNN_INLINE void pack_square(F* columns, int64_t width, const S* rows, int64_t count, int n) const {
    Vec<F> square[kLanes];
#pragma GCC unroll 16
    for (int u = 0; u < kLanes; ++u) square[u] = u < count ? load(rows + u * depth, n) : Vec<F>(F(0));
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (i < n) store(columns + i * width, square[i]);
  }

  // sums (rows, kWidth) += a (rows, depth) times the block.
  void multiply(int64_t block, const F* a, int64_t a_row, int64_t rows, F* sums) const {
    if (panels) {
      multiply_panels<F, kPanels>(a, a_row, rows, panels + block * block_size(), far(), depth, sums);
      return;
    }
    for (int64_t g = 0; g < kGates; ++g)
      multiply_dots<F, S>(a, a_row, rows, w + (g * gate_rows + block * kUnits) * depth, depth, valid(block), depth,
                          sums + g * kUnits, kWidth);
  }
};

// w (depth, columns) row-major: the product is a w.
template <class F, class S>
struct ColumnWeights {
  static constexpr int kWidth = kPanelVectors * Vec<F>::kLanes, kUnits = kWidth;
  const S* w;
  int64_t columns, depth;
  int64_t run, run_rows;  // so many rows of w follow each other, and so many are from one of these runs to the next
  F* panels;    // (blocks, depth, panel), null: packed into scratch at each use
  F* scratch;   // (depth, kWidth), the calling thread's own

  // Of the head n behind this one.
  ColumnWeights head(int64_t n) const {
    F* const own = panels ? panels + n * blocks() * block_size() : nullptr;
    return {w + n * run * columns, columns, depth, run, run_rows, own, scratch};
  }

  int64_t blocks() const { return blocks_of(columns, kWidth); }
  int64_t block_size() const { return depth * kWidth; }
  bool far() const { return blocks() * block_size() * int64_t(sizeof(F)) > kNearBytes; }

  void pack(int64_t block) const { pack_into(block, panels + block * block_size()); }

  void multiply(int64_t block, const F* a, int64_t a_row, int64_t rows, F* sums) const {
    if (!panels) pack_into(block, scratch);
    if (panels)
      multiply_panels<F, 1>(a, a_row, rows, panels + block * block_size(), far(), depth, sums);
    else
      multiply_panels<F, 1>(a, a_row, rows, scratch, false, depth, sums);
  }

 private:
  void pack_into(int64_t block, F* panel) const {
    constexpr int kLanes = Vec<F>::kLanes;
    const S* rows = w;
    for (int64_t first = 0; first < depth; first += run, rows += run_rows * columns)
      for (int64_t k = 0; k < run; ++k)
        for (int v = 0; v < kPanelVectors; ++v) {
          const int64_t u = block * kWidth + v * kLanes;
          store(panel + (first + k) * kWidth + v * kLanes, load(rows + k * columns + u, lanes_left<F>(u, columns)));
        }
  }
};

// A row of a state of `width` values: `count` from place `at` of `from` on, and zeros behind them; all zeros where from is null.
template <class F, class S>
FUSEDRNN_INLINE void load_row(F* to, int64_t width, const S* from, int64_t at, int64_t count) {
  constexpr int kLanes = Vec<F>::kLanes;
  for (int64_t u = 0; u < width; u += kLanes)
    store(to + u, from && u < count ? load(from + at + u, lanes_left<F>(u, count)) : Vec<F>(F(0)),
          lanes_left<F>(u, width));
}

// The numbers from u on of a row of states that the caller gave, n of them real; null: zeros.
template <class F, class S>
FUSEDRNN_INLINE Vec<F> load_given(const void* states, int64_t width, int64_t u, int n, int64_t row) {
  return states ? load(static_cast<const S*>(states) + row * width + u, n) : Vec<F>(F(0));
}

// Which rows of the batch a team has: every slices-th one, so that sequences sorted by length are spread evenly.
struct TeamRows {
  int64_t strand, slice, slices;
  int64_t count(int64_t batch) const { return batch > slice ? (batch - slice + slices - 1) / slices : 0; }
  int64_t batch_row(int64_t r) const { return slice + r * slices; }
};

// visit(first row, Constant<rows>) over [0, count), two rows at a time (see Rows) and the odd one alone.
template <class Visit>
FUSEDRNN_INLINE void for_rows(int64_t count, const Visit& visit) {
  int64_t m = 0;
  for (; m + 2 <= count; m += 2) visit(m, Constant<2>{});
  if (m < count) visit(m, Constant<1>{});
}

// At most so many rows of the batch per visit to a block: their sums stay in the first-level cache. Visits share the rows evenly, since
// a product of few rows is slower: 50 as 25 and 25 took 0.88 of the time of 48 and 2.
constexpr int64_t kSumRows = 48;

// visit(Range) over blocks in groups, whose products are taken before the first of their cells: of few rows, the cells of one block
// are too few to keep a processor busy while it waits for the last sums, and for the chain of operations of one cell.
template <class Visit>
FUSEDRNN_INLINE void for_groups(const Range& blocks, int64_t rows, bool back, const Visit& visit) {
  const int64_t size = rows > 0 && rows < kSumRows ? kSumRows / rows : 1, count = blocks.end - blocks.begin;
  there_or_back({0, blocks_of(count, size)}, back, [&](int64_t i) __attribute__((always_inline)) {
    const int64_t first = blocks.begin + i * size;
    visit(Range{first, first + size < blocks.end ? first + size : blocks.end});
  });
}

// What is common to the passes: the threads of a call and where they meet. Pass is one of ForwardPass, BackwardPass; it
// gives division(threads), prepare(thread's rows, barrier) and run(...).
struct Crew {
  Barrier::Count* counts;  // (2, threads) each thread's count at its team's barrier, then at its strand's
  int threads;

  Crew(Arena& arena, int threads) : counts(arena.take<Barrier::Count>(2 * threads)), threads(threads) {
    if (arena.base)
      for (int i = 0; i < 2 * threads; ++i) counts[i].reached = 0;
  }

  // Calls member(rows, thread, place in the team, team's barrier, place in the strand, strand's barrier) on every thread
  // for every team that it serves: one, unless there are fewer threads than strands.
  template <class Divide, class Member>
  void run(const Divide& divide, const Member& member) const {
    const int useful = divide(threads).threads();
    run_team(useful < threads ? useful : threads, [&](int thread, int granted) {
      const Division division = divide(granted);
      const int members = division.members, per_strand = division.slices * members;
      const int stride = granted < division.threads() ? granted : division.threads();
      for (int place = thread; thread < stride && place < division.threads(); place += stride) {
        const int team = place / members, strand = place / per_strand;
        member(TeamRows{strand, team % division.slices, division.slices}, thread, place % members,
               Barrier{counts + team * members, members}, place % per_strand,
               Barrier{counts + threads + strand * per_strand, per_strand});
      }
    });
  }
};

// What a unit of a cell without a product takes, in multiply-adds.
constexpr int64_t kCellWork = 16;

// What a cell is given of n units from u on in direction d, in some rows at once.
template <class Cell, class S, class F, int kRows>
FUSEDRNN_INLINE Given<Rows<F, kRows>, Cell::kUnit> given_to(const LayerParams& p, int64_t d, int64_t u, int n) {
  Given<Rows<F, kRows>, Cell::kUnit> given;
  if constexpr (Cell::kChooses) given.choice = p.choice;
  for (int k = 0; k < Cell::kUnit; ++k) {
    const Vec<F> number = p.unit[d] ? load(static_cast<const S*>(p.unit[d]) + k * p.H + u, n) : Vec<F>(F(0));
    for (int i = 0; i < kRows; ++i) given.unit[k].row[i] = number;
  }
  return given;
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
