// Weights packed once for inference on the CPU: what fusedrnn/freeze.py writes and csrc/cpu/frozen.h reads. No torch.
//
// One run of bytes, the same for every instruction set: a header, then for each layer, for each direction, blocks of 16
// hidden units. A block has the numbers that its pre-activations start from (the biases, float32), for int8 the scale of
// every row of weight_ih and of weight_hh (float32), then the two weights in lines of 64 bytes. A line belongs to one gate
// and holds for each of the 16 units the weights of 1 (float32), 2 (bfloat16) or 4 (int8) neighbouring inputs, which share a
// word of 32 bits; the lines of all gates for the same inputs follow each other. Behind the blocks of a direction with a
// projection are blocks of 16 projected units: for int8 their scales, then weight_hr in lines of one gate. What is missing
// to whole lines and blocks is zero, and so are the scales of such rows, and whatever such inputs are multiplied with.
//
// The word: bfloat16 has the first input in the lower half. int8 has the first two in bytes 0 and 2, the next two in bytes 1
// and 3, each plus 128: processors multiply bytes without a sign by bytes with one, and both pairs are numbers of 16 bits after
// one instruction.
#pragma once
#include <cstdint>

#include "params.h"

namespace fusedrnn {

enum class FrozenFormat : int32_t { kFloat32, kBFloat16, kInt8 };

constexpr int kFrozenUnits = 16;
constexpr int64_t kLineBytes = 64;
constexpr char kFrozenMagic[8] = {'f', 'u', 's', 'e', 'd', 'r', 'n', 'n'};
constexpr int32_t kFrozenVersion = 2;

struct FrozenHeader {
  char magic[8];
  int32_t version;
  FrozenFormat format;
  char cell[16];               // its name, zeros behind it
  int32_t layers, directions;
  int64_t I, H, P;             // P: 0 without projections
};
constexpr int64_t kFrozenHeaderBytes = 128;  // zeros behind the header, so that blocks begin with a cache line
static_assert(sizeof(FrozenHeader) <= kFrozenHeaderBytes, "the header has its place");

// Where things lie, for a cell of `gates` gates and `pre` pre-activations.
struct FrozenLayout {
  FrozenFormat format;
  int64_t gates, pre, layers, D, I, H, P;
  bool projected;

  FUSEDRNN_ANYWHERE FrozenLayout(const FrozenHeader& header, int gates, int pre)
      : format(header.format), gates(gates), pre(pre), layers(header.layers), D(header.directions), I(header.I), H(header.H),
        P(header.P ? header.P : header.H), projected(header.P > 0) {}

  FUSEDRNN_ANYWHERE static int64_t up(int64_t count, int64_t size) { return (count + size - 1) / size; }
  // Inputs a line.
  FUSEDRNN_ANYWHERE int64_t group() const {
    return format == FrozenFormat::kInt8 ? 4 : format == FrozenFormat::kBFloat16 ? 2 : 1;
  }
  FUSEDRNN_ANYWHERE int64_t groups(int64_t depth) const { return up(depth, group()); }
  // 16 floats are a line, too.
  FUSEDRNN_ANYWHERE int64_t scales(int64_t gates) const { return format == FrozenFormat::kInt8 ? gates * kLineBytes : 0; }
  FUSEDRNN_ANYWHERE int64_t depth(int64_t layer) const { return layer ? D * P : I; }
  FUSEDRNN_ANYWHERE int64_t blocks() const { return up(H, kFrozenUnits); }
  FUSEDRNN_ANYWHERE int64_t columns() const { return projected ? up(P, kFrozenUnits) : 0; }

  // Bytes from the beginning of a block.
  FUSEDRNN_ANYWHERE int64_t ih_scales() const { return pre * kLineBytes; }
  FUSEDRNN_ANYWHERE int64_t hh_scales() const { return ih_scales() + scales(gates); }
  FUSEDRNN_ANYWHERE int64_t ih() const { return hh_scales() + scales(gates); }
  FUSEDRNN_ANYWHERE int64_t hh(int64_t layer) const { return ih() + groups(depth(layer)) * gates * kLineBytes; }
  FUSEDRNN_ANYWHERE int64_t block_bytes(int64_t layer) const { return hh(layer) + groups(P) * gates * kLineBytes; }
  FUSEDRNN_ANYWHERE int64_t column_bytes() const { return scales(1) + groups(H) * kLineBytes; }

  FUSEDRNN_ANYWHERE int64_t direction_bytes(int64_t layer) const {
    return blocks() * block_bytes(layer) + columns() * column_bytes();
  }
  // Bytes from the end of the header to a direction's first block.
  FUSEDRNN_ANYWHERE int64_t direction(int64_t layer, int64_t d) const {
    return (layer ? D * direction_bytes(0) + (layer - 1) * D * direction_bytes(1) : 0) + d * direction_bytes(layer);
  }
  FUSEDRNN_ANYWHERE int64_t bytes() const { return direction(layers, 0); }  // of all layers
};

// One call: a stack of layers over a sequence.
struct FrozenParams {
  int cell;                          // id in cells/cells.h
  FrozenLayout layout;
  Dtype dtype;                       // of all tensors but the weights: float32 or bfloat16
  int64_t T, B;
  int threads;                       // at most so many threads
  const char* blocks;                // behind the header
  const void* input;                 // (T, B, I), last dimension dense
  int64_t input_step, input_row;     // elements from step to step, from row to row
  const void* hx;                    // (L*D, B, P), null: zeros
  const void* cx;                    // (L*D, B, H), null: zeros
  void* output;                      // (T, B, D*P), last dimension dense; null: not wanted
  int64_t output_step, output_row;
  void* hy;                          // (L*D, B, P)
  void* cy;                          // (L*D, B, H), null where the cell has one state
};

// The functions of one instruction set, as in cpu/engine.h.
struct FrozenEngine {
  int64_t (*workspace)(const FrozenParams&);  // bytes that forward needs
  void (*forward)(const FrozenParams&, void* workspace);
};

namespace baseline { extern const FrozenEngine kFrozenEngine; }
namespace avx2 { extern const FrozenEngine kFrozenEngine; }
namespace avx512 { extern const FrozenEngine kFrozenEngine; }
namespace avx512dots { extern const FrozenEngine kFrozenEngine; }

}  // namespace fusedrnn
