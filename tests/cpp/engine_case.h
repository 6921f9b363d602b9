// The calls that engine_test makes: which cell, format, shape, layout, optional tensors and threads. A case's number says all.
#pragma once
#include <string>
#include <vector>

#include "cells/cells.h"
#include "check.h"
#include "formats.h"

namespace test {

struct Case {
  int cell = 0;
  Dtype dtype = Dtype::kFloat32;
  int64_t T = 1, B = 1, I = 1, H = 1, P = 0, D = 1;  // P = 0: no projection
  bool packed = false, uneven = false;        // uneven: padded, of different lengths, in any order
  int threads = 1, granted = 1;               // asked for; and how many the runtime gives
  int layout = 0;                             // of gates_x: 0 dense, 1 batch first, 2 rows with gaps; direction 1 and input: other ones
  bool hx = true, cx = true, bias = true, save = true, grad_output = true, grad_hy = true, grad_cy = true;
  bool need_grad_hx = true, need_grad_cx = true;
  bool need_grad_weight_ih = true, need_grad_weight_hh = true, need_grad_bias = true, need_grad_weight_hr = true;
  bool extreme = false;                       // pre-activations of +-1e30
  // What becomes of the states between steps: sequences that begin within a row, from given states; parts that stay, of each row's own or of all rows
  // alike; a mask of the hidden state; and gradients of the inner states of every step.
  bool reset = false, reset_hx = false, reset_cx = false, zoneout = false, alike = false, hidden_mask = false, grad_states = false;
  bool unit = true;                           // the units' own numbers, of a cell that has them
  bool feeds = false;                         // whether forward is given the input and its weights in the place of gates_x
  fusedrnn::Choice choice;                    // of a cell that has one
  uint64_t seed = 0;
};

struct Traits {
  const char* name = "";
  int gates = 0, pre = 0, states = 0, saved = 0, unit = 0, normaliser = 0, norms = 0, late = 0;
  bool multiplies = true;
  bool projects() const { return states == 2 && unit == 0; }
};
inline Traits traits_of(int cell) {
  Traits traits;
  fusedrnn::for_each_cell([&](int id, auto type) {
    using Cell = decltype(type);
    if (id == cell) traits = {Cell::kName, Cell::kGates, Cell::kPre, Cell::kStates, Cell::kSaved, Cell::kUnit, Cell::kNormaliser,
                             Cell::kNorms, Cell::kLate, Cell::kMultiplies};
  });
  return traits;
}

inline std::string text(const Case& c, size_t number) {
  char line[500];
  std::snprintf(line, sizeof line,
                "case %zu: %s %s T%d B%d I%d H%d P%d D%d %s layout %d threads %d/%d%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s%s choice %d,%d,%d,%g", number,
                traits_of(c.cell).name, name_of(c.dtype), int(c.T), int(c.B), int(c.I), int(c.H), int(c.P), int(c.D),
                c.packed ? "packed" : c.uneven ? "uneven" : "padded", c.layout, c.granted, c.threads, c.hx ? " hx" : "", c.cx ? " cx" : "", c.bias ? " bias" : "", c.save ? " save" : "",
                c.grad_output ? " grad_output" : "", c.grad_hy ? " grad_hy" : "", c.grad_cy ? " grad_cy" : "",
                c.need_grad_hx ? " need_grad_hx" : "", c.need_grad_cx ? " need_grad_cx" : "",
                c.need_grad_weight_ih ? " need_grad_weight_ih" : "", c.need_grad_weight_hh ? " need_grad_weight_hh" : "",
                c.need_grad_bias ? " need_grad_bias" : "", c.need_grad_weight_hr ? " need_grad_weight_hr" : "", c.extreme ? " extreme" : "",
                c.reset ? " reset" : "", c.reset_hx ? " reset_hx" : "", c.reset_cx ? " reset_cx" : "", c.zoneout ? " zoneout" : "", c.alike ? " alike" : "", c.hidden_mask ? " hidden_mask" : "",
                c.grad_states ? " grad_states" : "", c.unit ? " unit" : "", c.feeds ? " feeds" : "", int(c.choice.gate), int(c.choice.candidate),
                int(c.choice.output), c.choice.clip);
  return line;
}

// What a case leaves to chance: optional tensors, threads, layout, length, projection.
inline Case random_case(int cell, Dtype dtype, int64_t D, bool packed, int64_t B, int64_t H, bool project, uint64_t seed) {
  Random random{seed};
  auto chance = [&](int one_in) { return random.below(one_in) != 0; };
  Case c;
  c.cell = cell, c.dtype = dtype, c.D = D, c.packed = packed, c.B = B, c.H = H, c.seed = seed;
  c.T = packed ? 1 + random.below(6) : random.below(2) ? 3 : 1;
  if (project) c.P = random.below(2) ? H : 1 + random.below(H);
  c.threads = 1 + int(random.below(5));
  c.granted = chance(3) ? c.threads : 1 + int(random.below(c.threads));
  c.layout = int(random.below(3));
  c.hx = chance(3), c.cx = chance(3), c.bias = chance(4), c.save = chance(8);
  c.grad_output = chance(4), c.grad_hy = chance(3), c.grad_cy = chance(3);
  c.need_grad_hx = chance(3), c.need_grad_cx = chance(3);
  c.extreme = !chance(12);
  c.I = 1 + random.below(2 * H);
  c.need_grad_weight_ih = chance(4), c.need_grad_weight_hh = chance(4), c.need_grad_bias = chance(4);
  c.need_grad_weight_hr = chance(4);
  c.reset = !chance(4), c.grad_states = !chance(3);
  c.zoneout = !chance(5) && !project, c.alike = !chance(2), c.hidden_mask = !chance(5) && !project;
  const Traits traits = traits_of(cell);
  c.hidden_mask = c.hidden_mask && traits.multiplies;
  c.extreme = c.extreme && !traits.normaliser;
  if (traits.norms) c.bias = c.need_grad_bias = false;
  // What has no bounds would go beyond float where double goes on.
  const int values = c.extreme ? 1 : 3;
  c.unit = chance(4);
  c.choice = {fusedrnn::Function(random.below(3)), fusedrnn::Function(3 + random.below(values)),
              fusedrnn::Function(3 + random.below(values)), chance(2) ? 0.0 : 0.4};
  c.reset_hx = c.reset && chance(4), c.reset_cx = c.reset && chance(4);
  return c;
}

// Whether a case is one of those, one in `every`, that are taken by lot number `lot`. Drawn from other numbers than what the case
// leaves to chance, so that not all that are taken have the same length.
inline bool taken(size_t number, size_t every, size_t lot) {
  return Random{number + 3000000 + (lot << 32)}.below(int64_t(every)) == 0;
}

// Every cell, format, direction count, packed or padded, odd and even sizes; then larger ones, in which several threads share
// a sequence, the depth of a product takes several passes, and the rows of a batch several visits.
inline std::vector<Case> all_cases() {
  std::vector<Case> cases;
  auto add = [&](int cell, Dtype dtype, int64_t D, bool packed, int64_t B, int64_t H, bool project) {
    cases.push_back(random_case(cell, dtype, D, packed, B, H, project, cases.size()));
    Case& c = cases.back();
    const Traits traits = traits_of(cell);
    c.feeds = Random{c.seed + 2000000}.below(3) == 0 && !traits.norms && !traits.late && !c.extreme;
    if (c.feeds && c.seed % 2) c.T = 1 + int64_t(c.seed % (B > 5 ? 6 : 80));  // of few rows, many steps at once
    return &c;
  };
  for (int cell = 0; traits_of(cell).gates > 0; ++cell)
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
      const bool projects = traits_of(cell).projects();
      for (int64_t D : {1, 2})
        for (bool packed : {false, true})
          for (int64_t H : {1, 7, 16, 17, 33, 65})
            for (int64_t B : {1, 2, 5, 17, 50})
              for (int round = 0; round < 2; ++round) add(cell, dtype, D, packed, B, H, projects && round);
      for (int64_t D : {1, 2})
        for (bool packed : {false, true})
          for (bool project : {false, true}) {
            if (project && !projects) continue;
            for (auto [B, H] : {std::pair<int, int>{50, 130}, {35, 66}, {3, 263}, {101, 31}}) {
              Case* c = add(cell, dtype, D, packed, B, H, project);
              c->threads = c->granted = 2 + int(c->seed % 7);
              if (c->granted > 6) c->granted -= 2;
              c->T = 3;
            }
          }
    }
  // Several steps of the input at once, in several slices of the batch.
  for (int cell = 0; traits_of(cell).gates > 0; ++cell)
    for (int64_t D : {1, 2})
      for (bool packed : {false, true}) {
        Case* c = add(cell, Dtype::kFloat32, D, packed, 32, 33, false);
        c->threads = c->granted = 2 + int(c->seed % 7);
        c->T = 5;
      }
  return cases;
}

}  // namespace test
