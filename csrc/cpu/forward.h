// The forward pass of a layer: at every step, the recurrent product and the cell in one go, block of units by block. Behind a
// barrier come, of a cell with projections or a late gate, a second product, and of one that normalises its products, the cells, row
// by row.
#pragma once
#include "../params.h"
#include "norm.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

template <class Cell, class F, class S>
struct ForwardPass {
  using V = Vec<F>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kFirst = Cell::kGates - Cell::kLate;  // gates of the first product
  using Recurrent = RowWeights<F, S, kFirst>;
  using Second = RowWeights<F, S, 1>;
  static constexpr int kUnitVectors = Recurrent::kUnitVectors;
  static constexpr int kWidest = Recurrent::kWidth > Second::kWidth ? Recurrent::kWidth : Second::kWidth;
  static constexpr bool kKeeps = Cell::kNorms || Cell::kLate;  // its sums wait for others, which are in other blocks
  static constexpr int kInner = Cell::kStates - 1;  // states that stay with their unit
  static constexpr int kMade = 1 + Cell::kSaved;    // numbers of a unit that wait for the norm of its state 1: that, and what is saved
  // A call with so few rows of states altogether takes dot products on the weights where they are: packing costs about as much as a
  // few steps at batch 1. So does one of a single step, unless it has a row for each so many bytes of weights. Measured, of an LSTM:
  // panels are 1.2 to 2 times as fast from 16 rows on where H is up to 256, as fast from 48 on at 512, from 128 on at 1024.
  static constexpr int64_t kFewRows = 24, kLeastOfAStep = 16, kBytesOfARow = 64 << 10;
  // The product of the input is taken for all rows of a step, or, of small batches, for about so many of several steps: what comes of it
  // is still near when the cells want it, and its weights are not read at every step. Not of cells whose input goes through more
  // than a product.
  static constexpr bool kCanFeed = !Cell::kNorms && !Cell::kLate;
  static constexpr int64_t kFedRows = 64;

  const ForwardParams& p;
  const bool projected;
  const int64_t units, depth;  // of a strand
  const int64_t h_row, unit_row, kept_rows, sums_size;
  const bool feeds;              // whether the input's product is taken here
  const int64_t fed_steps, fed_row, fed_rows;  // steps at a time; numbers of a row of the input; rows of a strand in these steps
  Crew crew;
  Recurrent recurrent[kMaxDirections];  // of the first head
  Recurrent weight_ih[kMaxDirections];  // (kGates*H, I), of the first head
  Second second[kMaxDirections];  // weight_hr, or weight_hh of a late gate, of the first head
  F* bias[kMaxDirections];       // (N, blocks, kWidth) bias_hh in the order of the sums
  F* bias_ih[kMaxDirections];    // likewise
  F* h[2];                       // (strands, B, h_row) the hidden state before and after a step, by turns
  F* inner[slots(kInner)];       // (strands, B, unit_row)
  F* unmasked;                   // (strands, B, h_row) the hidden state, where h is multiplied by a mask
  F* between;                    // (strands, B, unit_row) what is multiplied second: state 0 before its projection, or the cell's middle
  F* kept;                       // (strands, blocks, kept_rows, kWidth) sums of a cell that keeps them, each team's rows side by side
  F* sums;                       // (threads, sums_size)
  F* fed_gates;                  // (strands, blocks, fed_rows, kWidth) as kept, what comes of the input in fed_steps steps
  F* fed_input;                  // (threads, kFedRows, fed_row) rows that are multiplied now
  int64_t* fed_at;               // (threads, fed_steps) where a step's rows begin among those of fed_steps

  ForwardPass(const ForwardParams& p, Arena& arena)
      : p(p), projected(can_project<Cell> && p.weight_hr[0]), units(p.units()), depth(p.depth()),
        h_row(padded_row<F>(depth, 2 * kLanes)), unit_row(padded_row<F>(units, 2 * kLanes)),
        kept_rows(kKeeps ? p.steps.B + p.threads : 0),
        sums_size(Cell::kNorms == 2 && kMade * unit_row > kSumRows * kWidest ? kMade * unit_row : kSumRows * kWidest),
        feeds(kCanFeed && p.weight_ih[0]), fed_steps(feeds ? steps_to_feed(p.steps) : 0), fed_row(feeds ? padded_row<F>(p.I, kLanes) : 0),
        fed_rows(fed_steps * (p.steps.B + (p.threads < p.steps.B ? p.threads : p.steps.B))), crew(arena, p.threads) {
    const int64_t rows = p.steps.row_count();
    auto pays = [&](int64_t numbers) {  // to pack so many
      return p.steps.T > 1 ? rows > kFewRows : rows >= kLeastOfAStep && rows >= numbers * int64_t(sizeof(F)) / kBytesOfARow;
    };
    const bool packs = Cell::kMultiplies && (p.steps.T > 1 || p.hx || p.reset_hx) && pays(Cell::kGates * units * depth);
    const bool packs_input = feeds && pays(Cell::kGates * units * p.I);
    for (int64_t d = 0; d < p.D; ++d) {
      recurrent[d] = {static_cast<const S*>(p.weight_hh[d]), units, depth, p.H, nullptr};
      second[d] = {static_cast<const S*>(p.weight_hr[d]), projected ? p.P : 0, p.H, p.P, nullptr};
      if (Cell::kLate) second[d] = {static_cast<const S*>(p.weight_hh[d]) + kFirst * p.H * depth, units, depth, p.H, nullptr};
      if (packs) {
        recurrent[d].panels = arena.take<F>(p.N * recurrent[d].blocks() * recurrent[d].block_size());
        second[d].panels = arena.take<F>(p.N * second[d].blocks() * second[d].block_size());
      }
      bias[d] = arena.take<F>(p.N * recurrent[d].blocks() * Recurrent::kWidth);
      weight_ih[d] = {static_cast<const S*>(p.weight_ih[d]), units, p.I, p.H, nullptr};
      if (packs_input) weight_ih[d].panels = arena.take<F>(p.N * weight_ih[d].blocks() * weight_ih[d].block_size());
      bias_ih[d] = arena.take<F>(feeds ? p.N * recurrent[d].blocks() * Recurrent::kWidth : 0);
    }
    const int64_t state_rows = p.strands() * p.steps.B;
    h[0] = arena.take<F>(state_rows * h_row);
    h[1] = arena.take<F>(state_rows * h_row);
    for (int k = 0; k < kInner; ++k) inner[k] = arena.take<F>(state_rows * unit_row);
    unmasked = arena.take<F>(p.hidden_mask ? state_rows * h_row : 0);
    between = arena.take<F>(projected || Cell::kLate ? state_rows * unit_row : 0);
    kept = arena.take<F>(p.strands() * recurrent[0].blocks() * kept_rows * Recurrent::kWidth);
    sums = arena.take<F>(p.threads * sums_size);
    const int useful = divide_among(p.threads).threads(), threads = useful < p.threads ? useful : p.threads;
    fed_gates = arena.take<F>(p.strands() * recurrent[0].blocks() * fed_rows * Recurrent::kWidth);
    fed_input = arena.take<F>(threads * kFedRows * fed_row);
    fed_at = arena.take<int64_t>(threads * fed_steps);
  }

  static int64_t steps_to_feed(const Steps& steps) {
    const int64_t most = steps.B < kFedRows ? kFedRows / steps.B : 1;
    return most < steps.T ? most : steps.T;
  }

  Division divide_among(int threads) const {
    const int64_t products = Cell::kMultiplies ? depth * Cell::kGates * units + (projected ? p.P * p.H : 0) : kCellWork * p.H;
    const int64_t of_input = feeds ? p.I * Cell::kGates * units : 0;
    return divide(threads, p.strands(), p.steps.B, recurrent[0].blocks(), products * int64_t(sizeof(F)),
                  2 * p.steps.B * (products + of_input));
  }

  void run() const {
    crew.run([this](int threads) { return divide_among(threads); },
             [this](TeamRows rows, int thread, int member, Barrier team, int place, Barrier strand) {
               prepare(rows, member, team.members, place, strand);
               strand.wait(place);
               Member{*this, rows, thread, member, team}.run();
             });
  }

  // Initial states of the team's rows; weights and biases of the strand's blocks.
  void prepare(const TeamRows& rows, int member, int members, int place, const Barrier& strand) const {
    const int64_t d = rows.strand / p.N, head = rows.strand % p.N, first = head * units;
    const Range mine = share(rows.count(p.steps.B), members, member);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t row = rows.strand * p.steps.B + rows.batch_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      const int64_t h_at = given * p.P + first;
      const bool anew = p.steps.begins(d ? p.steps.T - 1 : 0, rows.batch_row(r), d);
      const auto *hx = static_cast<const S*>(anew ? p.reset_hx : p.hx), *cx = static_cast<const S*>(anew ? p.reset_cx : p.cx);
      for (F* to : {h[0], h[1]}) load_row(to + row * h_row, h_row, hx, h_at, depth);
      for (int k = 0; k < kInner; ++k)
        load_row(inner[k] + row * unit_row, unit_row, cx, (k * p.D * p.steps.B + given) * p.H + first, units);
      if (p.hidden_mask) {
        load_row(unmasked + row * h_row, h_row, hx, h_at, depth);
        for (F* to : {h[0], h[1]})
          for (int64_t u = 0; u < depth; u += kLanes)
            store(to + row * h_row + u, load(to + row * h_row + u) * hidden_mask(given, first + u, lanes_left<F>(u, depth)));
      }
      if (projected || Cell::kLate) load_row(between + row * unit_row, unit_row, static_cast<const S*>(nullptr), 0, units);
    }
    auto lay_out = [&](const Recurrent& weights, F* biases, const void* bias) {
      const Range blocks = share(weights.blocks(), strand.members, place);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        if (weights.panels) weights.pack(block);
        for (int g = 0; g < kFirst; ++g)
          for (int v = 0; v < kUnitVectors; ++v) {
            const int64_t u = block * Recurrent::kUnits + v * kLanes;
            store(biases + (head * weights.blocks() + block) * Recurrent::kWidth + (g * kUnitVectors + v) * kLanes,
                  bias ? load(static_cast<const S*>(bias) + g * p.H + first + u, lanes_left<F>(u, units)) : V(F(0)));
          }
      }
    };
    lay_out(recurrent[d].head(head), bias[d], p.bias_hh[d]);
    if (feeds) lay_out(weight_ih[d].head(head), bias_ih[d], p.bias_ih[d]);
    if (second[d].panels) {
      const Range columns = share(second[d].blocks(), strand.members, place);
      for (int64_t block = columns.begin; block < columns.end; ++block) second[d].head(head).pack(block);
    }
  }

  FUSEDRNN_INLINE V hidden_mask(int64_t given_row, int64_t u, int n) const {
    return load(static_cast<const S*>(p.hidden_mask) + given_row * p.P + u, n);
  }

  // One thread's part of one team's sequence.
  struct Member {
    const ForwardPass& pass;
    const TeamRows rows;
    const int thread, member;
    const Barrier barrier;

    const ForwardParams& p = pass.p;
    F* const sums = pass.sums + thread * pass.sums_size;
    int64_t* const fed_at = pass.fed_at + thread * pass.fed_steps;
    mutable int64_t fed_now = 0;  // of this step
    const int64_t d = rows.strand / p.N, head = rows.strand % p.N;
    const int64_t units = pass.units, first = head * units;  // first: unit 0 of the strand, in tensors
    const Recurrent recurrent = pass.recurrent[d].head(head);
    const Second second = pass.second[d].head(head);
    const F* const biases = pass.bias[d] + head * recurrent.blocks() * Recurrent::kWidth;
    const Range blocks = share(recurrent.blocks(), barrier.members, member);
    const Range columns = share(second.blocks(), barrier.members, member);  // of the second product

    int64_t state_row(int64_t r) const { return rows.strand * p.steps.B + rows.batch_row(r); }

    void run() const {
      const int64_t T = p.steps.T;
      for (int64_t s = 0; s < T; ++s) {
        const int64_t t = d ? T - 1 - s : s, next = d ? t - 1 : t + 1;
        const int64_t count = rows.count(p.steps.rows(t));
        const int64_t staying = s + 1 < T ? rows.count(p.steps.rows(next)) : 0;
        const F* h = pass.h[s & 1];
        F* h_new = pass.h[(s + 1) & 1];
        const bool back = s & 1;
        if (kCanFeed && pass.feeds) {
          if (s % pass.fed_steps == 0) feed(s);
          fed_now = fed_at[s % pass.fed_steps];
        }
        for_groups(blocks, count, back,
                   [&](const Range& group) { step(group, back, t, count, s > 0 || p.hx || p.reset_hx, h, h_new); });
        if constexpr (can_project<Cell> || Cell::kLate) {
          if (pass.projected || Cell::kLate) {
            barrier.wait(member);  // for what all units have left between the products
            for (int64_t block = columns.begin; block < columns.end; ++block) multiply_second(block, t, count, h, h_new);
          }
        }
        Range last{staying, count};  // rows for which this step was the last
        if constexpr (Cell::kNorms > 0) {
          barrier.wait(member);  // for the sums of all units
          const Range mine = share(count, barrier.members, member);
          for (int64_t r = mine.begin; r < mine.end; ++r) normalise(t, r, h, h_new);
          last = {staying > mine.begin ? staying : mine.begin, mine.end};
        }
        for (int64_t r = last.begin; r < last.end; ++r) finish(r, h_new);
        barrier.wait(member);  // for the new hidden states of all units; the old ones may then be overwritten
      }
    }

    void step(const Range& group, bool back, int64_t t, int64_t count, bool multiplies, const F* h, F* h_new) const {
      constexpr int kWidth = Recurrent::kWidth;
      const int64_t h_stride = rows.slices * pass.h_row;
      for (int64_t piece = 0, pieces = blocks_of(count, kSumRows); piece < pieces; ++piece) {
        const int64_t begin = share(count, pieces, piece).begin, chunk = share(count, pieces, piece).end - begin;
        auto sums_of = [&](int64_t block) __attribute__((always_inline)) {
          return pass.kKeeps ? kept(block, begin) : sums + (block - group.begin) * chunk * kWidth;
        };
        there_or_back(group, back, [&](int64_t block) __attribute__((always_inline)) {
          const F* bias = biases + block * kWidth;
          F* block_sums = sums_of(block);
          for (int64_t m = 0; m < chunk; ++m)
            for (int i = 0; i < kWidth; i += kLanes) store(block_sums + m * kWidth + i, load(bias + i));
          if (Cell::kMultiplies && multiplies)
            recurrent.multiply(block, h + state_row(begin) * pass.h_row, h_stride, chunk, block_sums);
        });
        for (int64_t block = group.begin; block < group.end && !Cell::kNorms; ++block)
          for (int v = 0; v < kUnitVectors; ++v) {
            const int64_t u = block * Recurrent::kUnits + v * kLanes;
            const F* block_sums = sums_of(block);
            auto each = [&](int n) __attribute__((always_inline)) {
              for_rows(chunk, [&](int64_t m, auto count) __attribute__((always_inline)) {
                const F* gate_sums = block_sums + m * kWidth + v * kLanes;
                if constexpr (Cell::kLate) leave_middle<decltype(count)::value>(t, begin + m, u, n, gate_sums, h);
                else cell<decltype(count)::value>(t, begin + m, u, n, gate_sums, h, h_new);
              });
            };
            if constexpr (!is_of_torch<Cell>) {  // in one piece: each takes the compiler seconds
              if (u < units) each(lanes_left<F>(u, units));
            } else if (u + kLanes <= units) {  // nearly all are whole, and a constant width makes straight code
              each(kLanes);
            } else {
              for (int64_t m = 0; m < chunk && u < units; ++m)
                cell<1>(t, begin + m, u, int(units - u), block_sums + m * kWidth + v * kLanes, h, h_new);
            }
          }
      }
    }

    // Where the sums of a block that are kept have row r of the team's.
    FUSEDRNN_INLINE F* kept(int64_t block, int64_t r) const {
      const int64_t place = rows.slice * blocks_of(p.steps.B, rows.slices) + r;
      return pass.kept + ((rows.strand * recurrent.blocks() + block) * pass.kept_rows + place) * Recurrent::kWidth;
    }
    // Where what comes of the input has row r of the team's in fed_steps steps.
    FUSEDRNN_INLINE F* fed_gates(int64_t block, int64_t r) const {
      const int64_t place = rows.slice * pass.fed_steps * blocks_of(p.steps.B, rows.slices) + r;
      return pass.fed_gates + ((rows.strand * recurrent.blocks() + block) * pass.fed_rows + place) * Recurrent::kWidth;
    }

    // The product of the input for fed_steps steps from s on, of this member's units. Nobody else reads it.
    void feed(int64_t s) const {
      const Recurrent weights = pass.weight_ih[d].head(head);
      const F* const bias_ih = pass.bias_ih[d] + head * weights.blocks() * Recurrent::kWidth;
      F* const input = pass.fed_input + thread * pass.kFedRows * pass.fed_row;
      auto time = [&](int64_t i) { return d ? p.steps.T - 1 - s - i : s + i; };
      auto rows_of = [&](int64_t i) { return rows.count(p.steps.rows(time(i))); };
      const int64_t steps = pass.fed_steps < p.steps.T - s ? pass.fed_steps : p.steps.T - s;
      int64_t all = 0, i = 0, r = 0;  // rows; step and row in it that come next
      for (int64_t k = 0; k < steps; all += rows_of(k++)) fed_at[k] = all;
      for (int64_t k = 0, pieces = blocks_of(all, pass.kFedRows); k < pieces; ++k) {
        const Range piece = share(all, pieces, k);
        const int64_t count = piece.end - piece.begin;
        for (int64_t m = 0; m < count; ++m, ++r) {
          while (r == rows_of(i)) ++i, r = 0;
          load_row(input + m * pass.fed_row, pass.fed_row, static_cast<const S*>(p.gates_x[d]), gates_x_at(time(i), r), p.I);
        }
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
          F* const gates = fed_gates(block, piece.begin);
          for (int64_t m = 0; m < count; ++m)
            for (int v = 0; v < Recurrent::kWidth; v += kLanes)
              store(gates + m * Recurrent::kWidth + v, load(bias_ih + block * Recurrent::kWidth + v));
          weights.multiply(block, input, pass.fed_row, count, gates);
        }
      }
    }

    // What the cell of kLanes units from u on, n of them real, of kRows rows from r on at step t begins with. late_sums: those of a late
    // gate, null before there are any.
    template <int kRows>
    FUSEDRNN_INLINE void read(int64_t t, int64_t r, int64_t u, int n, const F* gate_sums, const F* late_sums, const F* h,
                              Rows<F, kRows> (&pre)[Cell::kPre], Rows<F, kRows> (&state)[Cell::kStates]) const {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t state_row = this->state_row(r + i);
        auto take = [&](const auto* gates, int64_t stride) __attribute__((always_inline)) {
#pragma GCC unroll 4
          for (int g = 0; g < Cell::kGates; ++g) pre[Cell::x_pre(g)].row[i] = load(gates + g * stride, n);
        };
        if (kCanFeed && pass.feeds)
          take(fed_gates(u / Recurrent::kUnits, fed_now + r + i) + u % Recurrent::kUnits, Recurrent::kUnits);
        else
          take(static_cast<const S*>(p.gates_x[d]) + first + gates_x_at(t, r + i) + u, p.H);
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) {
          if (g >= pass.kFirst && !late_sums) break;
          const V sum = load(g < pass.kFirst ? gate_sums + i * Recurrent::kWidth + g * Recurrent::kUnits
                                             : late_sums + i * Second::kWidth);
          V& to = pre[Cell::h_pre(g)].row[i];
          to = Cell::h_pre(g) == Cell::x_pre(g) ? to + sum : sum;
        }
        state[0].row[i] = pass.projected ? V(F(0)) : load((p.hidden_mask ? pass.unmasked : h) + state_row * pass.h_row + u);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) state[k + 1].row[i] = load(pass.inner[k] + state_row * pass.unit_row + u);
      }
    }

    template <int kRows>
    FUSEDRNN_INLINE auto given(int64_t r, int64_t u, int n) const {
      auto found = given_to<Cell, S, F, kRows>(p, d, first + u, n);
      if constexpr (Cell::kLate)
        for (int i = 0; i < kRows; ++i)
          found.mask.row[i] = p.hidden_mask ? pass.hidden_mask(p.steps.given_row(d, rows.batch_row(r + i)), first + u, n) : V(F(1));
      return found;
    }

    // The cell of a normalised row, when its sums are complete.
    void normalise(int64_t t, int64_t r, const F* h, F* h_new) const {
      Norm<F> norms[2] = {norm_of<F>(Cell::kGates * p.H, [&](const auto& use) __attribute__((always_inline)) {
        for (int64_t u = 0; u < p.H; u += kLanes)
          for (int g = 0; g < Cell::kGates; ++g)
            use(load(kept(u / Recurrent::kUnits, r) + g * Recurrent::kUnits + u % Recurrent::kUnits), lanes_left<F>(u, p.H));
      })};
      auto of_unit = [&](int64_t u) { return kept(u / Recurrent::kUnits, r) + u % Recurrent::kUnits; };
      if constexpr (Cell::kNorms == 2) {
        for (int64_t u = 0; u < p.H; u += kLanes) make(t, r, u, lanes_left<F>(u, p.H), of_unit(u), h, norms);
        norms[1] = norm_of<F>(p.H, [&](const auto& use) __attribute__((always_inline)) {
          for (int64_t u = 0; u < p.H; u += kLanes) use(load(sums + u), lanes_left<F>(u, p.H));
        });
      }
      for (int64_t u = 0; u < p.H; u += kLanes) cell<1>(t, r, u, lanes_left<F>(u, p.H), of_unit(u), h, h_new, nullptr, norms);
    }

    // What of a cell does not depend on the norm of its state 1; see kMade.
    void make(int64_t t, int64_t r, int64_t u, int n, const F* gate_sums, const F* h, const Norm<F>* norms) const {
      Rows<F, 1> pre[Cell::kPre], state[Cell::kStates], new_state[Cell::kStates], saved[slots(Cell::kSaved)];
      read<1>(t, r, u, n, gate_sums, nullptr, h, pre, state);
      auto given = this->given<1>(r, u, n);
      set_norms(given, norms);
      cell_until_out<Cell>(given, pre, state, new_state, saved);
      store(sums + u, new_state[1].row[0]);
      for (int k = 0; k < Cell::kSaved; ++k) store(sums + (1 + k) * pass.unit_row + u, saved[k].row[0]);
    }

    // What a late gate multiplies.
    template <int kRows>
    FUSEDRNN_INLINE void leave_middle(int64_t t, int64_t r, int64_t u, int n, const F* gate_sums, const F* h) const {
      Rows<F, kRows> pre[Cell::kPre], state[Cell::kStates];
      read<kRows>(t, r, u, n, gate_sums, nullptr, h, pre, state);
      const Rows<F, kRows> made = Cell::middle(given<kRows>(r, u, n), pre, state);
      for (int i = 0; i < kRows; ++i) store(pass.between + state_row(r + i) * pass.unit_row + u, made.row[i]);
    }

    // The cell, all sums of which are there. Of a normalised row, norms are those of its products and of its state 1, with which `make`
    // has begun.
    template <int kRows>
    FUSEDRNN_INLINE void cell(int64_t t, int64_t r, int64_t u, int n, const F* gate_sums, const F* h, F* h_new,
                              const F* late_sums = nullptr, const Norm<F>* norms = nullptr) const {
      using Value = Rows<F, kRows>;
      Value pre[Cell::kPre], state[Cell::kStates], new_state[Cell::kStates], saved[slots(Cell::kSaved)];
      if (Cell::kNorms < 2 || p.zoneout) read<kRows>(t, r, u, n, gate_sums, late_sums, h, pre, state);
      auto given = this->given<kRows>(r, u, n);
      if constexpr (Cell::kNorms > 0) set_norms(given, norms);
      if constexpr (Cell::kNorms == 2) {
        new_state[1].row[0] = load(sums + u);
        for (int k = 0; k < Cell::kSaved; ++k) saved[k].row[0] = load(sums + (1 + k) * pass.unit_row + u);
        new_state[0] = Cell::out(given, saved, new_state);
      } else {
        cell_forward<Cell>(given, pre, state, new_state, saved);
      }

      if (p.zoneout) keep(t, r, u, n, state, new_state);

#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = this->state_row(r + i), row = p.steps.row(t, b);
        const bool ends = p.steps.ends(t, b, d);
        if (pass.projected) {
          store(pass.between + state_row * pass.unit_row + u, new_state[0].row[i]);
        } else {
          leave_h(h_new, b, u, n, ends ? begun(p.reset_hx, p.P, u, n, b) : new_state[0].row[i]);
          store(static_cast<S*>(p.output) + (row * p.D + d) * p.P + first + u, new_state[0].row[i], n);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k)
          store(pass.inner[k] + state_row * pass.unit_row + u,
                ends ? begun(p.reset_cx, p.H, u, n, b, k) : new_state[k + 1].row[i]);
        if (p.save == Save::kNothing) continue;
        S* saved_row = static_cast<S*>(p.saved) + (row * p.D + d) * Cell::kSaved * p.H + first + u;
        if (p.save == Save::kAll)
#pragma GCC unroll 4
          for (int k = 0; k < Cell::kSaved; ++k) store(saved_row + k * p.H, saved[k].row[i], n);
        S* states_row = static_cast<S*>(p.states) + (row * p.D + d) * p.stored * p.H + first + u;
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) store(states_row + k * p.H, new_state[k + 1].row[i], n);
        if (pass.projected) store(states_row + kInner * p.H, new_state[0].row[i], n);
      }
    }

    // What row b begins anew with: h, or inner state k.
    FUSEDRNN_INLINE V begun(const void* states, int64_t width, int64_t u, int n, int64_t b, int64_t k = 0) const {
      return load_given<F, S>(states, width, first + u, n, k * p.D * p.steps.B + p.steps.given_row(d, b));
    }

    // The hidden state of row b of the batch, for the next step.
    FUSEDRNN_INLINE void leave_h(F* h_new, int64_t b, int64_t u, int n, V value) const {
      const int64_t at = (rows.strand * p.steps.B + b) * pass.h_row + u;
      if (p.hidden_mask) store(pass.unmasked + at, value);
      store(h_new + at, p.hidden_mask ? value * pass.hidden_mask(p.steps.given_row(d, b), first + u, n) : value);
    }

    template <int kRows>
    FUSEDRNN_INLINE void keep(int64_t t, int64_t r, int64_t u, int n, const Rows<F, kRows> (&state)[Cell::kStates],
                              Rows<F, kRows> (&new_state)[Cell::kStates]) const {
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = p.steps.row(t, rows.batch_row(r + i));
        const S* z = static_cast<const S*>(p.zoneout) + p.zoneout_at(row, d, Cell::kStates) + first + u;
        S* made = static_cast<S*>(p.states) + ((row * p.D + d) * p.stored + kInner) * p.H + first + u;
        for (int k = 0; k < Cell::kStates && p.save != Save::kNothing; ++k) store(made + k * p.H, new_state[k].row[i], n);
        for (int k = 0; k < Cell::kStates; ++k)
          new_state[k].row[i] = rounded(zoneout(load(z + k * p.H, n), state[k].row[i], rounded(new_state[k].row[i])));
      }
    }

    // Where row r of step t begins in gates_x, which is the input where weight_ih is given.
    int64_t gates_x_at(int64_t t, int64_t r) const {
      return p.steps.position(t, rows.batch_row(r), p.gates_x_step[d], p.gates_x_row[d]);
    }

    void multiply_second(int64_t block, int64_t t, int64_t count, const F* h, F* h_new) const {
      constexpr int kWidth = Second::kWidth;
      for (int64_t piece = 0, pieces = blocks_of(count, kSumRows); piece < pieces; ++piece) {
        const int64_t begin = share(count, pieces, piece).begin, chunk = share(count, pieces, piece).end - begin;
        __builtin_memset(sums, 0, chunk * kWidth * sizeof(F));
        second.multiply(block, pass.between + state_row(begin) * pass.unit_row, rows.slices * pass.unit_row, chunk, sums);
        if constexpr (Cell::kLate) {
          late_cells(block, t, begin, chunk, h, h_new);
          continue;
        }
        for (int64_t m = 0; m < chunk; ++m)
          for (int i = 0; i < kWidth; i += kLanes) {
            const int64_t u = block * kWidth + i;
            if (u >= p.P) break;
            const V value = load(sums + m * kWidth + i);
            const int64_t b = rows.batch_row(begin + m), row = p.steps.row(t, b);
            const int n = lanes_left<F>(u, p.P);
            store(h_new + state_row(begin + m) * pass.h_row + u, p.steps.ends(t, b, d) ? begun(p.reset_hx, p.P, u, n, b) : value);
            store(static_cast<S*>(p.output) + (row * p.D + d) * p.P + u, value, n);
          }
      }
    }

    // The cells of a block of the second product's, of a late gate, `sums` of which are there but for its bias.
    void late_cells(int64_t block, int64_t t, int64_t begin, int64_t chunk, const F* h, F* h_new) const {
      constexpr int kWidth = Second::kWidth;
      for (int i = 0; i < kWidth; i += kLanes) {
        const int64_t u = block * kWidth + i;
        if (u >= units) break;
        const int n = lanes_left<F>(u, units);
        const S* bias_hh = static_cast<const S*>(p.bias_hh[d]);
        const V bias = bias_hh ? load(bias_hh + pass.kFirst * p.H + first + u, n) : V(F(0));
        for (int64_t m = 0; m < chunk; ++m) store(sums + m * kWidth + i, load(sums + m * kWidth + i) + bias);
        for_rows(chunk, [&](int64_t m, auto count) __attribute__((always_inline)) {
          cell<decltype(count)::value>(t, begin + m, u, n, kept(u / Recurrent::kUnits, begin + m) + u % Recurrent::kUnits, h, h_new,
                                       sums + m * kWidth + i);
        });
      }
    }

    // The last states of row r, of those units that this member has made; it makes all units of a normalised row.
    void finish(int64_t r, const F* h_new) const {
      const int64_t row = state_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      const bool by_columns = pass.projected || Cell::kLate;
      const Range all{0, recurrent.blocks()}, blocks = Cell::kNorms ? all : this->blocks;
      const int64_t h_end = by_columns ? columns.end * Second::kUnits : blocks.end * Recurrent::kUnits;
      const int64_t h_begin = by_columns ? columns.begin * Second::kUnits : blocks.begin * Recurrent::kUnits;
      const F* last = p.hidden_mask ? pass.unmasked : h_new;
      for (int64_t u = h_begin; u < h_end && u < pass.depth; u += kLanes)
        store(static_cast<S*>(p.hy) + given * p.P + first + u, load(last + row * pass.h_row + u), lanes_left<F>(u, pass.depth));
      for (int k = 0; k < kInner; ++k)
        for (int64_t u = blocks.begin * Recurrent::kUnits; u < blocks.end * Recurrent::kUnits && u < units; u += kLanes)
          store(static_cast<S*>(p.cy) + (k * p.D * p.steps.B + given) * p.H + first + u,
                load(pass.inner[k] + row * pass.unit_row + u), lanes_left<F>(u, units));
    }
  };
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
