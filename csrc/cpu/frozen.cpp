// The operator for inference on packed weights: schema, every check of an argument, and the allocation of results.
#include "../frozen.h"

#include <algorithm>
#include <cstring>

#include "capability.h"
#include "workspace.h"

namespace fusedrnn {
namespace {

// packed: uint8, what fusedrnn/freeze.py makes of a module's weights; the arguments from cell to proj_size (0: none) say
// once more what stands in its header, for those who cannot read it. input (T, B, I), (B, T, I) if batch_first, (T, I); hx
// and cx (L*D, B, ...) or (L*D, ...), null for zeros. one_step: input (B, I) or (I), hx and cx (B, ...) or (...), and output
// is empty. cy is empty for cells with one state.
constexpr char kFrozenSchema[] =
    "frozen_forward(Tensor packed, Tensor input, Tensor? hx, Tensor? cx, str cell, int num_layers, bool bidirectional, "
    "int hidden_size, int proj_size, bool batch_first, bool one_step) -> (Tensor output, Tensor hy, Tensor cy)";
constexpr char kOp[] = "fusedrnn::frozen_forward";

const FrozenEngine& frozen_engine(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return avx2::kFrozenEngine;
  if (isa == Isa::kAvx512) return selects_dots() ? avx512dots::kFrozenEngine : avx512::kFrozenEngine;
#endif
  (void)isa;
  return baseline::kFrozenEngine;
}

// The header of packed weights, which must be whole and as the arguments say.
FrozenHeader checked_header(const Tensor& packed, const std::string& cell, int64_t layers, int64_t D, int64_t H, int64_t P) {
  const bool bytes = packed.is_cpu() && packed.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(bytes && packed.dim() == 1 && packed.is_contiguous(), kOp,
                  ": packed must be a dense one-dimensional uint8 tensor on the CPU, got ", text(sizes_of(packed)), " ",
                  Call::name_of(packed.scalar_type()));
  FrozenHeader header{};
  STD_TORCH_CHECK(packed.numel() >= kFrozenHeaderBytes, kOp, ": packed must begin with a header of ", kFrozenHeaderBytes,
                  " bytes, got ", packed.numel());
  std::memcpy(&header, packed.const_data_ptr(), sizeof header);
  STD_TORCH_CHECK(std::equal(header.magic, header.magic + sizeof header.magic, kFrozenMagic), kOp,
                  ": packed must come from fusedrnn.freeze, got other bytes");
  STD_TORCH_CHECK(header.version == kFrozenVersion, kOp, ": packed must be of format version ", kFrozenVersion, ", got ",
                  header.version, "; freeze the module again");
  const std::string name(header.cell, strnlen(header.cell, sizeof header.cell));
  constexpr int64_t kMost = 1 << 20, kMostLayers = 1 << 12;  // so that no product of sizes overflows
  const bool fits = header.I > 0 && header.I < kMost && H > 0 && H < kMost && P >= 0 && P <= H && layers > 0 &&
                    layers < kMostLayers;
  const bool known = header.format >= FrozenFormat::kFloat32 && header.format <= FrozenFormat::kInt8;
  const bool same = name == cell && header.layers == layers && header.directions == D && header.H == H && header.P == P;
  STD_TORCH_CHECK(fits && known && same, kOp, ": packed must hold ", layers, " layers of ", cell, ", ", D,
                  " directions, hidden_size ", H, ", proj_size ", P, ", got ", header.layers, " of ", name, ", ",
                  header.directions, ", ", header.H, ", ", header.P);
  return header;
}

std::tuple<Tensor, Tensor, Tensor> frozen_forward(
    Tensor packed, Tensor input, MaybeTensor hx, MaybeTensor cx, std::string cell_name, int64_t num_layers,
    bool bidirectional, int64_t hidden_size, int64_t proj_size, bool batch_first, bool one_step) {
  const CellTraits cell = find_cell(kOp, cell_name);
  bool takes = false;
  for_each_cell([&](int id, auto type) { takes = takes || (id == cell.id && is_of_torch<decltype(type)>); });
  STD_TORCH_CHECK(takes, kOp, ": there are no packed weights of the cell ", cell_name);
  const int64_t D = bidirectional ? 2 : 1;
  const FrozenHeader header = checked_header(packed, cell_name, num_layers, D, hidden_size, proj_size);
  STD_TORCH_CHECK(proj_size == 0 || cell.states > 1, kOp, ": only the lstm takes projections (proj_size)");
  STD_TORCH_CHECK(!one_step || (num_layers == 1 && D == 1 && proj_size == 0), kOp, ": one_step is for cells alone");
  const FrozenLayout layout(header, cell.gates, cell.pre);
  STD_TORCH_CHECK(packed.numel() == kFrozenHeaderBytes + layout.bytes(), kOp, ": packed must have ",
                  kFrozenHeaderBytes + layout.bytes(), " bytes, got ", packed.numel());

  STD_TORCH_CHECK(input.is_cpu(), kOp, ": input must be on the CPU, as packed weights are");
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, kOp,
                  ": input must be float32 or bfloat16, got ", Call::name_of(type));
  const int64_t dims = input.dim(), sequence = one_step ? 0 : 1;
  STD_TORCH_CHECK(dims == 1 + sequence || dims == 2 + sequence, kOp, ": input must have ", 1 + sequence, " or ",
                  2 + sequence, " dimensions, got ", text(sizes_of(input)));
  STD_TORCH_CHECK(input.size(dims - 1) == layout.I, kOp, ": input must have ", layout.I, " features, got ",
                  text(sizes_of(input)));
  const bool batched = dims == 2 + sequence;
  const int64_t step_dim = batched && batch_first ? 1 : 0, batch_dim = one_step || batch_first ? 0 : 1;
  const int64_t T = one_step ? 1 : input.size(step_dim), B = batched ? input.size(batch_dim) : 1;
  STD_TORCH_CHECK(T > 0, kOp, ": expected sequence length to be larger than 0, got 0");

  Tensors held;
  held.reserve(3);
  auto data = [&](const char* name, const MaybeTensor& tensor, const Sizes& sizes) -> const void* {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == type, kOp, ": ", name, " must be ", Call::name_of(type),
                    " on the CPU like input, got ", Call::name_of(tensor->scalar_type()), " on ", Call::device_of(*tensor));
    const auto found = tensor->sizes();
    STD_TORCH_CHECK(std::equal(found.begin(), found.end(), sizes.begin(), sizes.end()), kOp, ": ", name, " must be ",
                    text(sizes), ", got ", text(sizes_of(*tensor)));
    held.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
    return held.back().data_ptr();
  };
  auto state_sizes = [&](int64_t features) {
    Sizes sizes;
    if (!one_step) sizes.push_back(num_layers * D);
    if (batched) sizes.push_back(B);
    sizes.push_back(features);
    return sizes;
  };

  FrozenParams p{cell.id, layout, type == ScalarType::Float ? Dtype::kFloat32 : Dtype::kBFloat16, T, B};
  p.threads = int(torch::stable::get_num_threads());
  p.blocks = static_cast<const char*>(packed.const_data_ptr()) + kFrozenHeaderBytes;
  const Tensor dense = input.stride(dims - 1) == 1 || layout.I == 1 ? input : torch::stable::contiguous(input);
  p.input = dense.data_ptr();
  p.input_step = one_step ? 0 : dense.stride(step_dim);
  p.input_row = batched ? dense.stride(batch_dim) : 0;
  const Sizes h_sizes = state_sizes(layout.P), c_sizes = state_sizes(layout.H);
  p.hx = data("hx", hx, h_sizes);
  STD_TORCH_CHECK(cell.states > 1 ? bool(hx) == bool(cx) : !cx, kOp, ": cx is for the lstm alone, which takes it with hx");
  p.cx = data("cx", cx, c_sizes);

  Sizes output_sizes = sizes_of(input);
  output_sizes.back() = D * layout.P;
  const Tensor output = allocate(input, one_step ? Sizes{0} : output_sizes), hy = allocate(input, h_sizes);
  const Tensor cy = allocate(input, cell.states > 1 ? c_sizes : Sizes{0});
  if (B > 0) {
    p.output = one_step ? nullptr : output.data_ptr();
    p.output_step = D * layout.P * (batch_first ? 1 : B);
    p.output_row = D * layout.P * (batch_first ? T : 1);
    p.hy = hy.data_ptr();
    p.cy = cy.data_ptr();
    const FrozenEngine& engine = frozen_engine(selected_isa());
    run_in_workspace(input, p, engine.workspace, engine.forward);
  }
  return {output, hy, cy};
}

}  // namespace
}  // namespace fusedrnn

STABLE_TORCH_LIBRARY_FRAGMENT(fusedrnn, m) { m.def(fusedrnn::kFrozenSchema); }

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { m.impl("frozen_forward", TORCH_BOX(&fusedrnn::frozen_forward)); }
