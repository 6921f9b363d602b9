// The forward pass of a layer: at every step, the recurrent product and the cell in one go, block of units by block.
#pragma once
#include "../params.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

template <class Cell, class F, class S>
struct ForwardPass {
  using V = Vec<F>;
  static constexpr int kLanes = V::kLanes;
  using Recurrent = RowWeights<F, S, Cell::kGates>;
  using Projection = RowWeights<F, S, 1>;
  static constexpr int kUnitVectors = Recurrent::kUnitVectors;
  static constexpr int kWidest = Recurrent::kWidth > Projection::kWidth ? Recurrent::kWidth : Projection::kWidth;
  static constexpr int kInner = Cell::kStates - 1;  // states that stay with their unit
  // A call of one step, or with so few rows of states altogether, takes dot products on the weights where they are: packing
  // costs about as much as a few steps at batch 1.
  static constexpr int64_t kFewRows = 24;

  const ForwardParams& p;
  const bool projected;
  const int64_t h_row, unit_row;
  Crew crew;
  Recurrent recurrent[kMaxDirections];
  Projection projection[kMaxDirections];
  F* bias[kMaxDirections];       // (blocks, kWidth) bias_hh in the order of the sums
  F* h[2];                       // (D, B, h_row) the hidden state before and after a step, by turns
  F* inner[slots(kInner)];       // (D, B, unit_row)
  F* unmasked;                   // (D, B, h_row) the hidden state, where h is multiplied by a mask
  F* unprojected;                // (D, B, unit_row) state 0 before its projection
  F* sums;                       // (threads, kSumRows, kWidest)

  ForwardPass(const ForwardParams& p, Arena& arena)
      : p(p), projected(can_project<Cell> && p.weight_hr[0]), h_row(padded_row<F>(p.P, 2 * kLanes)),
        unit_row(padded_row<F>(p.H, 2 * kLanes)), crew(arena, p.threads) {
    const bool packs = Cell::kMultiplies && p.steps.T > 1 && p.steps.row_count() > kFewRows;
    for (int64_t d = 0; d < p.D; ++d) {
      recurrent[d] = {static_cast<const S*>(p.weight_hh[d]), p.H, p.P, nullptr};
      projection[d] = {static_cast<const S*>(p.weight_hr[d]), projected ? p.P : 0, p.H, nullptr};
      if (packs) {
        recurrent[d].panels = arena.take<F>(recurrent[d].blocks() * recurrent[d].block_size());
        projection[d].panels = arena.take<F>(projection[d].blocks() * projection[d].block_size());
      }
      bias[d] = arena.take<F>(recurrent[d].blocks() * Recurrent::kWidth);
    }
    h[0] = arena.take<F>(p.D * p.steps.B * h_row);
    h[1] = arena.take<F>(p.D * p.steps.B * h_row);
    for (int k = 0; k < kInner; ++k) inner[k] = arena.take<F>(p.D * p.steps.B * unit_row);
    unmasked = arena.take<F>(p.hidden_mask ? p.D * p.steps.B * h_row : 0);
    unprojected = arena.take<F>(projected ? p.D * p.steps.B * unit_row : 0);
    sums = arena.take<F>(p.threads * kSumRows * kWidest);
  }

  Division divide_among(int threads) const {
    const int64_t products = Cell::kMultiplies ? p.P * Cell::kGates * p.H + (projected ? p.P * p.H : 0) : kCellWork * p.H;
    return divide(threads, p.D, p.steps.B, recurrent[0].blocks(), products * int64_t(sizeof(F)),
                  2 * p.steps.B * products);
  }

  void run() const {
    crew.run([this](int threads) { return divide_among(threads); },
             [this](TeamRows rows, int thread, int member, Barrier team, int place, Barrier direction) {
               prepare(rows, member, team.members, place, direction);
               direction.wait(place);
               Member{*this, rows, sums + thread * kSumRows * kWidest, member, team}.run();
             });
  }

  // Initial states of the team's rows; weights and biases of the direction's blocks.
  void prepare(const TeamRows& rows, int member, int members, int place, const Barrier& direction) const {
    const int64_t d = rows.direction;
    const Range mine = share(rows.count(p.steps.B), members, member);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t row = d * p.steps.B + rows.batch_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      const bool anew = p.steps.begins(d ? p.steps.T - 1 : 0, rows.batch_row(r), d);
      const S *hx = anew ? nullptr : static_cast<const S*>(p.hx), *cx = anew ? nullptr : static_cast<const S*>(p.cx);
      for (F* to : {h[0], h[1]}) load_row(to + row * h_row, h_row, hx, given, p.P);
      for (int k = 0; k < kInner; ++k) load_row(inner[k] + row * unit_row, unit_row, cx, k * p.D * p.steps.B + given, p.H);
      if (p.hidden_mask) {
        load_row(unmasked + row * h_row, h_row, hx, given, p.P);
        for (F* to : {h[0], h[1]})
          for (int64_t u = 0; u < p.P; u += kLanes)
            store(to + row * h_row + u, load(to + row * h_row + u) * hidden_mask(given, u, lanes_left<F>(u, p.P)));
      }
      if (projected) load_row(unprojected + row * unit_row, unit_row, static_cast<const S*>(nullptr), given, p.H);
    }
    const Range blocks = share(recurrent[d].blocks(), direction.members, place);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      if (recurrent[d].panels) recurrent[d].pack(block);
      for (int g = 0; g < Cell::kGates; ++g)
        for (int v = 0; v < kUnitVectors; ++v) {
          const int64_t u = block * Recurrent::kUnits + v * kLanes;
          store(bias[d] + block * Recurrent::kWidth + (g * kUnitVectors + v) * kLanes,
                p.bias_hh[d] ? load(static_cast<const S*>(p.bias_hh[d]) + g * p.H + u, lanes_left<F>(u, p.H))
                             : V(F(0)));
        }
    }
    if (projection[d].panels) {
      const Range columns = share(projection[d].blocks(), direction.members, place);
      for (int64_t block = columns.begin; block < columns.end; ++block) projection[d].pack(block);
    }
  }

  FUSEDRNN_INLINE V hidden_mask(int64_t given_row, int64_t u, int n) const {
    return load(static_cast<const S*>(p.hidden_mask) + given_row * p.P + u, n);
  }

  // One thread's part of one team's sequence.
  struct Member {
    const ForwardPass& pass;
    const TeamRows rows;
    F* const sums;
    const int member;
    const Barrier barrier;

    const ForwardParams& p = pass.p;
    const int64_t d = rows.direction;
    const Range blocks = share(pass.recurrent[d].blocks(), barrier.members, member);
    const Range columns = share(pass.projection[d].blocks(), barrier.members, member);

    int64_t state_row(int64_t r) const { return d * p.steps.B + rows.batch_row(r); }

    void run() const {
      const int64_t T = p.steps.T;
      for (int64_t s = 0; s < T; ++s) {
        const int64_t t = d ? T - 1 - s : s, next = d ? t - 1 : t + 1;
        const int64_t count = rows.count(p.steps.rows(t));
        const int64_t staying = s + 1 < T ? rows.count(p.steps.rows(next)) : 0;
        const F* h = pass.h[s & 1];
        F* h_new = pass.h[(s + 1) & 1];
        for_groups(blocks, count, [&](const Range& group) { step(group, t, count, s > 0 || p.hx, h, h_new); });
        if constexpr (can_project<Cell>) {
          if (pass.projected) {
            barrier.wait(member);  // for the unprojected states of all units
            for (int64_t block = columns.begin; block < columns.end; ++block) project(block, t, count, h_new);
          }
        }
        for (int64_t r = staying; r < count; ++r) finish(r, h_new);  // rows for which this step was the last
        barrier.wait(member);  // for the new hidden states of all units; the old ones may then be overwritten
      }
    }

    void step(const Range& group, int64_t t, int64_t count, bool multiplies, const F* h, F* h_new) const {
      constexpr int kWidth = Recurrent::kWidth;
      const int64_t h_stride = rows.slices * pass.h_row;
      for (int64_t begin = 0; begin < count; begin += kSumRows) {
        const int64_t chunk = count - begin < kSumRows ? count - begin : kSumRows;
        F* block_sums = sums;
        for (int64_t block = group.begin; block < group.end; ++block, block_sums += chunk * kWidth) {
          const F* bias = pass.bias[d] + block * kWidth;
          for (int64_t m = 0; m < chunk; ++m)
            for (int i = 0; i < kWidth; i += kLanes) store(block_sums + m * kWidth + i, load(bias + i));
          if (Cell::kMultiplies && multiplies)
            pass.recurrent[d].multiply(block, h + state_row(begin) * pass.h_row, h_stride, chunk, block_sums);
        }
        block_sums = sums;
        for (int64_t block = group.begin; block < group.end; ++block, block_sums += chunk * kWidth)
          for (int v = 0; v < kUnitVectors; ++v) {
            const int64_t u = block * Recurrent::kUnits + v * kLanes;
            auto each = [&](int n) __attribute__((always_inline)) {
              for_rows(chunk, [&](int64_t m, auto count) __attribute__((always_inline)) {
                cell<decltype(count)::value>(t, begin + m, u, n, block_sums + m * kWidth + v * kLanes, h, h_new);
              });
            };
            if constexpr (!is_of_torch<Cell>) {  // in one piece: each takes the compiler seconds
              if (u < p.H) each(lanes_left<F>(u, p.H));
            } else if (u + kLanes <= p.H) {  // nearly all are whole, and a constant width makes straight code
              each(kLanes);
            } else {
              for (int64_t m = 0; m < chunk && u < p.H; ++m)
                cell<1>(t, begin + m, u, int(p.H - u), block_sums + m * kWidth + v * kLanes, h, h_new);
            }
          }
      }
    }

    // The cell of kLanes units from u on, n of them real, of kRows rows from r on at step t.
    template <int kRows>
    FUSEDRNN_INLINE void cell(int64_t t, int64_t r, int64_t u, int n, const F* gate_sums, const F* h, F* h_new) const {
      using Value = Rows<F, kRows>;
      Value pre[Cell::kPre], state[Cell::kStates], new_state[Cell::kStates], saved[slots(Cell::kSaved)];
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t state_row = this->state_row(r + i);
        const S* gates_x = this->gates_x(t, r + i) + u;
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) pre[Cell::x_pre(g)].row[i] = load(gates_x + g * p.H, n);
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g) {
          const V sum = load(gate_sums + i * Recurrent::kWidth + g * Recurrent::kUnits);
          V& to = pre[Cell::h_pre(g)].row[i];
          to = Cell::h_pre(g) == Cell::x_pre(g) ? to + sum : sum;
        }
        state[0].row[i] = pass.projected ? V(F(0)) : load((p.hidden_mask ? pass.unmasked : h) + state_row * pass.h_row + u);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) state[k + 1].row[i] = load(pass.inner[k] + state_row * pass.unit_row + u);
      }

      cell_forward<Cell>(given_to<Cell, S, F, kRows>(p, d, u, n), pre, state, new_state, saved);
      if (p.zoneout) keep(t, r, u, n, state, new_state);

#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = this->state_row(r + i), row = p.steps.row(t, b);
        const bool ends = p.steps.ends(t, b, d);
        if (pass.projected) {
          store(pass.unprojected + state_row * pass.unit_row + u, new_state[0].row[i]);
        } else {
          leave_h(h_new, b, u, n, ends ? V(F(0)) : new_state[0].row[i]);
          store(static_cast<S*>(p.output) + (row * p.D + d) * p.P + u, new_state[0].row[i], n);
        }
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k)
          store(pass.inner[k] + state_row * pass.unit_row + u, ends ? V(F(0)) : new_state[k + 1].row[i]);
        if (p.save == Save::kNothing) continue;
        S* saved_row = static_cast<S*>(p.saved) + (row * p.D + d) * Cell::kSaved * p.H + u;
        if (p.save == Save::kAll)
#pragma GCC unroll 4
          for (int k = 0; k < Cell::kSaved; ++k) store(saved_row + k * p.H, saved[k].row[i], n);
        S* states_row = static_cast<S*>(p.states) + (row * p.D + d) * p.stored * p.H + u;
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) store(states_row + k * p.H, new_state[k + 1].row[i], n);
        if (pass.projected) store(states_row + kInner * p.H, new_state[0].row[i], n);
      }
    }

    // The hidden state of row b of the batch, for the next step.
    FUSEDRNN_INLINE void leave_h(F* h_new, int64_t b, int64_t u, int n, V value) const {
      const int64_t at = (d * p.steps.B + b) * pass.h_row + u;
      if (p.hidden_mask) store(pass.unmasked + at, value);
      store(h_new + at, p.hidden_mask ? value * pass.hidden_mask(p.steps.given_row(d, b), u, n) : value);
    }

    template <int kRows>
    FUSEDRNN_INLINE void keep(int64_t t, int64_t r, int64_t u, int n, const Rows<F, kRows> (&state)[Cell::kStates],
                              Rows<F, kRows> (&new_state)[Cell::kStates]) const {
      for (int i = 0; i < kRows; ++i) {
        const int64_t row = p.steps.row(t, rows.batch_row(r + i));
        const S* z = static_cast<const S*>(p.zoneout) + p.zoneout_at(row, d, Cell::kStates) + u;
        S* made = static_cast<S*>(p.states) + ((row * p.D + d) * p.stored + kInner) * p.H + u;
        for (int k = 0; k < Cell::kStates && p.save != Save::kNothing; ++k) store(made + k * p.H, new_state[k].row[i], n);
        for (int k = 0; k < Cell::kStates; ++k)
          new_state[k].row[i] = rounded(zoneout(load(z + k * p.H, n), state[k].row[i], rounded(new_state[k].row[i])));
      }
    }

    const S* gates_x(int64_t t, int64_t r) const {
      return static_cast<const S*>(p.gates_x[d]) + p.steps.position(t, rows.batch_row(r), p.gates_x_step[d], p.gates_x_row[d]);
    }

    void project(int64_t block, int64_t t, int64_t count, F* h_new) const {
      constexpr int kWidth = Projection::kWidth;
      for (int64_t begin = 0; begin < count; begin += kSumRows) {
        const int64_t chunk = count - begin < kSumRows ? count - begin : kSumRows;
        __builtin_memset(sums, 0, chunk * kWidth * sizeof(F));
        pass.projection[d].multiply(block, pass.unprojected + state_row(begin) * pass.unit_row,
                                    rows.slices * pass.unit_row, chunk, sums);
        for (int64_t m = 0; m < chunk; ++m)
          for (int i = 0; i < kWidth; i += kLanes) {
            const int64_t u = block * kWidth + i;
            if (u >= p.P) break;
            const V value = load(sums + m * kWidth + i);
            const int64_t b = rows.batch_row(begin + m), row = p.steps.row(t, b);
            store(h_new + state_row(begin + m) * pass.h_row + u, p.steps.ends(t, b, d) ? V(F(0)) : value);
            store(static_cast<S*>(p.output) + (row * p.D + d) * p.P + u, value, lanes_left<F>(u, p.P));
          }
      }
    }

    // The last states of row r, of this member's own units.
    void finish(int64_t r, const F* h_new) const {
      const int64_t row = state_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      const int64_t h_end = pass.projected ? columns.end * Projection::kUnits : blocks.end * Recurrent::kUnits;
      const int64_t h_begin = pass.projected ? columns.begin * Projection::kUnits : blocks.begin * Recurrent::kUnits;
      const F* last = p.hidden_mask ? pass.unmasked : h_new;
      for (int64_t u = h_begin; u < h_end && u < p.P; u += kLanes)
        store(static_cast<S*>(p.hy) + given * p.P + u, load(last + row * pass.h_row + u), lanes_left<F>(u, p.P));
      for (int k = 0; k < kInner; ++k)
        for (int64_t u = blocks.begin * Recurrent::kUnits; u < blocks.end * Recurrent::kUnits && u < p.H; u += kLanes)
          store(static_cast<S*>(p.cy) + (k * p.D * p.steps.B + given) * p.H + u, load(pass.inner[k] + row * pass.unit_row + u),
                lanes_left<F>(u, p.H));
    }
  };
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
