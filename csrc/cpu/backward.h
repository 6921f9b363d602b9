// The backward pass of a layer: the steps in the opposite order. At each, the thread that owns a block of units sums the
// gradient of their states (the product of the later step's gate gradients and weight_hh) and takes them through the
// cell, so that one barrier a step is enough. With projections, a late gate or normalised products there are two.
#pragma once
#include "../params.h"
#include "norm.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

template <class Cell, class F, class S>
struct BackwardPass {
  using V = Vec<F>;
  using Weights = ColumnWeights<F, S>;
  static constexpr int kLanes = V::kLanes, kUnits = Weights::kUnits, kWidth = Weights::kWidth;
  static constexpr int kInner = Cell::kStates - 1, kFirst = Cell::kGates - Cell::kLate;

  const BackwardParams& p;
  const bool projected;
  const int64_t units, depth;    // of a strand
  const int64_t pre_row, h_row, unit_row;
  Crew crew;
  Weights recurrent[kMaxDirections];  // weight_hh (kFirst*H, P/N), of the first head
  Weights second[kMaxDirections];     // weight_hr (P, H), or weight_hh (H, P/N) of a late gate, of the first head
  F* dpre[2];                    // (strands, B, pre_row) gradients of the recurrent halves of the first gates, by turns
  F* dh;                         // (strands, B, h_row) gradient of h that does not come through weight_hh
  F* dinner[slots(kInner)];      // (strands, B, unit_row)
  F* dtotal;                     // (strands, B, h_row) whole gradient of h, where the cells wait for that of all units
  F* dlate;                      // (strands, B, h_row) gradient of a late gate
  F* dreset_h;                   // (strands, B, h_row) sums for grad_reset_hx
  F* dreset_inner[slots(kInner)];  // (strands, B, unit_row) and for grad_reset_cx
  F* sums;                       // (threads, kSumRows, kWidth)

  BackwardPass(const BackwardParams& p, Arena& arena)
      : p(p), projected(can_project<Cell> && p.weight_hr[0]), units(p.units()), depth(p.depth()),
        pre_row(padded_row<F>(kFirst * units, kLanes)), h_row(padded_row<F>(depth, kUnits)), unit_row(padded_row<F>(units, kUnits)),
        crew(arena, p.threads) {
    // One product in the whole call: a step needs none, but the gradient of hx does. Packing then goes through a scratch.
    const bool packs = Cell::kMultiplies && p.steps.T > 1;
    F* scratch = arena.take<F>(packs ? 0 : p.threads * scratch_size());
    for (int64_t d = 0; d < p.D; ++d) {
      recurrent[d] = {static_cast<const S*>(p.weight_hh[d]), depth, kFirst * units, units, p.H, nullptr, scratch};
      second[d] = {static_cast<const S*>(p.weight_hr[d]), projected ? p.H : 0, p.P, p.P, p.P, nullptr, scratch};
      if (Cell::kLate)
        second[d] = {static_cast<const S*>(p.weight_hh[d]) + kFirst * p.H * depth, depth, units, units, p.H, nullptr, scratch};
      if (!packs) continue;
      recurrent[d].panels = arena.take<F>(p.N * recurrent[d].blocks() * recurrent[d].block_size());
      second[d].panels = arena.take<F>(p.N * second[d].blocks() * second[d].block_size());
    }
    const int64_t state_rows = p.strands() * p.steps.B;
    dpre[0] = arena.take<F>(state_rows * pre_row);
    dpre[1] = arena.take<F>(state_rows * pre_row);
    dh = arena.take<F>(state_rows * h_row);
    for (int k = 0; k < kInner; ++k) dinner[k] = arena.take<F>(state_rows * unit_row);
    dtotal = arena.take<F>(projected || Cell::kLate || Cell::kNorms ? state_rows * h_row : 0);
    dlate = arena.take<F>(Cell::kLate ? state_rows * h_row : 0);
    dreset_h = arena.take<F>(p.grad_reset_hx ? state_rows * h_row : 0);
    for (int k = 0; k < kInner; ++k) dreset_inner[k] = arena.take<F>(p.grad_reset_cx ? state_rows * unit_row : 0);
    sums = arena.take<F>(p.threads * kSumRows * kWidth);
  }

  // Of a thread.
  int64_t scratch_size() const { return (kFirst * units > depth ? kFirst * units : depth) * kWidth; }

  Division divide_among(int threads) const {
    const int64_t products = Cell::kMultiplies ? depth * Cell::kGates * units + (projected ? p.P * p.H : 0) : kCellWork * p.H;
    const int64_t blocks = blocks_of(depth, kUnits);
    return divide(threads, p.strands(), p.steps.B, blocks, products * int64_t(sizeof(F)), 2 * p.steps.B * products);
  }

  void run() const {
    crew.run([this](int threads) { return divide_among(threads); },
             [this](TeamRows rows, int thread, int member, Barrier team, int place, Barrier strand) {
               prepare(rows, member, team.members, place, strand);
               strand.wait(place);
               Member{*this, rows, thread, member, team}.run();
             });
  }

  // Gradients of the last states; weights.
  void prepare(const TeamRows& rows, int member, int members, int place, const Barrier& strand) const {
    const int64_t d = rows.strand / p.N, head = rows.strand % p.N, first = head * units;
    const Range mine = share(rows.count(p.steps.B), members, member);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const int64_t row = rows.strand * p.steps.B + rows.batch_row(r), given = p.steps.given_row(d, rows.batch_row(r));
      load_row(dh + row * h_row, h_row, static_cast<const S*>(p.grad_hy), given * p.P + first, depth);
      for (int k = 0; k < kInner; ++k)
        load_row(dinner[k] + row * unit_row, unit_row, static_cast<const S*>(p.grad_cy), (k * p.D * p.steps.B + given) * p.H + first,
                 units);
      const S* const zeros = nullptr;
      if (p.grad_reset_hx) load_row(dreset_h + row * h_row, h_row, zeros, 0, depth);
      for (int k = 0; k < kInner && p.grad_reset_cx; ++k) load_row(dreset_inner[k] + row * unit_row, unit_row, zeros, 0, units);
    }
    for (const Weights& weights : {recurrent[d].head(head), second[d].head(head)}) {
      const Range blocks = share(weights.panels ? weights.blocks() : 0, strand.members, place);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) weights.pack(block);
    }
  }

  struct Member {
    const BackwardPass& pass;
    const TeamRows rows;
    const int thread, member;
    const Barrier barrier;

    const BackwardParams& p = pass.p;
    const int64_t d = rows.strand / p.N, head = rows.strand % p.N;
    const int64_t units = pass.units, first = head * units;  // first: unit 0 of the strand, in tensors
    F* const sums = pass.sums + thread * kSumRows * kWidth;
    const Weights recurrent = own(pass.recurrent[d].head(head)), second = own(pass.second[d].head(head));
    const Range columns = share(recurrent.blocks(), barrier.members, member);  // of the hidden state
    const Range blocks = pass.projected ? share(second.blocks(), barrier.members, member) : columns;  // of units

    Weights own(Weights weights) const {
      weights.scratch += weights.panels ? 0 : thread * pass.scratch_size();
      return weights;
    }
    int64_t state_row(int64_t r) const { return rows.strand * p.steps.B + rows.batch_row(r); }
    int64_t given_row(int64_t r) const { return p.steps.given_row(d, rows.batch_row(r)); }

    // Rows of the batch come and go: those of the step before (in this order) bring gate gradients, those of this step take
    // them through the cell; a row that is not in this step any more has arrived at its initial state.
    void run() const {
      const int64_t T = p.steps.T;
      int64_t before = 0;
      for (int64_t s = 0; s <= T; ++s) {
        const int64_t t = d ? s : T - 1 - s;
        const int64_t count = s < T ? rows.count(p.steps.rows(t)) : 0;
        if (s == T && !p.grad_hx && !p.grad_cx && !p.grad_reset_hx) break;
        const F* dpre = pass.dpre[s & 1];
        F* dpre_new = pass.dpre[(s + 1) & 1];
        const int64_t visited = count > before ? count : before;
        const int64_t row_stride = rows.slices;
        const bool needs_product = Cell::kMultiplies && (s < T || p.grad_hx || p.grad_reset_hx);
        const bool back = s & 1;
        for_groups(columns, visited, back, [&](const Range& group) {
          visit(needs_product ? recurrent : Weights{}, group, back, pass.depth, dpre, row_stride * pass.pre_row, pass.pre_row, before, count,
                visited, [&](int64_t r, int64_t u, int n, auto sum) __attribute__((always_inline)) {
                  if constexpr (can_project<Cell>)
                    if (pass.projected) return arrive(t, r, u, n, sum);
                  if constexpr (Cell::kNorms > 0) leave_total(r, u, new_dh(t, r, u, n, sum));
                  else if constexpr (Cell::kLate) leave_late(t, r, u, n, new_dh(t, r, u, n, sum));
                  else cell(t, r, u, n, new_dh(t, r, u, n, sum), dpre_new);
                });
        });
        if constexpr (can_project<Cell> || Cell::kLate) {
          if (pass.projected || Cell::kLate) {
            barrier.wait(member);  // for the gradient of the whole projected state, or of all late gates
            const F* gradients = Cell::kLate ? pass.dlate : pass.dtotal;
            for_groups(blocks, count, back, [&](const Range& group) {
              visit(second, group, back, units, gradients, row_stride * pass.h_row, pass.h_row, count, count, count,
                    [&](int64_t r, int64_t u, int n, auto sum) __attribute__((always_inline)) {
                      if constexpr (Cell::kLate) cell(t, r, u, n, total<decltype(sum)>(r, u), dpre_new, &sum);
                      else cell(t, r, u, n, sum, dpre_new);
                    });
            });
          }
        }
        if constexpr (Cell::kNorms > 0) {
          barrier.wait(member);  // for the gradient of h of all units
          const Range mine = share(count, barrier.members, member);
          for (int64_t r = mine.begin; r < mine.end; ++r) normalised(t, r, dpre_new);
        }
        for (int64_t r = count; r < before; ++r) leave_inner(r);
        before = count;
        barrier.wait(member);  // for the gate gradients of all units
      }
      for (int64_t r = 0; r < rows.count(p.steps.B); ++r) leave_reset(r);
    }

    // The units of a group of blocks in the rows [0, visited), where sum is a times the block's weights in the first `multiplied`
    // rows and zero behind: calls each(row, unit, lanes, sum) for the rows [0, staying), of one or two rows at a time, and leave_h
    // for the rest.
    template <class Each>
    FUSEDRNN_INLINE void visit(const Weights& weights, const Range& group, bool back, int64_t end, const F* a, int64_t a_stride,
                               int64_t a_row, int64_t multiplied, int64_t staying, int64_t visited, const Each& each) const {
      for (int64_t piece = 0, pieces = blocks_of(visited, kSumRows); piece < pieces; ++piece) {
        const int64_t begin = share(visited, pieces, piece).begin, chunk = share(visited, pieces, piece).end - begin;
        const int64_t with = multiplied - begin < chunk ? multiplied - begin : chunk;
        const int64_t stay = staying - begin < chunk ? staying - begin : chunk;
        __builtin_memset(sums, 0, (group.end - group.begin) * chunk * kWidth * sizeof(F));
        if (with > 0 && weights.w)
          there_or_back(group, back, [&](int64_t block) __attribute__((always_inline)) {
            weights.multiply(block, a + state_row(begin) * a_row, a_stride, with, sums + (block - group.begin) * chunk * kWidth);
          });
        F* block_sums = sums;
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
        if (p.grad_reset_hx && p.steps.ends(t, rows.batch_row(r + i), d)) total = arrive_anew(r + i, u, total);
        if (p.grad_output) total = total + load(static_cast<const S*>(p.grad_output) + output_at(t, r + i) + u, n);
      }
      return sum;
    }
    // The whole gradient of the hidden state that the next step began with, where that was reset_hx: nothing of it goes on.
    FUSEDRNN_INLINE V arrive_anew(int64_t r, int64_t u, V total) const {
      add(pass.dreset_h + state_row(r) * pass.h_row + u, total);
      return V(F(0));
    }
    static FUSEDRNN_INLINE void add(F* to, V more) { store(to, load(to) + more); }
    FUSEDRNN_INLINE V hidden_mask(int64_t r, int64_t u, int n) const {
      return load(static_cast<const S*>(p.hidden_mask) + given_row(r) * p.P + first + u, n);
    }
    int64_t output_at(int64_t t, int64_t r) const {
      return (p.steps.row(t, rows.batch_row(r)) * p.D + d) * p.P + first;
    }

    // The projected state's gradient is complete: hand it to whoever needs all of it.
    template <int kRows>
    FUSEDRNN_INLINE void arrive(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> sum) const {
      const Rows<F, kRows> total = new_dh(t, r, u, n, sum);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = state_row(r + i) * pass.h_row + u;
        store(pass.dh + at, V(F(0)));
        store(pass.dtotal + at, total.row[i]);
        store(static_cast<S*>(p.grad_proj) + output_at(t, r + i) + u, total.row[i], n);
      }
    }

    template <int kRows>
    FUSEDRNN_INLINE void leave_total(int64_t r, int64_t u, Rows<F, kRows> total) const {
      for (int i = 0; i < kRows; ++i) store(pass.dtotal + state_row(r + i) * pass.h_row + u, total.row[i]);
    }
    template <class Value>
    FUSEDRNN_INLINE Value total(int64_t r, int64_t u) const {
      Value found;
      for (int i = 0; i < int(sizeof found.row / sizeof(V)); ++i) found.row[i] = load(pass.dtotal + state_row(r + i) * pass.h_row + u);
      return found;
    }

    // The gradient of h, and of the late gate, which the second product takes.
    template <int kRows>
    FUSEDRNN_INLINE void leave_late(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> new_dh) const {
      leave_total(r, u, new_dh);
      Reads<kRows> of;
      read(t, r, u, n, new_dh, of);
      const Rows<F, kRows> late = Cell::late_backward(given<kRows>(r, u, n), of.saved, of.state, of.grad_new);
      for (int i = 0; i < kRows; ++i) store(pass.dlate + state_row(r + i) * pass.h_row + u, late.row[i]);
    }

    // What the cell backward of some units begins with.
    template <int kRows>
    struct Reads {
      Rows<F, kRows> saved[slots(Cell::kSaved)], state[Cell::kStates], new_state[Cell::kStates], grad_new[Cell::kStates];
      Rows<F, kRows> past[Cell::kStates];  // the gradient of what stays as it was goes past the cell
      bool begins[kRows];
    };
    template <int kRows>
    FUSEDRNN_INLINE void read(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> new_dh, Reads<kRows>& of) const {
      using Value = Rows<F, kRows>;
      Value(&saved)[slots(Cell::kSaved)] = of.saved;
      Value(&state)[Cell::kStates] = of.state, (&new_state)[Cell::kStates] = of.new_state;
      Value(&grad_new)[Cell::kStates] = of.grad_new, (&past)[Cell::kStates] = of.past;
      bool(&begins)[kRows] = of.begins;
      grad_new[0] = new_dh;
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = this->state_row(r + i), row = p.steps.row(t, b);
        const int64_t from_row = p.steps.row_before(t, b, d);  // where the states lie that this step began with
        const bool from_given = from_row < 0;
        begins[i] = p.steps.begins(t, b, d);
        const S* output = static_cast<const S*>(p.output) + d * p.P + first + u;
        const S* states = static_cast<const S*>(p.states) + d * p.stored * p.H + first + u;
        const S* saved_row = static_cast<const S*>(p.saved) + (row * p.D + d) * Cell::kSaved * p.H + first + u;
#pragma GCC unroll 4
        for (int k = 0; k < Cell::kSaved; ++k) saved[k].row[i] = load(saved_row + k * p.H, n);
        // Cells whose hidden state may be projected do not look at state 0 in backward.
        state[0].row[i] = pass.projected         ? V(F(0))
                          : begins[i] || from_given ? initial(begins[i] ? p.reset_hx : p.hx, p.P, u, n, given_row(r + i))
                                                    : load(output + from_row * p.D * p.P, n);
        new_state[0].row[i] = pass.projected ? V(F(0)) : load(output + row * p.D * p.P, n);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k) {
          const int64_t given = k * p.D * p.steps.B + given_row(r + i);
          state[k + 1].row[i] = begins[i] || from_given ? initial(begins[i] ? p.reset_cx : p.cx, p.H, u, n, given)
                                                        : load(states + (from_row * p.D * p.stored + k) * p.H, n);
          new_state[k + 1].row[i] = load(states + (row * p.D * p.stored + k) * p.H, n);
          grad_new[k + 1].row[i] = load(pass.dinner[k] + state_row * pass.unit_row + u);
          if (p.grad_states)
            grad_new[k + 1].row[i] = grad_new[k + 1].row[i] + load(static_cast<const S*>(p.grad_states) +
                                                                     ((row * p.D + d) * p.stored + k) * p.H + first + u, n);
        }
      }

      for (int k = 0; k < Cell::kStates; ++k) past[k] = Value(F(0));
      if (p.zoneout) {
        for (int k = 0; k < Cell::kStates; ++k) {
          Value z;
          for (int i = 0; i < kRows; ++i) {
            const int64_t row = p.steps.row(t, rows.batch_row(r + i));
            const int64_t made = ((row * p.D + d) * p.stored + kInner + k) * p.H + first + u;
            z.row[i] = load(static_cast<const S*>(p.zoneout) + p.zoneout_at(row, d, Cell::kStates) + k * p.H + first + u, n);
            new_state[k].row[i] = load(static_cast<const S*>(p.states) + made, n);
          }
          past[k] = rounded(z * grad_new[k]);
          grad_new[k] = rounded(grad_new[k] - past[k]);
        }
      }
    }

    template <int kRows>
    FUSEDRNN_INLINE auto given(int64_t r, int64_t u, int n) const {
      auto found = given_to<Cell, S, F, kRows>(p, d, first + u, n);
      if constexpr (Cell::kLate)
        for (int i = 0; i < kRows; ++i) found.mask.row[i] = p.hidden_mask ? hidden_mask(r + i, u, n) : V(F(1));
      return found;
    }

    // Of a normalised row, what its cells need of all units, and what is gathered for that.
    struct Row {
      Norm<F> norms[2];             // of its products, and of its state 1
      bool only_out;                // whether a cell is to do no more than gather what goes out of the normalised state
      F mean = 0, products = 0;     // of that: see NormMeans
      NormMeans<F> gathered{};
    };

    // The cell backward of n units from u on, of kRows rows from r on at step t. new_dh: gradient of their new hidden state; middle: of
    // what the late gate multiplied.
    template <int kRows>
    FUSEDRNN_INLINE void cell(int64_t t, int64_t r, int64_t u, int n, Rows<F, kRows> new_dh, F* dpre_new,
                              const Rows<F, kRows>* middle = nullptr, Row* of_row = nullptr) const {
      using Value = Rows<F, kRows>;
      Reads<kRows> of;
      Value grad_pre[kGrads<Cell>], grad_state[Cell::kStates];
      read(t, r, u, n, new_dh, of);
      auto given = this->given<kRows>(r, u, n);
      if constexpr (Cell::kLate) given.middle = *middle;
      if constexpr (Cell::kNorms > 0) set_norms(given, of_row->norms);
      if constexpr (Cell::kNorms == 2) {
        const Value normed = given.inner.of(of.new_state[1]);
        const Value grad = rounded(Cell::out_backward(given, of.saved, of.new_state, of.grad_new));
        if (of_row->only_out) return of_row->gathered.add(grad.row[0], normed.row[0], n);
        of.grad_new[1] = of.grad_new[1] + given.inner.grad(grad, normed, Value(of_row->mean), Value(of_row->products));
      }

      cell_backward<Cell>(given, of.saved, of.state, of.new_state, of.grad_new, grad_pre, grad_state);

      if (p.zoneout)
        for (int k = 0; k < Cell::kStates; ++k) grad_state[k] = rounded(grad_state[k]) + of.past[k];
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        const int64_t b = rows.batch_row(r + i), state_row = this->state_row(r + i), row = p.steps.row(t, b);
        const bool drops = of.begins[i] && !p.grad_reset_hx;  // what nobody wants of the gradient of h
        S* grad_pre_row = static_cast<S*>(p.grad_pre) + (row * p.D + d) * kGrads<Cell> * p.H + first + u;
#pragma GCC unroll 8
        for (int k = 0; k < kGrads<Cell>; ++k) store(grad_pre_row + k * p.H, grad_pre[k].row[i], n);
        F* dpre_row = dpre_new + state_row * pass.pre_row + u;
#pragma GCC unroll 4
        for (int g = 0; g < pass.kFirst; ++g)  // of a normalised row, they are not done yet
          store(dpre_row + g * units, drops && !Cell::kNorms ? V(F(0)) : grad_pre[Cell::h_pre(g)].row[i], n);
        for (int g = 0; g < Cell::kGates && Cell::kNorms; ++g)
          of_row->gathered.add(grad_pre[Cell::h_pre(g)].row[i], given.products.of(of.saved[Cell::kSaved - Cell::kGates + g]).row[i], n);
        if (!pass.projected) store(pass.dh + state_row * pass.h_row + u, drops ? V(F(0)) : grad_state[0].row[i]);
        if (of.begins[i] && p.grad_reset_cx)
#pragma GCC unroll 4
          for (int k = 0; k < kInner; ++k) add(pass.dreset_inner[k] + state_row * pass.unit_row + u, grad_state[k + 1].row[i]);
#pragma GCC unroll 4
        for (int k = 0; k < kInner; ++k)
          store(pass.dinner[k] + state_row * pass.unit_row + u, of.begins[i] ? V(F(0)) : grad_state[k + 1].row[i]);
      }
    }

    // The cells of a whole row.
    void normalised(int64_t t, int64_t r, F* dpre_new) const {
      const int64_t H = p.H, b = rows.batch_row(r), row = p.steps.row(t, b), states = d * p.stored * H;
      const S* products = static_cast<const S*>(p.saved) + ((row * p.D + d + 1) * Cell::kSaved - Cell::kGates) * H;
      auto norm_at = [&](const S* numbers, int64_t count) {
        return norm_of<F>(count, [&](const auto& use) __attribute__((always_inline)) {
          for (int64_t i = 0; i < count; i += kLanes) use(load(numbers + i, lanes_left<F>(i, count)), lanes_left<F>(i, count));
        });
      };
      Row of_row{{norm_at(products, Cell::kGates * H)}, Cell::kNorms == 2};
      auto cells = [&] {
        of_row.gathered = {};
        for (int64_t u = 0; u < H; u += kLanes)
          cell<1>(t, r, u, lanes_left<F>(u, H), total<Rows<F, 1>>(r, u), dpre_new, nullptr, &of_row);
      };
      if constexpr (Cell::kNorms == 2) {
        const int64_t made = p.zoneout ? kInner + 1 : 0;  // before some of it stayed as it was
        of_row.norms[1] = norm_at(static_cast<const S*>(p.states) + row * p.D * p.stored * H + states + made * H, H);
        cells();
        of_row.mean = of_row.gathered.mean(H), of_row.products = of_row.gathered.mean_of_products(H);
        of_row.only_out = false;
      }
      cells();

      // Where h was nothing, all products were zero whatever the weights: their scale is so large that no format need hold their
      // gradients, which nobody takes.
      const bool begins = p.steps.begins(t, b, d), drops = begins && !p.grad_reset_hx;
      const bool from_nothing = begins ? !p.reset_hx : !p.hx && p.steps.row_before(t, b, d) < 0;
      const V mean(of_row.gathered.mean(Cell::kGates * H)), mean_of_products(of_row.gathered.mean_of_products(Cell::kGates * H));
      const Norm<V> norm{V(of_row.norms[0].mean), V(of_row.norms[0].scale)};
      S* grad_pre_row = static_cast<S*>(p.grad_pre) + (row * p.D + d) * kGrads<Cell> * H;
      F* dpre_row = dpre_new + state_row(r) * pass.pre_row;
      for (int g = 0; g < Cell::kGates; ++g)
        for (int64_t u = 0; u < H; u += kLanes) {
          const int n = lanes_left<F>(u, H);
          const int64_t at = g * H + u;
          V grad = norm.grad(load(dpre_row + at, n), norm.of(load(products + at, n)), mean, mean_of_products);
          if (from_nothing) grad = V(F(0));
          store(dpre_row + at, drops ? V(F(0)) : grad, n);
          store(grad_pre_row + Cell::h_pre(g) * H + u, grad, n);
        }
    }

    FUSEDRNN_INLINE V initial(const void* states, int64_t width, int64_t u, int n, int64_t row) const {
      return load_given<F, S>(states, width, first + u, n, row);
    }

    void leave_h(int64_t r, int64_t u, int n, V sum) const {
      if (!p.grad_hx && !p.grad_reset_hx) return;
      if (p.hidden_mask) sum = rounded(sum * hidden_mask(r, u, n));
      V total = sum + load(pass.dh + state_row(r) * pass.h_row + u);
      if (p.grad_reset_hx && d == 0 && p.steps.begins(0, rows.batch_row(r), d)) total = arrive_anew(r, u, total);
      if (p.grad_hx) store(static_cast<S*>(p.grad_hx) + given_row(r) * p.P + first + u, total, n);
    }

    void leave_inner(int64_t r) const {
      for (int k = 0; k < kInner && p.grad_cx; ++k)
        leave(blocks, pass.dinner[k] + state_row(r) * pass.unit_row, units, p.grad_cx, (k * p.D * p.steps.B + given_row(r)) * p.H);
    }

    // This member's part of the sums over all resets.
    void leave_reset(int64_t r) const {
      if (p.grad_reset_hx)
        leave(columns, pass.dreset_h + state_row(r) * pass.h_row, pass.depth, p.grad_reset_hx, given_row(r) * p.P);
      for (int k = 0; k < kInner && p.grad_reset_cx; ++k)
        leave(blocks, pass.dreset_inner[k] + state_row(r) * pass.unit_row, units, p.grad_reset_cx,
              (k * p.D * p.steps.B + given_row(r)) * p.H);
    }
    // Some blocks of a strand's `count` numbers, in the row of the caller's that begins at `at`.
    void leave(const Range& blocks, const F* from, int64_t count, void* to, int64_t at) const {
      for (int64_t u = blocks.begin * kUnits; u < blocks.end * kUnits && u < count; u += kLanes)
        store(static_cast<S*>(to) + at + first + u, load(from + u), lanes_left<F>(u, count));
    }
  };
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
