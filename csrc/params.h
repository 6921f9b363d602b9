// What the operators hand to the engines: plain structs of pointers, sizes and strides. No torch, no device.
// T steps, B rows of the batch, H hidden units, P = proj_size or H, D directions, G gates of the cell.
#pragma once
#include <cstdint>

namespace fusedrnn {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };  // of every tensor of a call
constexpr int kMaxDirections = 2;

// Step t has rows(t) rows of the batch, the longest sequences first. A sequence is stored row after row, step after step: all B
// rows of a step (padded) or those that it has (packed). Padded sequences of different lengths keep the order of the caller, and
// `order` says where each lies.
struct Steps {
  int64_t T, B;                    // T: of the longest sequence
  const int64_t* batch_sizes;      // (T), non-increasing; null: B at every step
  const int64_t* offsets;          // (T), sum of the batch sizes before t; null: padded
  const int64_t* order = nullptr;  // (B), the row of the batch that is row b of the steps; null: b
  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  int64_t row_offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  int64_t row_count() const { return offsets ? offsets[T - 1] + batch_sizes[T - 1] : T * B; }
  int64_t place(int64_t b) const { return order ? order[b] : b; }
  int64_t row(int64_t t, int64_t b) const { return row_offset(t) + place(b); }
  // Where row b of step t lies in a sequence of rows that are `row` elements apart, and `step` from step to step if padded.
  int64_t position(int64_t t, int64_t b, int64_t step, int64_t row) const {
    return offsets ? (offsets[t] + b) * row : t * step + place(b) * row;
  }
  // Where the state is that row b of step t began with in direction d: that row of the step before, or -1 at its first step.
  int64_t row_before(int64_t t, int64_t b, int64_t d) const {
    const int64_t before = d ? t + 1 : t - 1;
    return before < 0 || before >= T || b >= rows(before) ? -1 : row(before, b);
  }
};

// One call of an engine: one layer, all its directions. Direction 1 runs from the last step to the first.
// Every tensor is dense in the stated order, but for gates_x, whose rows may lie anywhere.
struct LayerParams {
  int cell;  // id in cells/cells.h
  Dtype dtype;
  Steps steps;
  int64_t H, P, D;
  int threads;                               // at most so many threads
  const void* weight_hh[kMaxDirections];     // (G*H, P)
  const void* weight_hr[kMaxDirections];     // (P, H), null: no projection, P == H
  const void* hx;                            // (D, B, P), null: zeros
  const void* cx;                            // (D, B, H), null: zeros
};

struct ForwardParams : LayerParams {
  const void* gates_x[kMaxDirections];       // x W_ih^T + b_ih; (T, B, G*H), last dimension dense
  int64_t gates_x_step[kMaxDirections];      // elements from step t to t+1 (padded)
  int64_t gates_x_row[kMaxDirections];       // elements from row b to b+1
  const void* bias_hh[kMaxDirections];       // (G*H), null: zeros
  void* output;                              // (rows, D, P)
  void* hy;                                  // (D, B, P)
  void* cy;                                  // (D, B, H), null where the cell has one state
  bool save;                                 // whether the next two are wanted
  void* saved;                               // (rows, D, kSaved, H)
  void* states;                              // (rows, D, S, H): the states 1.. and, projected, state 0 before it
};

struct BackwardParams : LayerParams {
  const void* output;                        // as forward wrote them
  const void* saved;
  const void* states;
  const void* grad_output;                   // (rows, D, P), null: zeros
  const void* grad_hy;                       // (D, B, P), null: zeros
  const void* grad_cy;                       // (D, B, H), null: zeros
  void* grad_pre;                            // (rows, D, kPre, H)
  void* grad_hx;                             // (D, B, P), null: not wanted
  void* grad_cx;                             // (D, B, H), null: not wanted
  void* grad_proj;                           // (rows, D, P): gradient of the projected state, all its uses; null: no projection
};

// What follows from these gradients for the weights. A result that is not wanted is null, in both directions.
struct GradWeightsParams : LayerParams {
  const void* input;                         // (T, B, I), last dimension dense
  int64_t I;
  int64_t input_step, input_row;             // elements from step to step (padded), from row to row
  const void* output;                        // as forward wrote them
  const void* states;
  const void* grad_pre;                      // as backward wrote them
  const void* grad_proj;
  void* grad_weight_ih[kMaxDirections];      // (G*H, I)
  void* grad_weight_hh[kMaxDirections];      // (G*H, P)
  void* grad_bias_ih[kMaxDirections];        // (G*H)
  void* grad_bias_hh[kMaxDirections];        // (G*H)
  void* grad_weight_hr[kMaxDirections];      // (P, H)
};

}  // namespace fusedrnn
