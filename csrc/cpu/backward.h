// The backward pass of a layer: the steps in the opposite order. At each, the thread that owns a block of units sums the
// gradient of their states (the product of the later step's gate gradients and weight_hh) and takes them through the
// cell, so that one barrier a step is enough.
#pragma once
#include "../params.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

template <class Cell, class F, class S>
struct BackwardPass {
  using V = Vec<F>;
  using Weights = ColumnWeights<F, S>;
  static constexpr int kLanes = V::kLanes, kUnits = Weights::kUnits, kWidth = Weights::kWidth;
  static constexpr int kInner = Cell::kStates - 1;

  const BackwardParams& p;
  const bool projected;
  const int64_t pre_row, h_row, unit_row;
  Crew crew;
  Weights recurrent[kMaxDirections];   // weight_hh (G*H, P)
  Weights projection[kMaxDirections];  // weight_hr (P, H)
  F* dpre[2];                    // (D, B, pre_row) gradients of the recurrent halves of the gates, by turns
  F* dh;                         // (D, B, h_row) gradient of h that does not come through weight_hh
  F* dinner[slots(kInner)];      // (D, B, unit_row)
  F* dprojected;                 // (D, B, h_row) whole gradient of the projected state
  F* sums;                       // (threads, kSumRows, kWidth)

  BackwardPass(const BackwardParams& p, Arena& arena)
      : p(p), projected(can_project<Cell> && p.weight_hr[0]), pre_row(padded_row<F>(Cell::kGates * p.H, kLanes)),
        h_row(padded_row<F>(p.P, kUnits)), unit_row(padded_row<F>(p.H, kUnits)), crew(arena, p.threads) {
    // One product in the whole call: a step needs none, but the gradient of hx does. Packing then goes through a scratch.
    const bool packs = Cell::kMultiplies && p.steps.T > 1;
    const int64_t depth = Cell::kGates * p.H;
    F* scratch = arena.take<F>(packs ? 0 : p.threads * (depth > p.P ? depth : p.P) * kWidth);
    for (int64_t d = 0; d < p.D; ++d) {
      recurrent[d] = {static_cast<const S*>(p.weight_hh[d]), p.P, depth, nullptr, scratch};
      projection[d] = {static_cast<const S*>(p.weight_hr[d]), projected ? p.H : 0, p.P, nullptr, scratch};
      if (!packs) continue;
      recurrent[d].panels = arena.take<F>(recurrent[d].blocks() * recurrent[d].block_size());
      projection[d].panels = arena.take<F>(projection[d].blocks() * projection[d].block_size());
    }
    dpre[0] = arena.take<F>(p.D * p.steps.B * pre_row);
    dpre[1] = arena.take<F>(p.D * p.steps.B * pre_row);
    dh = arena.take<F>(p.D * p.steps.B * h_row);
    for (int k = 0; k < kInner; ++k) dinner[k] = arena.take<F>(p.D * p.steps.B * unit_row);
    dprojected = arena.take<F>(projected ? p.D * p.steps.B * h_row : 0);
    sums = arena.take<F>(p.threads * kSumRows * kWidth);
  }

  Division divide_among(int threads) const {
    const int64_t products = Cell::kMultiplies ? p.P * Cell::kGates * p.H + (projected ? p.P * p.H : 0) : kCellWork * p.H;
    const int64_t blocks = blocks_of(p.P, kUnits);
    return divide(threads, p.D, p.steps.B, blocks, products * int64_t(sizeof(F)), 2 * p.steps.B * products);
  }

  void run() const {
    crew.run([this](int threads) { return divide_among(threads); },
             [this](TeamRows rows, int thread, int member, Barrier team, int place, Barrier direction) {
               prepare(rows, member, team.members, place, direction);
               direction.wait(place);
               Member{*this, rows, thread, member, team}.run();
             });
  }

  // Gradients of the last states; weights.
  void prepare(const TeamRows& rows, int member, int members, int place, const Barrier& direction) const {
    const int64_t d = rows.direction;
    const Range mine = share(rows.count(p.steps.B), members, member);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t row = d * p.steps.B + rows.batch_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      load_row(dh + row * h_row, h_row, static_cast<const S*>(p.grad_hy), given, p.P);
      for (int k = 0; k < kInner; ++k)
        load_row(dinner[k] + row * unit_row, unit_row, static_cast<const S*>(p.grad_cy), k * p.D * p.steps.B + given, p.H);
    }
    for (const Weights* weights : {&recurrent[d], &projection[d]}) {
      const Range blocks = share(weights->panels ? weights->blocks() : 0, direction.members, place);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) weights->pack(block);
    }
  }

  struct Member {
    const BackwardPass& pass;
    const TeamRows rows;
    const int thread, member;
    const Barrier barrier;

    const BackwardParams& p = pass.p;
    const int64_t d = rows.direction;
    F* const sums = pass.sums + thread * kSumRows * kWidth;
    const Weights recurrent = own(pass.recurrent[d]), projection = own(pass.projection[d]);
    const Range columns = share(recurrent.blocks(), barrier.members, member);  // of the hidden state
    const Range blocks = pass.projected ? share(projection.blocks(), barrier.members, member) : columns;  // of units

    Weights own(Weights weights) const {
      weights.scratch += weights.panels ? 0 : thread * (Cell::kGates * p.H > p.P ? Cell::kGates * p.H : p.P) * kWidth;
      return weights;
    }
    int64_t state_row(int64_t r) const { return d * p.steps.B + rows.batch_row(r); }
    int64_t given_row(int64_t r) const { return p.steps.given_row(d, rows.batch_row(r)); }

    // Rows of the batch come and go: those of the step before (in this order) bring gate gradients, those of this step take
    // them through the cell; a row that is not in this step any more has arrived at its initial state.
    void run() const {
      const int64_t T = p.steps.T;
      int64_t before = 0;
      for (int64_t s = 0; s <= T; ++s) {
        const int64_t t = d ? s : T - 1 - s;
        const int64_t count = s < T ? rows.count(p.steps.rows(t)) : 0;
        if (s == T && !p.grad_hx && !p.grad_cx) break;
        const F* dpre = pass.dpre[s & 1];
        F* dpre_new = pass.dpre[(s + 1) & 1];
        const int64_t visited = count > before ? count : before;
        const int64_t row_stride = rows.slices;
        const bool needs_product = Cell::kMultiplies && (s < T || p.grad_hx);
        for_groups(columns, visited, [&](const Range& group) {
          visit(needs_product ? recurrent : Weights{}, group, p.P, dpre, row_stride * pass.pre_row, pass.pre_row, before, count,
                visited, [&](int64_t r, int64_t u, int n, auto sum) __attribute__((always_inline)) {
                  if constexpr (can_project<Cell>)
                    if (pass.projected) return arrive(t, r, u, n, sum);
                  cell(t, r, u, n, new_dh(t, r, u, n, sum), dpre_new);
                });
        });
        if constexpr (can_project<Cell>) {
          if (pass.projected) {
            barrier.wait(member);  // for the gradient of the whole projected state
            for_groups(blocks, count, [&](const Range& group) {
              visit(projection, group, p.H, pass.dprojected, row_stride * pass.h_row, pass.h_row, count, count, count,
                    [&](int64_t r, int64_t u, int n, auto sum) __attribute__((always_inline)) { cell(t, r, u, n, sum, dpre_new); });
            });
          }
        }
        for (int64_t r = count; r < before; ++r) leave_inner(r);
        before = count;
        barrier.wait(member);  // for the gate gradients of all units
      }
    }

    // The units of a group of blocks in the rows [0, visited), where sum is a times the block's weights in the first `multiplied`
    // rows and zero behind: calls each(row, unit, lanes, sum) for the rows [0, staying), of one or two rows at a time, and leave_h
    // for the rest.
    template <class Each>
    FUSEDRNN_INLINE void visit(const Weights& weights, const Range& group, int64_t end, const F* a, int64_t a_stride, int64_t a_row,
                               int64_t multiplied, int64_t staying, int64_t visited, const Each& each) const {
      for (int64_t begin = 0; begin < visited; begin += kSumRows) {
        const int64_t chunk = visited - begin < kSumRows ? visited - begin : kSumRows;
        const int64_t with = multiplied - begin < chunk ? multiplied - begin : chunk;
        const int64_t stay = staying - begin < chunk ? staying - begin : chunk;
        __builtin_memset(sums, 0, (group.end - group.begin) * chunk * kWidth * sizeof(F));
        F* block_sums = sums;
        for (int64_t block = group.begin; block < group.end && with > 0 && weights.w; ++block, block_sums += chunk * kWidth)
          weights.multiply(block, a + state_row(begin) * a_row, a_stride, with, block_sums);
        block_sums = sums;
        for (int64_t block = group.begin; block < group.end; ++block, block_sums += chunk * kWidth)
          for (int i = 0; i < kWidth; i += kLanes) {
            const int64_t u = block * kUnits + i;
            auto rows = [&](int n) __attribute__((always_inline)) {
              for_rows(stay, [&](int64_t m, auto count) __attribute__((always_inline)) {
                Rows<F, decltype(count)::value> sum;
                for (int k = 0; k < count.value; ++k) sum.row[k] = load(block_sums + (m + k) * kWidth + i);
                each(begin + m, u, n, sum);
              });
            };
            if constexpr (!is_of_torch<Cell>) {  // as in forward
              if (u < end) rows(lanes_left<F>(u, end));
            } else if (u + kLanes <= end) {
              rows(kLanes);
            } else {
              for (int64_t m = 0; m < stay && u < end; ++m) {
                Rows<F, 1> sum;
                sum.row[0] = load(block_sums + m * kWidth + i);
                each(begin + m, u, int(end - u), sum);
              }
            }
            for (int64_t m = stay < 0 ? 0 : stay; m < chunk && u < end; ++m)
              leave_h(begin + m, u, lanes_left<F>(u, end), load(block_sums + m * kWidth + i));
          }
      }
    }

    // The whole gradient of the hidden state after step t: through the next step, past it, and from the output.
    template <int kRows>
    FUSEDRNN_INLINE Rows<F, kRows> new_dh(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> sum) const {
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        V& total = sum.row[i];
        if (p.hidden_mask) total = rounded(total * hidden_mask(r + i, u, n));
        total = total + load(pass.dh + state_row(r + i) * pass.h_row + u);
        if (p.grad_output) total = total + load(static_cast<const S*>(p.grad_output) + output_at(t, r + i) + u, n);
      }
      return sum;
    }
    FUSEDRNN_INLINE V hidden_mask(int64_t r, int64_t u, int n) const {
      return load(static_cast<const S*>(p.hidden_mask) + given_row(r) * p.P + u, n);
    }
    int64_t output_at(int64_t t, int64_t r) const {
      return (p.steps.row(t, rows.batch_row(r)) * p.D + d) * p.P;
    }

    // The projected state's gradient is complete: hand it to whoever needs all of it.
    template <int kRows>
    FUSEDRNN_INLINE void arrive(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> sum) const {
      const Rows<F, kRows> total = new_dh(t, r, u, n, sum);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = state_row(r + i) * pass.h_row + u;
        store(pass.dh + at, V(F(0)));
        store(pass.dprojected + at, total.row[i]);
        store(static_cast<S*>(p.grad_proj) + output_at(t, r + i) + u, total.row[i], n);
      }
    }

    // The cell backward of n units from u on, of kRows rows from r on at step t. new_dh: gradient of their new hidden state.
    template <int kRows>
    FUSEDRNN_INLINE void cell(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> new_dh, F* dpre_new) const {
      using Value = Rows<F, kRows>;
      Value saved[slots(Cell::kSaved)], state[Cell::kStates], new_state[Cell::kStates], grad_new[Cell::kStates];
      Value grad_pre[kGrads<Cell>], grad_state[Cell::kStates];
      bool begins[kRows];
      grad_new[0] = new_dh;
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = d * p.steps.B + b, row = p.steps.row(t, b);
        const int64_t from_row = p.steps.row_before(t, b, d);  // where the states lie that this step began with
        const bool first = from_row < 0;
        begins[i] = p.steps.begins(t, b, d);
        const S* output = static_cast<const S*>(p.output) + d * p.P + u;
        const S* states = static_cast<const S*>(p.states) + d * p.stored * p.H + u;
        const S* saved_row = static_cast<const S*>(p.saved) + (row * p.D + d) * Cell::kSaved * p.H + u;
#pragma GCC unroll 4
        for (int k = 0; k < Cell::kSaved; ++k) saved[k].row[i] = load(saved_row + k * p.H, n);
        // Cells whose hidden state may be projected do not look at state 0 in backward.
        state[0].row[i] = pass.projected || begins[i] ? V(F(0))
                          : first                     ? initial(p.hx, p.P, u, n, given_row(r + i))
                                                      : load(output + from_row * p.D * p.P, n);
        new_state[0].row[i] = pass.projected ? V(F(0)) : load(output + row * p.D * p.P, n);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) {
          state[k + 1].row[i] = begins[i] ? V(F(0))
                                : first   ? initial(p.cx, p.H, u, n, k * p.D * p.steps.B + given_row(r + i))
                                          : load(states + (from_row * p.D * p.stored + k) * p.H, n);
          new_state[k + 1].row[i] = load(states + (row * p.D * p.stored + k) * p.H, n);
          grad_new[k + 1].row[i] = load(pass.dinner[k] + state_row * pass.unit_row + u);
          if (p.grad_states)
            grad_new[k + 1].row[i] =
                grad_new[k + 1].row[i] + load(static_cast<const S*>(p.grad_states) + ((row * p.D + d) * p.stored + k) * p.H + u, n);
        }
      }

      Value past[Cell::kStates];  // the gradient of what stays as it was goes past the cell
      for (int k = 0; k < Cell::kStates; ++k) past[k] = Value(F(0));
      if (p.zoneout) {
        for (int k = 0; k < Cell::kStates; ++k) {
          Value z;
          for (int i = 0; i < kRows; ++i) {
            const int64_t row = p.steps.row(t, rows.batch_row(r + i)), made = ((row * p.D + d) * p.stored + kInner + k) * p.H + u;
            z.row[i] = load(static_cast<const S*>(p.zoneout) + p.zoneout_at(row, d, Cell::kStates) + k * p.H + u, n);
            new_state[k].row[i] = load(static_cast<const S*>(p.states) + made, n);
          }
          past[k] = rounded(z * grad_new[k]);
          grad_new[k] = rounded(grad_new[k] - past[k]);
        }
      }

      cell_backward<Cell>(given_to<Cell, S, F, kRows>(p, d, u, n), saved, state, new_state, grad_new, grad_pre, grad_state);

      if (p.zoneout)
        for (int k = 0; k < Cell::kStates; ++k) grad_state[k] = rounded(grad_state[k]) + past[k];
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = d * p.steps.B + b, row = p.steps.row(t, b);
        S* grad_pre_row = static_cast<S*>(p.grad_pre) + (row * p.D + d) * kGrads<Cell> * p.H + u;
#pragma GCC unroll 8
        for (int k = 0; k < kGrads<Cell>; ++k) store(grad_pre_row + k * p.H, grad_pre[k].row[i], n);
        F* dpre_row = dpre_new + state_row * pass.pre_row + u;
#pragma GCC unroll 4
        for (int g = 0; g < Cell::kGates; ++g)
          store(dpre_row + g * p.H, begins[i] ? V(F(0)) : grad_pre[Cell::h_pre(g)].row[i], n);
        if (!pass.projected) store(pass.dh + state_row * pass.h_row + u, begins[i] ? V(F(0)) : grad_state[0].row[i]);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k)
          store(pass.dinner[k] + state_row * pass.unit_row + u, begins[i] ? V(F(0)) : grad_state[k + 1].row[i]);
      }
    }

    static FUSEDRNN_INLINE V initial(const void* states, int64_t width, int64_t u, int n, int64_t row) {
      return states ? load(static_cast<const S*>(states) + row * width + u, n) : V(F(0));
    }

    void leave_h(int64_t r, int64_t u, int n, V sum) const {
      if (!p.grad_hx) return;
      if (p.hidden_mask) sum = rounded(sum * hidden_mask(r, u, n));
      store(static_cast<S*>(p.grad_hx) + given_row(r) * p.P + u, sum + load(pass.dh + state_row(r) * pass.h_row + u), n);
    }

    void leave_inner(int64_t r) const {
      for (int k = 0; k < kInner && p.grad_cx; ++k)
        for (int64_t u = blocks.begin * kUnits; u < blocks.end * kUnits && u < p.H; u += kLanes)
          store(static_cast<S*>(p.grad_cx) + (k * p.D * p.steps.B + given_row(r)) * p.H + u,
                load(pass.dinner[k] + state_row(r) * pass.unit_row + u), lanes_left<F>(u, p.H));
    }
  };
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
