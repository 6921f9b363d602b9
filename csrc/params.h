// What the operators hand to the engines: plain structs of pointers, sizes and strides. No torch, no device.
// T steps, B rows of the batch, H hidden units, P = proj_size or H, D directions, N heads, G gates of the cell.
#pragma once
#include <cstdint>

#include "cells/cell.h"

// What engines call. Always inline: the code of one instruction set must not be linked into another's.
#if defined(__CUDACC__)
#define FUSEDRNN_ANYWHERE __host__ __device__ __forceinline__
#else
#define FUSEDRNN_ANYWHERE inline __attribute__((always_inline))
#endif

namespace fusedrnn {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };  // of every tensor of a call
constexpr int kMaxDirections = 2;

// Step t has rows(t) rows of the batch, the longest sequences first. A sequence is stored row after row, step after step: all B
// rows of a step (padded) or those that it has (packed). Padded sequences of different lengths keep the order of the caller, and
// `order` says where each lies; or all have B rows at every step, and `lengths` says how long each row of them runs: then nobody but the
// device needs to know.
struct Steps {
  int64_t T, B;                    // T: of the longest sequence
  const int64_t* batch_sizes;      // (T), non-increasing; null: B at every step
  const int64_t* offsets;          // (T), sum of the batch sizes before t; null: padded
  const int64_t* order = nullptr;    // (B), the row of the batch that is row b of the steps; null: b
  const int64_t* lengths = nullptr;  // (B), on a device that is not the host; null: as batch_sizes has it
  const uint8_t* reset = nullptr;    // (rows), 1 where a sequence of its own begins, from LayerParams' reset_hx; null: none does
  FUSEDRNN_ANYWHERE int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : B; }
  FUSEDRNN_ANYWHERE int64_t row_offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  FUSEDRNN_ANYWHERE int64_t row_count() const { return offsets ? offsets[T - 1] + batch_sizes[T - 1] : T * B; }
  FUSEDRNN_ANYWHERE int64_t place(int64_t b) const { return order ? order[b] : b; }
  FUSEDRNN_ANYWHERE int64_t row(int64_t t, int64_t b) const { return row_offset(t) + place(b); }
  FUSEDRNN_ANYWHERE int64_t given_row(int64_t d, int64_t b) const { return d * B + place(b); }  // of the caller's states (D, B, ...)
  // Where row b of step t lies in a sequence of rows that are `row` elements apart, and `step` from step to step if padded.
  FUSEDRNN_ANYWHERE int64_t position(int64_t t, int64_t b, int64_t step, int64_t row) const {
    return offsets ? (offsets[t] + b) * row : t * step + place(b) * row;
  }
  // Where the state is that row b of step t began with in direction d: that row of the step before, or -1 at its first step.
  FUSEDRNN_ANYWHERE int64_t row_before(int64_t t, int64_t b, int64_t d) const {
    const int64_t before = d ? t + 1 : t - 1;
    return before < 0 || before >= T || b >= rows(before) ? -1 : row(before, b);
  }
  // Whether row b begins step t of direction d anew. Direction 1 comes from step t + 1, and passes where that begins anew.
  FUSEDRNN_ANYWHERE bool begins(int64_t t, int64_t b, int64_t d) const {
    if (!reset) return false;
    return d == 0 ? reset[row(t, b)] : t + 1 < T && b < rows(t + 1) && reset[row(t + 1, b)];
  }
  // Whether it begins the step that follows there anew, so that nobody needs the states after step t.
  FUSEDRNN_ANYWHERE bool ends(int64_t t, int64_t b, int64_t d) const {
    const int64_t next = d ? t - 1 : t + 1;
    return reset && next >= 0 && next < T && b < rows(next) && begins(next, b, d);
  }
};

// One call of an engine: one layer, all its directions. Direction 1 runs from the last step to the first.
// Every tensor is dense in the stated order, but for gates_x, whose rows may lie anywhere.
struct LayerParams {
  int cell;  // id in cells/cells.h
  Choice choice;
  Dtype dtype;
  Steps steps;
  int64_t H, P, D;
  // Heads: each has H/N units, which lie side by side wherever there are units, and whose product takes their own hidden states
  // alone. Not with projections. A strand is one head of one direction, and needs nothing of another.
  int64_t N = 1;
  int threads;                               // at most so many threads
  const void* weight_hh[kMaxDirections];     // (G*H, P/N), null where the cell has none
  const void* weight_hr[kMaxDirections];     // (P, H), null: no projection, P == H
  const void* unit[kMaxDirections];          // (kUnit, H), numbers that each unit has of its own, null: zeros
  const void* hx;                            // (D, B, P), null: zeros
  const void* cx;                            // (D, B, H) for each of the states 1.., one after the other; null: zeros
  const void *reset_hx, *reset_cx;           // as hx and cx, the states from which sequences begin within a row; null: zeros
  // How much of each state stays what it was, from 0 to 1: (rows, D, S, H), or of all rows alike (D, S, H); null: nothing. Zoneout.
  const void* zoneout;
  int64_t zoneout_row;                       // elements from row to row
  int64_t stored;                            // K, states that are stored of each unit and step
  // What the hidden state is multiplied by before weight_hh is: (D, B, H), null: 1. Recurrent dropout. Not with projections.
  const void* hidden_mask;

  int64_t strands() const { return D * N; }
  int64_t units() const { return H / N; }    // of a strand,
  int64_t depth() const { return P / N; }    //   and what its product takes
  // Whether all rows run to the end of the steps, and carry their states on as the cell made them.
  bool plain() const { return !steps.lengths && !steps.reset && !zoneout && !hidden_mask; }
  FUSEDRNN_ANYWHERE int64_t zoneout_at(int64_t row, int64_t d, int64_t states) const { return row * zoneout_row + d * states * H; }
};

enum class Save { kNothing, kStates, kAll };  // of what backward, or a caller, wants besides the results

struct ForwardParams : LayerParams {
  const void* gates_x[kMaxDirections];       // x W_ih^T + b_ih (T, B, G*H), or with weight_ih x (T, B, I); last dimension dense
  int64_t gates_x_step[kMaxDirections];      // elements from step t to t+1 (padded)
  int64_t gates_x_row[kMaxDirections];       // elements from row b to b+1
  int64_t I;                                 // features of x, with weight_ih
  const void* weight_ih[kMaxDirections];     // (G*H, I), null: gates_x are gates; on a CPU alone
  const void* bias_ih[kMaxDirections];       // (G*H), null: zeros
  const void* bias_hh[kMaxDirections];       // (G*H), null: zeros
  void* output;                              // (rows, D, P)
  void* hy;                                  // (D, B, P)
  void* cy;                                  // as cx, null where the cell has one state
  Save save;                                 // which of the next two are wanted
  void* saved;                               // (rows, D, kSaved, H)
  // (rows, D, K, H): the states 1..; then, projected, state 0 before it; or then, with zoneout, all states that the cell made.
  void* states;
};

// Several layers in one call, each on the output of the one below: of one cell, one size and the same steps, in one direction.
constexpr int kMostStacked = 8;  // what a kernel's argument has room for, and more than fit on any chip of today at a useful width
struct StackParams : LayerParams {             // what they have in common
  int64_t layers;
  ForwardParams of[kMostStacked];              // gates_x: above the first layer bias_ih (G*H), with no way from step to step and row to row
  const void* weight_ih[kMostStacked];         // (G*H, H), above the first layer
};

struct BackwardParams : LayerParams {
  const void* output;                        // as forward wrote them
  const void* saved;
  const void* states;
  const void* grad_output;                   // (rows, D, P), null: zeros
  const void* grad_hy;                       // (D, B, P), null: zeros
  const void* grad_cy;                       // as cx, null: zeros
  const void* grad_states;                   // (rows, D, K, H), of the states 1.. after each step; null: zeros
  void* grad_pre;                            // (rows, D, kPre + kUnit, H)
  void* grad_hx;                             // (D, B, P), null: not wanted
  void* grad_cx;                             // as cx, null: not wanted
  void *grad_reset_hx, *grad_reset_cx;       // as hx and cx, sums over all that began from them; null: not wanted
  void* grad_proj;                           // (rows, D, P): gradient of the projected state, all its uses; null: no projection
};

// The same of a StackParams, from the highest layer down: of[0] is that, and each other one the layer below the one before it.
struct StackBackwardParams : LayerParams {
  int64_t layers;
  BackwardParams of[kMostStacked];             // grad_output: of the highest alone
  const void* weight_ih[kMostStacked];         // (G*H, H) of the layer above of[k], from k = 1 on
};

// What follows from these gradients for the weights. A result that is not wanted is null, in both directions.
struct GradWeightsParams : LayerParams {
  const void* input;                         // (T, B, I), last dimension dense
  int64_t I;
  int64_t input_step, input_row;             // elements from step to step (padded), from row to row
  const void* output;                        // as forward wrote them
  const void* states;
  const void* saved;                         // of a cell with a late gate
  const void* grad_pre;                      // as backward wrote them
  const void* grad_proj;
  void* grad_weight_ih[kMaxDirections];      // (G*H, I)
  void* grad_weight_hh[kMaxDirections];      // (G*H, P/N)
  void* grad_bias_ih[kMaxDirections];        // (G*H)
  void* grad_bias_hh[kMaxDirections];        // (G*H)
  void* grad_weight_hr[kMaxDirections];      // (P, H)
  void* grad_unit[kMaxDirections];           // (kUnit, H)
};

}  // namespace fusedrnn
