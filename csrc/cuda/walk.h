// The order in which a pass goes through the steps of a direction, and what a kernel has to know of each. The same formulas
// serve the host, which launches a grid for every step, and kernels that go through many steps by themselves.
#pragma once
#include "../params.h"

namespace fusedrnn {

// The s-th step of a walk is step t of the sequence. Direction 0 goes up in a forward pass, direction 1 in a backward one.
FUSEDRNN_ANYWHERE bool goes_up(int d, bool backward) { return (d == 0) != backward; }
FUSEDRNN_ANYWHERE int step_of_walk(int T, int s, bool up) { return up ? s : T - 1 - s; }

struct WalkPlace;

// The rows of a call's steps in the order of a walk.
struct Walk {
  Steps steps;
  bool backward;
  int t(int d, int s) const { return step_of_walk(int(steps.T), s, goes_up(d, backward)); }
  int64_t rows(int d, int s) const { return steps.rows(t(d, s)); }
  int64_t first(int d, int s) const { return s < steps.T ? steps.row_offset(t(d, s)) : 0; }
  WalkPlace place(int d, int s) const;
};

// The rows of a step: none before the first step and behind the last.
template <class Rows>
FUSEDRNN_ANYWHERE int rows_of(const Rows& rows, int T, int d, int s) {
  return s >= 0 && s < T ? int(rows.rows(d, s)) : 0;
}

// A walk for a kernel's argument: some of its steps, from begin - 1 to end + 1, if they are of different sizes.
struct ListedRows {
  static constexpr int kMost = 256;
  int B, begin, end;
  bool listed;
  int count[kMaxDirections][kMost];
  FUSEDRNN_ANYWHERE int rows(int d, int s) const { return listed ? count[d][s - begin + 1] : B; }
};

// From step `begin` as far as a list reaches, or to `end`.
inline ListedRows list_rows(const Walk& walk, int directions, int begin, int64_t end) {
  ListedRows rows{int(walk.steps.B), begin, int(end), walk.steps.batch_sizes != nullptr, {}};
  if (!rows.listed) return rows;
  if (rows.end > begin + ListedRows::kMost - 3) rows.end = begin + ListedRows::kMost - 3;
  for (int d = 0; d < directions; ++d)
    for (int s = begin - 1; s <= rows.end + 1; ++s)
      rows.count[d][s - begin + 1] = rows_of(walk, int(walk.steps.T), d, s);
  return rows;
}

// Where a walk is.
struct WalkPlace {
  int s, t;        // the walk's step, and that of the sequence
  int64_t first;   // row of the sequence
  int last_count;  // rows of the step before this one in the walk,
  int count;       //   of this one,
  int next_count;  //   and of the one after it
  // The first row of the next step.
  FUSEDRNN_ANYWHERE int64_t first_of_next(bool up) const { return up ? first + count : first - next_count; }
};
template <class Rows>
FUSEDRNN_ANYWHERE WalkPlace walk_place(const Rows& rows, int T, int d, int s, int64_t first, bool up) {
  return {s, step_of_walk(T, s, up), first, rows_of(rows, T, d, s - 1), rows_of(rows, T, d, s), rows_of(rows, T, d, s + 1)};
}
// The place of the next step.
template <class Rows>
FUSEDRNN_ANYWHERE void go_on(WalkPlace& place, const Rows& rows, int T, int d, bool up) {
  place.first = place.first_of_next(up);
  place.t += up ? 1 : -1;
  place.last_count = place.count;
  place.count = place.next_count;
  place.next_count = rows_of(rows, T, d, ++place.s + 1);
}

inline WalkPlace Walk::place(int d, int s) const {
  return walk_place(*this, int(steps.T), d, s, first(d, s), goes_up(d, backward));
}

// The argument of a kernel that goes through many steps by itself; for Step see product.cuh.
template <class Step>
struct ManySteps {
  Step step;
  ListedRows rows;
  int64_t first[kMaxDirections];  // row of step rows.begin
  uint32_t* done;                 // exchange.cuh; null where blocks do not wait for each other
};

// Where number u of row b of a step lies in (rows, D, width), and in (D, B, width).
FUSEDRNN_ANYWHERE int64_t in_row(int64_t place, int b, int64_t D, int64_t width, int u) {
  return (place + b * int(D)) * unsigned(width) + unsigned(u);
}
FUSEDRNN_ANYWHERE int64_t in_state(const Steps& steps, int d, int b, int64_t width, int u) {
  return int64_t(uint64_t(unsigned(d * int(steps.B) + b)) * unsigned(width) + unsigned(u));
}

// Sequences whose lengths only the device knows: all rows are in every step, and those whose end has come keep the states they have.
FUSEDRNN_ANYWHERE bool runs(const Steps& steps, int64_t t, int64_t b) { return !steps.lengths || t < steps.lengths[b]; }
// Whether step t is the last of row b, of those that are in the step.
FUSEDRNN_ANYWHERE bool is_last(const Steps& steps, int64_t t, int64_t b, int64_t d, bool leaves) {
  if (!steps.lengths) return leaves;
  return d ? t == 0 : t + 1 == (steps.lengths[b] < steps.T ? steps.lengths[b] : steps.T);
}

struct ForwardStep {
  int t;               // of the sequence
  int64_t gates_x_at;  // where the input's gates of its first row lie
  int64_t first;       // row of the sequence
  int64_t place;       // of that row in (rows, D)
  int count;           // rows of the step
  int staying;         // rows that go on to the next step; for the others this one is the last
  int multiplied;      // rows with a state to multiply: all, or none
  int turn;            // which of two buffers of states is before the step
  int64_t cut;         // the row of `reset` that says whether its first row's state ends here
};

// The step of direction d at a place of the walk.
FUSEDRNN_ANYWHERE ForwardStep step_at(const ForwardParams& p, int d, const WalkPlace& place) {
  const auto [s, t, first, last, count, next] = place;
  const int64_t cut = d == 0 ? first + count : first;
  const int64_t gates_x_at = p.steps.offsets ? first * p.gates_x_row[d] : t * p.gates_x_step[d];
  return {t,     gates_x_at, first, first * int(p.D) + d, count, next < count ? next : count, s > 0 || p.hx || p.reset_hx ? count : 0,
          s & 1, cut};
}

// The last step of a backward walk has no rows: it leaves the gradients of the initial states.
struct BackwardStep {
  int t;                 // of the sequence
  int64_t first;         // row of the sequence
  int64_t place;         // of that row in (rows, D)
  int count;             // rows of the step
  int64_t before_place;  // the step whose states this one began with: its first row's,
  int before_count;      //   and its rows; the others began with hx and cx
  int multiplied;        // rows that the later step had
  int visited;           // rows of this step, or of the later one if it has more: those rows began with the later step
  int turn;              // which of two buffers of gradients the later step wrote
  int64_t cut;           // the row of `reset` that says whether its first row began anew
  int cut_count;         // rows that could
};

FUSEDRNN_ANYWHERE BackwardStep step_at(const BackwardParams& p, int d, const WalkPlace& place) {
  const auto [s, t, first, later, count, before] = place;
  const int64_t before_first = place.first_of_next(goes_up(d, true));
  const int before_count = before < count ? before : count;
  const int D = int(p.D);
  return {t, first, first * D + d, count, before_first * D + d, before_count, later, count > later ? count : later, s & 1,
          d == 0 ? first : before_first, d == 0 ? count : before_count};
}

}  // namespace fusedrnn
