// The bodies of the operators, the same for every device: every check of an argument, and the allocation of results. No
// arithmetic.
//
// An operator computes the recurrence of one layer in all its directions, backward with the gradients of its weights. The
// product of the input and weight_ih for all steps, and the gradient of the input, are ATen's (fusedrnn/layer.py).
//
// Only LibTorch's stable ABI is used here, so that one build of the library serves every torch from 2.10 on.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cells/cells.h"
#include "pages.h"
#include "params.h"

namespace fusedrnn {

// Null: no biases, no projections, states of zeros. (Lists are null and not empty: AOTInductor cannot hand on an empty one.)
// ragged: batch_sizes (T,) of packed sequences, or lengths (B,) of padded ones; null: all have T steps. Behind the end of a
// sequence outputs are zero, and its last states are those of its own last step. batch_sizes are on the CPU, lengths where the engine
// looks at them. reset: (T, B) or (rows,), true where a sequence of its own begins, from reset_hx and reset_cx, which are as hx and cx.
// zoneout and hidden_mask: as in params.h, zoneout (T, B, D, S, H), (rows, D, S, H), or (D, S, H) for all rows alike.
// cell: its name, and behind a colon what is chosen of one that has a choice, such as "lstm_general:hard_sigmoid,tanh,relu,3.5": the
// functions of gates, candidate and output, and the limit of the inner state, 0 for none; or N heads, such as "lstm:4", or both, such
// as "gru_general:sigmoid,relu,tanh,0,4": weight_hh is (G*H, H/N) then (params.h). weight_hr: (P, H) of projections; or of a
// cell whose units have numbers of their own these, (kUnit, H), null for zeros; where the cell has no product they are weight_hh.
// A cell that normalises its products takes no bias_hh, and gates_x as they are added to what it has normalised.
// save: 0, or 1 to have the states, and 2 to have what recurrence_backward needs besides; what is not wanted is empty. cx and cy are
// (D, B, H), (S - 1, D, B, H) of a cell of more than two states, and empty of one with one. grad_weights holds, for each
// direction, the gradients of weight_ih, weight_hh, bias_ih, bias_hh and weight_hr. What is not needed is empty. allow_tf32:
// on a device that has TF32, weights and states in float32 may be rounded to it before they are multiplied.
constexpr char kForwardSchema[] =
    "recurrence_forward(str cell, Tensor[] gates_x, Tensor[] weight_hh, Tensor[]? bias_hh, Tensor[]? weight_hr, Tensor? hx, "
    "Tensor? cx, Tensor? ragged, Tensor? reset, Tensor? zoneout, Tensor? hidden_mask, Tensor? reset_hx, Tensor? reset_cx, "
    "int save, bool allow_tf32, Tensor[]? weight_ih=None, Tensor[]? bias_ih=None) -> "
    "(Tensor output, Tensor hy, Tensor cy, Tensor saved, Tensor states)";
constexpr char kBackwardSchema[] =
    "recurrence_backward(str cell, Tensor? input, Tensor[] weight_hh, Tensor[]? weight_hr, Tensor? hx, Tensor? cx, "
    "Tensor output, Tensor saved, Tensor states, Tensor? ragged, Tensor? reset, Tensor? zoneout, Tensor? hidden_mask, "
    "Tensor? reset_hx, Tensor? reset_cx, Tensor? grad_output, Tensor? grad_hy, Tensor? grad_cy, Tensor? grad_states, "
    "bool need_grad_hx, bool need_grad_cx, bool need_grad_reset_hx, bool need_grad_reset_cx, bool need_grad_weight_ih, "
    "bool need_grad_weight_hh, bool need_grad_bias, bool need_grad_weight_hr, bool allow_tf32) -> "
    "(Tensor grad_pre, Tensor grad_hx, Tensor grad_cx, Tensor grad_reset_hx, Tensor grad_reset_cx, Tensor[] grad_weights)";
// The same, but grad_pre lies where saved was, and what it gives as grad_pre is empty: of cells that save as many numbers as they have
// gradients, and look at what they saved in the cell alone. No second tensor of that size is made, which takes longer than the cells do.
inline std::string in_place_schema() {
  std::string schema = kBackwardSchema;
  schema.insert(schema.find('('), "_");
  const std::string saved = "Tensor saved";
  return schema.replace(schema.find(saved), saved.size(), "Tensor(a!) saved");
}
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using MaybeTensors = std::optional<Tensors>;
using Sizes = std::vector<int64_t>;

struct CellTraits {
  int id = -1, gates = 0, pre = 0, states = 0, saved = 0, unit = 0, norms = 0, late = 0;
  bool chooses = false, multiplies = true, heads_too = true;
  Choice choice;
  int64_t heads = 1;
  int grads() const { return pre + unit; }
};

inline std::string cell_names() {
  std::string names;
  for_each_cell([&](int, auto cell) { names += (names.empty() ? "" : ", ") + std::string(decltype(cell)::kName); });
  return names;
}

// The choice that `parts` tell, as the schemas say; words: all of it, for errors.
inline Choice choice_of(const char* op, const std::vector<std::string>& parts, const std::string& words) {
  static const std::vector<std::string> names{"sigmoid", "hard_sigmoid", "hard_sigmoid_of_fifths", "tanh", "relu", "identity"};  // as Function
  STD_TORCH_CHECK(parts.size() == 4, op, ": a cell's choice must be 'gate,candidate,output,clip', got '", words, "'");
  Function functions[3];
  for (size_t i = 0; i < 3; ++i) {
    const size_t found = size_t(std::find(names.begin(), names.end(), parts[i]) - names.begin());
    const bool fits = i == 0 ? found < 3 : found >= 3 && found < names.size();
    STD_TORCH_CHECK(fits, op, i == 0 ? ": the function of gates must be sigmoid, hard_sigmoid or hard_sigmoid_of_fifths"
                                     : ": the function of candidate and output must be tanh, relu or identity", ", got '", parts[i], "'");
    functions[i] = Function(found);
  }
  char* end = nullptr;
  const double clip = std::strtod(parts[3].c_str(), &end);
  STD_TORCH_CHECK(!parts[3].empty() && *end == 0 && clip >= 0, op, ": the limit must be a number not below 0, got '", parts[3], "'");
  return {functions[0], functions[1], functions[2], clip};
}

// A whole number above 0 that `word` tells, of no more digits than any machine needs; else 0.
inline int64_t heads_of(const std::string& word) {
  const bool digits = !word.empty() && word.size() < 10 && word.find_first_not_of("0123456789") == std::string::npos;
  return digits ? std::atoll(word.c_str()) : 0;
}

inline CellTraits find_cell(const char* op, const std::string& text) {
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon);
  CellTraits traits;
  for_each_cell([&](int id, auto cell) {
    using Cell = decltype(cell);
    if (name == Cell::kName)
      traits = {id,           Cell::kGates, Cell::kPre,      Cell::kStates,     Cell::kSaved, Cell::kUnit,
                Cell::kNorms, Cell::kLate,  Cell::kChooses, Cell::kMultiplies, may_have_heads<Cell>, {}};
  });
  STD_TORCH_CHECK(traits.id >= 0, op, ": cell must be one of ", cell_names(), ", got '", name, "'");
  if (colon == std::string::npos) return traits;
  const std::string words = text.substr(colon + 1);
  std::vector<std::string> parts{""};
  for (char c : words) c == ',' ? parts.push_back("") : void(parts.back() += c);
  if (parts.size() == 1 || parts.size() == 5) {
    traits.heads = heads_of(parts.back());
    STD_TORCH_CHECK(traits.heads > 0, op, ": the heads of a cell must be a positive integer, got '", parts.back(), "'");
    STD_TORCH_CHECK(traits.heads == 1 || traits.heads_too, op, ": the cell ", name, " has no heads, got '", text, "'");
    parts.pop_back();
    if (parts.empty()) return traits;
  }
  STD_TORCH_CHECK(traits.chooses, op, ": the cell ", name, " has no choice, got '", text, "'");
  traits.choice = choice_of(op, parts, words);
  return traits;
}

inline std::string text(const Sizes& sizes) {
  std::string out = "(";
  for (size_t i = 0; i < sizes.size(); ++i) out += (i ? ", " : "") + std::to_string(sizes[i]);
  return out + (sizes.size() == 1 ? ",)" : ")");
}

inline Sizes sizes_of(const Tensor& tensor) { return Sizes(tensor.sizes().begin(), tensor.sizes().end()); }

inline Tensor allocate(const Tensor& like, const Sizes& sizes, ScalarType type) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const int32_t device = like.is_cpu() ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype, device,
                                                  like.get_device_index(), &handle));
  const Tensor tensor(handle);
  if (like.is_cpu()) want_large_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}
inline Tensor allocate(const Tensor& like, const Sizes& sizes) { return allocate(like, sizes, like.scalar_type()); }

// Checks the arguments of one call against its first gate weight, and keeps what must outlive the engine's work.
struct Call {
  const char* op;
  CellTraits cell;
  Tensor first;                  // gives dtype and device to all others
  int64_t D = 0, H = 0, P = 0, T = 0, B = 0, rows = 0;
  bool projected = false, packed = false, uneven = false;  // uneven: padded, with lengths that are on the CPU
  bool zones_out = false, one_step = false;
  Sizes lead;                    // of one step: the sizes of its states before their width, (B) or () of a cell, (1, B) of a layer
  Tensors held;

  Call(const char* op, const std::string& cell_name, const Tensors& weight_hh,
       const Tensors& weight_hr)
      : op(op), cell(find_cell(op, cell_name)) {
    D = int64_t(weight_hh.size());
    STD_TORCH_CHECK(D == 1 || D == kMaxDirections, op, ": weight_hh must hold 1 or 2 tensors, one a direction, got ", D);
    first = weight_hh[0];
    const ScalarType type = first.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                        type == ScalarType::Half,
                    op, ": weight_hh must be float32, float64, bfloat16 or float16, got ", name_of(type));
    const int gates = cell.multiplies ? cell.gates : cell.unit;  // rows of weight_hh to a unit, or to all units
    STD_TORCH_CHECK(first.dim() == 2 && first.numel() > 0 && first.size(0) % gates == 0, op,
                    ": weight_hh must be (G*H, P) with G = ", gates, " gates, got ", text(sizes_of(first)));
    P = first.size(1) * cell.heads;
    H = cell.multiplies ? first.size(0) / gates : P;
    projected = !weight_hr.empty() && cell.unit == 0;
    STD_TORCH_CHECK(!projected || (cell.states == 2 && cell.heads == 1), op,
                    ": only the lstm takes projections (weight_hr), and without heads");
    STD_TORCH_CHECK(cell.multiplies || (weight_hr.empty() && first.size(0) == gates), op, ": weight_hh must be (", gates,
                    ", H), without weight_hr, got ", text(sizes_of(first)));
    STD_TORCH_CHECK(H % cell.heads == 0, op, ": weight_hh must be of heads that divide its ", H, " units, got ", cell.heads);
    STD_TORCH_CHECK(projected || P == H, op, ": weight_hh must be (G*H, H", cell.heads > 1 ? "/N" : "", ") = ",
                    text({gates * H, H / cell.heads}), ", got ", text(sizes_of(first)));
    STD_TORCH_CHECK(weight_hr.empty() || int64_t(weight_hr.size()) == D, op, ": weight_hr must hold ", D, " tensors, got ",
                    weight_hr.size());
  }

  static std::string device_of(const Tensor& tensor) {
    return tensor.is_cpu() ? "the CPU" : "device " + std::to_string(tensor.get_device_index());
  }
  static const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

  Dtype dtype() const {
    switch (first.scalar_type()) {
      case ScalarType::Double:
        return Dtype::kFloat64;
      case ScalarType::BFloat16:
        return Dtype::kBFloat16;
      case ScalarType::Half:
        return Dtype::kFloat16;
      default:
        return Dtype::kFloat32;
    }
  }

  void check_kind(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.is_cpu() == first.is_cpu() && tensor.get_device_index() == first.get_device_index(), op, ": ", name,
                    " must be on ", device_of(first), " like weight_hh, got ", device_of(tensor));
    STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", name, " must be ",
                    name_of(first.scalar_type()), " like weight_hh, got ", name_of(tensor.scalar_type()));
  }

  void check_sizes(const char* name, const Tensor& tensor, const Sizes& sizes) const {
    const auto found = tensor.sizes();
    STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), op, ": ", name, " must be ",
                    text(sizes), ", got ", text(sizes_of(tensor)));
  }

  // The data of a tensor of these sizes, made dense if it is not. Copies live as long as this object.
  const void* data(const char* name, const Tensor& tensor, const Sizes& sizes) {
    check_kind(name, tensor);
    check_sizes(name, tensor, sizes);
    held.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
    return held.back().data_ptr();
  }
  const void* data(const char* name, const MaybeTensor& tensor, const Sizes& sizes) {
    return tensor ? data(name, *tensor, sizes) : nullptr;
  }

  // A sequence of rows that may lie anywhere if each is dense.
  struct Rows {
    const void* data;
    int64_t step, row;  // elements from step to step (padded), from row to row
  };
  Rows rows_of(const char* name, const Tensor& tensor, int64_t features) {
    check_kind(name, tensor);
    check_sizes(name, tensor, sequence_sizes({features}));
    const int64_t last = tensor.dim() - 1;
    held.push_back(tensor.stride(last) == 1 || features == 1 ? tensor : torch::stable::contiguous(tensor));
    return {held.back().data_ptr(), packed ? 0 : held.back().stride(0), held.back().stride(last - 1)};
  }

  // T, B and where rows lie: from batch_sizes, or from a padded sequence's first two sizes.
  void set_steps(const char* name, const Tensor& sequence, const MaybeTensor& ragged, const MaybeTensor& hx, bool host_lengths) {
    packed = ragged && sequence.dim() == 2;
    uneven = ragged && !packed && host_lengths;
    STD_TORCH_CHECK(packed || sequence.dim() == 3, op, ": ", name, " must have 3 dimensions (T, B, features), or 2 ",
                    "(rows, features) with batch_sizes, got ", text(sizes_of(sequence)));
    const int64_t* sizes = nullptr;
    if (ragged && !packed && !uneven) {
      STD_TORCH_CHECK(ragged->is_cpu() == first.is_cpu() && ragged->get_device_index() == first.get_device_index() &&
                          ragged->scalar_type() == ScalarType::Long && ragged->dim() == 1 && ragged->size(0) == sequence.size(1),
                      op, ": lengths must be a one-dimensional int64 tensor on ", device_of(first), ", one for each of ",
                      sequence.size(1), " sequences");
      held.push_back(torch::stable::contiguous(*ragged));
    } else if (ragged) {
      STD_TORCH_CHECK(ragged->is_cpu() && ragged->scalar_type() == ScalarType::Long && ragged->dim() == 1, op,
                      packed ? ": batch_sizes" : ": lengths", " must be a one-dimensional int64 tensor on the CPU");
      held.push_back(torch::stable::contiguous(*ragged));
      sizes = held.back().const_data_ptr<int64_t>();
    }
    if (!packed) {
      T = sequence.size(0);
      B = sequence.size(1);
      rows = T * B;
      STD_TORCH_CHECK(T > 0, op, ": expected sequence length to be larger than 0, got 0");
      steps_ = {T, B, nullptr, nullptr};
      if (uneven) set_lengths(sizes, ragged->size(0));
      if (ragged && !uneven) steps_.lengths = held.back().const_data_ptr<int64_t>();
      return;
    }
    rows = sequence.size(0);
    T = ragged->size(0);
    STD_TORCH_CHECK(T > 0, op, ": expected sequence length to be larger than 0, got no batch_sizes");
    int64_t sum = 0;
    for (int64_t t = 0; t < T; ++t) {
      STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]), op,
                      ": batch_sizes must be positive and never increase, got ", sizes[t], " at step ", t);
      STD_TORCH_CHECK(sizes[t] <= rows - sum, op, ": batch_sizes must add up to the ", rows, " rows of ", name,
                      ", got more by step ", t);
      offsets_.push_back(sum);
      sum += sizes[t];
    }
    STD_TORCH_CHECK(sum == rows, op, ": batch_sizes must add up to the ", rows, " rows of ", name, ", got ", sum);
    B = sizes[0];
    steps_ = {T, B, sizes, offsets_.data()};
    STD_TORCH_CHECK(!hx || (hx->dim() == 3 && hx->size(1) == B), op, ": hx must be ", text({D, B, P}), ", got ",
                    hx ? text(sizes_of(*hx)) : "");
  }

  // The only step of a cell, (B, features), or (features) of one row; or of a layer, (1, B, features) or (B, 1, features).
  void set_one_step(const char* name, const Tensor& input) {
    const int64_t dims = input.dim();
    STD_TORCH_CHECK(dims > 0 && dims <= 3 && (dims < 3 || input.size(0) == 1 || input.size(1) == 1), op, ": ", name,
                    " must be (B, features) or (features), or of one step (1, B, features) or (B, 1, features), got ", text(sizes_of(input)));
    one_step = true;
    T = 1;
    B = rows = dims == 1 ? 1 : dims == 2 ? input.size(0) : input.size(input.size(0) == 1 ? 1 : 0);
    lead = dims == 1 ? Sizes{} : dims == 2 ? Sizes{B} : Sizes{1, B};
    steps_ = {T, B, nullptr, nullptr};
  }

  // What becomes of the states between steps.
  struct Carry {
    const MaybeTensor &reset, &zoneout, &hidden_mask, &reset_hx, &reset_cx;
  };
  void fill(LayerParams& p, const Tensors& weight_hh, const Tensors& weight_hr,
            const MaybeTensor& hx, const MaybeTensor& cx, const Carry& carry) {
    held.reserve(28);
    if (carry.reset) {
      check_sizes("reset", *carry.reset, sequence_sizes({}));
      STD_TORCH_CHECK(carry.reset->scalar_type() == ScalarType::Bool, op, ": reset must be Bool, got ",
                      name_of(carry.reset->scalar_type()));
      STD_TORCH_CHECK(carry.reset->is_cpu() == first.is_cpu() && carry.reset->get_device_index() == first.get_device_index(), op,
                      ": reset must be on ", device_of(first), " like weight_hh, got ", device_of(*carry.reset));
      held.push_back(torch::stable::contiguous(*carry.reset));
      steps_.reset = static_cast<const uint8_t*>(held.back().data_ptr());
    }
    p.cell = cell.id;
    p.choice = cell.choice;
    p.dtype = dtype();
    p.steps = steps_;
    p.H = H;
    p.P = P;
    p.D = D;
    p.N = cell.heads;
    p.threads = int(torch::stable::get_num_threads());
    for (int64_t d = 0; d < D; ++d) {
      const void* weights = data("weight_hh", weight_hh[d], weight_hh_sizes());
      const void* others = weight_hr.empty() ? nullptr : data("weight_hr", weight_hr[d], weight_hr_sizes());
      p.weight_hh[d] = cell.multiplies ? weights : nullptr;
      p.weight_hr[d] = projected ? others : nullptr;
      p.unit[d] = projected ? nullptr : cell.multiplies ? others : weights;
    }
    p.hx = data("hx", hx, state_sizes(P));
    STD_TORCH_CHECK((!cx && !carry.reset_cx) || cell.states > 1, op, cx ? ": cx is" : ": reset_cx is",
                    " for cells of more than one state, such as the lstm");
    p.cx = data("cx", cx, inner_sizes());
    STD_TORCH_CHECK(carry.reset || (!carry.reset_hx && !carry.reset_cx), op, ": reset_hx and reset_cx need reset");
    p.reset_hx = data("reset_hx", carry.reset_hx, state_sizes(P));
    p.reset_cx = data("reset_cx", carry.reset_cx, inner_sizes());
    STD_TORCH_CHECK(cell.multiplies || !carry.hidden_mask, op, ": no hidden_mask where the cell has no product");
    STD_TORCH_CHECK(!projected || (!carry.zoneout && !carry.hidden_mask), op, ": no zoneout and hidden_mask with projections");
    zones_out = bool(carry.zoneout);
    p.stored = stored();
    if (carry.zoneout) {
      const Sizes of_row{D, cell.states, H}, of_all = sequence_sizes(of_row);
      const bool alike = carry.zoneout->dim() == int64_t(of_row.size());
      p.zoneout = data("zoneout", *carry.zoneout, alike ? of_row : of_all);
      p.zoneout_row = alike ? 0 : D * cell.states * H;
    }
    p.hidden_mask = data("hidden_mask", carry.hidden_mask, {D, B, H});
  }
  Sizes weight_hh_sizes() const { return {(cell.multiplies ? cell.gates * H : cell.unit), P / cell.heads}; }
  Sizes weight_hr_sizes() const { return {cell.unit ? cell.unit : P, H}; }
  Sizes state_sizes(int64_t width) const {
    if (!one_step) return {D, B, width};
    Sizes sizes = lead;
    sizes.push_back(width);
    return sizes;
  }
  Sizes inner_sizes() const {
    Sizes sizes = state_sizes(H);
    if (cell.states > 2) sizes.insert(sizes.begin(), cell.states - 1);
    return sizes;
  }

  Sizes sequence_sizes(const Sizes& last) const {
    Sizes sizes = packed ? Sizes{rows} : Sizes{T, B};
    sizes.insert(sizes.end(), last.begin(), last.end());
    return sizes;
  }
  int64_t stored() const { return cell.states - 1 + projected + (zones_out ? cell.states : 0); }
  bool has_steps() const { return rows > 0 && steps_.T > 0; }

  // Padded sequences with lengths: zeros behind their ends, in a tensor of rows of the sequence, which no engine writes.
  void clear_behind(const Tensor& sequence) const {
    const size_t row = uneven && rows > 0 ? size_t(sequence.numel() / rows * sequence.element_size()) : 0;
    for (int64_t t = 0; uneven && t < T; ++t)
      for (int64_t b = 0; b < B; ++b)
        if (t >= lengths_[b]) std::memset(static_cast<char*>(sequence.data_ptr()) + size_t(t * B + b) * row, 0, row);
  }
  // A sequence of no steps ends in the states, or their gradients, that it began with: `from` (..., B, width), null for zeros.
  void pass_through(const Tensor& to, const void* from) const {
    if (!uneven || to.numel() == 0) return;
    const int64_t width = to.size(to.dim() - 1), states = to.numel() / width;
    const size_t row = size_t(width * to.element_size());
    for (int64_t i = 0; i < states; ++i) {
      if (lengths_[i % B] > 0) continue;
      char* at = static_cast<char*>(to.data_ptr()) + size_t(i) * row;
      from ? std::memcpy(at, static_cast<const char*>(from) + size_t(i) * row, row) : std::memset(at, 0, row);
    }
  }

 private:
  Steps steps_{};
  const int64_t* lengths_ = nullptr;
  std::vector<int64_t> offsets_, batch_sizes_, order_;

  void set_lengths(const int64_t* lengths, int64_t count) {
    STD_TORCH_CHECK(count == B, op, ": lengths must be one for each of ", B, " sequences, got ", count);
    lengths_ = lengths;
    batch_sizes_.assign(size_t(T), 0);
    for (int64_t b = 0; b < B; ++b) {
      STD_TORCH_CHECK(lengths[b] >= 0 && lengths[b] <= T, op, ": lengths must be from 0 to ", T, ", got ", lengths[b], " at ", b);
      if (lengths[b] > 0) ++batch_sizes_[size_t(lengths[b] - 1)];
    }
    for (int64_t t = T - 1; t > 0; --t) batch_sizes_[size_t(t - 1)] += batch_sizes_[size_t(t)];  // those that end later run, too
    order_.resize(size_t(B));
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    steps_.T = std::find(batch_sizes_.begin(), batch_sizes_.end(), 0) - batch_sizes_.begin();
    steps_.batch_sizes = batch_sizes_.data();
    steps_.order = order_.data();
  }
};

// An Engine is made for one call and has
//   kLengthsOnHost: whether it wants the lengths of padded sequences on the CPU, or else where the sequences are
//   kFeeds: whether it multiplies the input, too, if it is given weight_ih
//   Engine(call, allow_tf32)
//   forward(ForwardParams), backward(BackwardParams, needs)
//   grad_weights(GradWeightsParams, needs, tensors): the gradients of the weights of all directions
// Every pointer in what it is given is to memory of the call's device.

// What is asked of recurrence_backward besides grad_pre.
struct Needs {
  bool grad_hx, grad_cx, grad_weight_ih, grad_weight_hh, grad_bias, grad_weight_hr;
  bool any_weight() const { return grad_weight_ih || grad_weight_hh || grad_bias || grad_weight_hr; }
};

// The tensors that the gradients of the weights are made of.
struct GradSources {
  const MaybeTensor &input, &grad_proj;
  const Tensor &saved, &states, &grad_pre;
};

template <class Engine>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> recurrence_forward(
    std::string cell, Tensors gates_x, Tensors weight_hh, MaybeTensors maybe_bias_hh, MaybeTensors maybe_weight_hr,
    MaybeTensor hx, MaybeTensor cx, MaybeTensor ragged, MaybeTensor reset, MaybeTensor zoneout, MaybeTensor hidden_mask,
    MaybeTensor reset_hx, MaybeTensor reset_cx, int64_t save, bool allow_tf32, MaybeTensors maybe_weight_ih,
    MaybeTensors maybe_bias_ih) {
  const Tensors bias_hh = maybe_bias_hh.value_or(Tensors{}), weight_hr = maybe_weight_hr.value_or(Tensors{});
  const Tensors weight_ih = maybe_weight_ih.value_or(Tensors{}), bias_ih = maybe_bias_ih.value_or(Tensors{});
  Call call("fusedrnn::recurrence_forward", cell, weight_hh, weight_hr);
  const int64_t D = call.D, H = call.H, P = call.P, G = call.cell.gates;
  STD_TORCH_CHECK(int64_t(gates_x.size()) == D, call.op, ": gates_x must hold ", D, " tensors, got ", gates_x.size());
  STD_TORCH_CHECK(bias_hh.empty() || int64_t(bias_hh.size()) == D, call.op, ": bias_hh must hold ", D,
                  " tensors or none, got ", bias_hh.size());
  STD_TORCH_CHECK(bias_hh.empty() || !call.cell.norms, call.op, ": bias_hh must hold none with the cell ", cell,
                  ", which normalises its products, got ", bias_hh.size());
  STD_TORCH_CHECK(save >= 0 && save <= 2, call.op, ": save must be 0, 1 or 2, got ", save);
  const bool feeds = !weight_ih.empty();
  STD_TORCH_CHECK(!feeds || Engine::kFeeds, call.op, ": weight_ih is for the CPU alone, got weight_hh on ",
                  Call::device_of(call.first));
  STD_TORCH_CHECK(!feeds || (!call.cell.norms && !call.cell.late), call.op,
                  ": weight_ih is for cells that neither normalise nor have a late gate, got the cell ", cell);
  STD_TORCH_CHECK(!feeds || int64_t(weight_ih.size()) == D, call.op, ": weight_ih must hold ", D, " tensors or none, got ",
                  weight_ih.size());
  STD_TORCH_CHECK(bias_ih.empty() || feeds, call.op, ": bias_ih needs weight_ih, got ", bias_ih.size(), " tensors without it");
  STD_TORCH_CHECK(bias_ih.empty() || int64_t(bias_ih.size()) == D, call.op, ": bias_ih must hold ", D, " tensors or none, got ",
                  bias_ih.size());
  call.set_steps("gates_x", gates_x[0], ragged, hx, Engine::kLengthsOnHost);

  ForwardParams p{};
  call.fill(p, weight_hh, weight_hr, hx, cx, {reset, zoneout, hidden_mask, reset_hx, reset_cx});
  p.I = feeds ? gates_x[0].size(gates_x[0].dim() - 1) : G * H;
  STD_TORCH_CHECK(p.I > 0, call.op, ": gates_x must have features to be multiplied with weight_ih, got ", text(sizes_of(gates_x[0])));
  for (int64_t d = 0; d < D; ++d) {
    const Call::Rows rows = call.rows_of("gates_x", gates_x[d], p.I);
    p.gates_x[d] = rows.data;
    p.weight_ih[d] = feeds ? call.data("weight_ih", weight_ih[d], {G * H, p.I}) : nullptr;
    p.bias_ih[d] = bias_ih.empty() ? nullptr : call.data("bias_ih", bias_ih[d], {G * H});
    p.gates_x_step[d] = rows.step;
    p.gates_x_row[d] = rows.row;
    p.bias_hh[d] = bias_hh.empty() ? nullptr : call.data("bias_hh", bias_hh[d], {G * H});
  }

  const Tensor& like = call.first;
  Tensor output = allocate(like, call.sequence_sizes({D * P})), hy = allocate(like, {D, call.B, P});
  Tensor cy = allocate(like, call.cell.states > 1 ? call.inner_sizes() : Sizes{0});
  Tensor saved = allocate(like, save == 2 ? call.sequence_sizes({D, call.cell.saved, H}) : Sizes{0});
  Tensor states = allocate(like, save ? call.sequence_sizes({D, call.stored(), H}) : Sizes{0});
  for (const Tensor* sequence : {&output, &saved, &states}) call.clear_behind(*sequence);
  call.pass_through(hy, p.hx);
  call.pass_through(cy, p.cx);
  if (call.has_steps()) {
    p.output = output.data_ptr();
    p.hy = hy.data_ptr();
    p.cy = cy.data_ptr();
    p.save = Save(save);
    p.saved = saved.data_ptr();
    p.states = states.data_ptr();
    Engine(call, allow_tf32).forward(p);
  }
  return {output, hy, cy, saved, states};
}

template <class Engine, bool kInPlace = false>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensors> recurrence_backward(
    std::string cell, MaybeTensor input, Tensors weight_hh, MaybeTensors maybe_weight_hr, MaybeTensor hx,
    MaybeTensor cx, Tensor output, Tensor saved, Tensor states, MaybeTensor ragged, MaybeTensor reset, MaybeTensor zoneout,
    MaybeTensor hidden_mask, MaybeTensor reset_hx, MaybeTensor reset_cx, MaybeTensor grad_output, MaybeTensor grad_hy,
    MaybeTensor grad_cy, MaybeTensor grad_states, bool need_grad_hx, bool need_grad_cx, bool need_grad_reset_hx,
    bool need_grad_reset_cx, bool need_grad_weight_ih, bool need_grad_weight_hh, bool need_grad_bias, bool need_grad_weight_hr,
    bool allow_tf32) {
  const Tensors weight_hr = maybe_weight_hr.value_or(Tensors{});
  Call call(kInPlace ? "fusedrnn::recurrence_backward_" : "fusedrnn::recurrence_backward", cell, weight_hh, weight_hr);
  const int64_t D = call.D, H = call.H, P = call.P;
  call.set_steps("output", output, ragged, hx, Engine::kLengthsOnHost);
  STD_TORCH_CHECK(call.cell.states > 1 || (!grad_cy && !need_grad_cx && !grad_states), call.op,
                  ": grad_cy, grad_states and need_grad_cx are for cells of more than one state, such as the lstm");
  STD_TORCH_CHECK(!weight_hr.empty() || !need_grad_weight_hr, call.op, ": need_grad_weight_hr needs weight_hr");
  STD_TORCH_CHECK(!call.cell.norms || !need_grad_bias, call.op, ": no need_grad_bias with the cell ", cell, ", which takes no biases");
  STD_TORCH_CHECK(input || !need_grad_weight_ih, call.op, ": need_grad_weight_ih needs the input");
  STD_TORCH_CHECK((reset_hx || !need_grad_reset_hx) && (reset_cx || !need_grad_reset_cx), call.op,
                  ": need_grad_reset_hx needs reset_hx, and need_grad_reset_cx reset_cx");

  GradWeightsParams w{};
  call.fill(w, weight_hh, weight_hr, hx, cx, {reset, zoneout, hidden_mask, reset_hx, reset_cx});
  if (need_grad_weight_ih) {
    const int64_t dims = call.packed ? 2 : 3;
    STD_TORCH_CHECK(input->dim() == dims, call.op, ": input must have ", dims, " dimensions like output, got ",
                    text(sizes_of(*input)));
    w.I = input->size(dims - 1);
    const Call::Rows rows = call.rows_of("input", *input, w.I);
    w.input = rows.data;
    w.input_step = rows.step;
    w.input_row = rows.row;
  }
  w.output = call.data("output", output, call.sequence_sizes({D * P}));
  w.states = call.data("states", states, call.sequence_sizes({D, call.stored(), H}));
  STD_TORCH_CHECK(!kInPlace || (call.cell.saved == call.cell.grads() && !call.cell.norms && !call.cell.late), call.op,
                  ": cell must save what its gradients may take the place of, got ", cell);
  STD_TORCH_CHECK(!kInPlace || saved.is_contiguous(), call.op, ": saved must be contiguous, to be written to");
  if (call.cell.late) w.saved = call.data("saved", saved, call.sequence_sizes({D, call.cell.saved, H}));

  const Tensor& like = call.first;
  const Needs needs{need_grad_hx, need_grad_cx, need_grad_weight_ih, need_grad_weight_hh, need_grad_bias, need_grad_weight_hr};
  Engine engine(call, allow_tf32);
  Tensor grad_pre = kInPlace ? saved : allocate(like, call.sequence_sizes({D, call.cell.grads(), H}));
  Tensor grad_hx = allocate(like, need_grad_hx ? Sizes{D, call.B, P} : Sizes{0});
  Tensor grad_cx = allocate(like, need_grad_cx ? call.inner_sizes() : Sizes{0});
  Tensor grad_reset_hx = allocate(like, need_grad_reset_hx ? Sizes{D, call.B, P} : Sizes{0});
  Tensor grad_reset_cx = allocate(like, need_grad_reset_cx ? call.inner_sizes() : Sizes{0});
  MaybeTensor grad_proj;
  if (call.projected) grad_proj = allocate(like, call.sequence_sizes({D, P}));
  {  // what this holds is let go before there is more to hold
    const size_t held = call.held.size();
    BackwardParams p{};
    static_cast<LayerParams&>(p) = w;
    p.output = w.output;
    p.states = w.states;
    p.saved = call.data("saved", saved, call.sequence_sizes({D, call.cell.saved, H}));
    p.grad_output = call.data("grad_output", grad_output, call.sequence_sizes({D * P}));
    p.grad_hy = call.data("grad_hy", grad_hy, {D, call.B, P});
    p.grad_cy = call.data("grad_cy", grad_cy, call.inner_sizes());
    p.grad_states = call.data("grad_states", grad_states, call.sequence_sizes({D, call.stored(), H}));
    p.grad_pre = grad_pre.data_ptr();
    p.grad_hx = need_grad_hx ? grad_hx.data_ptr() : nullptr;
    p.grad_cx = need_grad_cx ? grad_cx.data_ptr() : nullptr;
    p.grad_reset_hx = need_grad_reset_hx ? grad_reset_hx.data_ptr() : nullptr;
    p.grad_reset_cx = need_grad_reset_cx ? grad_reset_cx.data_ptr() : nullptr;
    w.grad_proj = p.grad_proj = grad_proj ? grad_proj->data_ptr() : nullptr;
    call.clear_behind(grad_pre);
    if (grad_proj) call.clear_behind(*grad_proj);
    call.pass_through(grad_hx, p.grad_hy);
    call.pass_through(grad_cx, p.grad_cy);
    call.pass_through(grad_reset_hx, nullptr);
    call.pass_through(grad_reset_cx, nullptr);
    if (call.has_steps()) engine.backward(p, needs);
    call.held.erase(call.held.begin() + int64_t(held), call.held.end());
  }

  w.grad_pre = grad_pre.data_ptr();
  return {kInPlace ? allocate(like, {0}) : grad_pre, grad_hx, grad_cx, grad_reset_hx, grad_reset_cx,
          engine.grad_weights(w, needs, {input, grad_proj, saved, states, grad_pre})};
}

}  // namespace fusedrnn
