// Proves inference on packed weights in one instruction set (ENGINE) against a plain loop in double that reads the packed
// form as csrc/frozen.h describes it: every cell and format, odd sizes, stacks of layers, both directions, projections,
// states or none, inputs that are not dense, 1 to 5 threads of which fewer may be granted. Results and workspace are NaN
// beforehand; all memory lies between guard pages.
//
//   --cases N         how many cases for each cell and format
//   --delays          random pauses of the threads
//   --skip-barrier N  barrier N does not wait (a sanitizer must find out)
//   --spoil           the last number of the output is wrong (this program must find out)
#include "frozen.h"

#include <algorithm>
#include <string>
#include <vector>

#include "cells/cells.h"
#include "check.h"
#include "formats.h"
#include "guarded.h"
#include "threads.h"

namespace {

using namespace fusedrnn;
using test::Guarded;
using test::Random;
using Numbers = std::vector<double>;

#if defined(PAIRS_OF_BFLOAT16)
constexpr bool kRoundsInput = true;  // of layers whose weights are bfloat16
#else
constexpr bool kRoundsInput = false;
#endif
int teams_met = 0;  // cases of more than one thread

struct Problem {
  FrozenHeader header{};
  int cell = 0, gates = 0, pre = 0, states = 0;
  Dtype dtype = Dtype::kFloat32;
  int64_t T = 1, B = 1;
  int threads = 1, granted = 1;
  bool given = true, output = true;
};

FrozenLayout layout_of(const Problem& c) { return FrozenLayout(c.header, c.gates, c.pre); }

Problem random_problem(int cell, FrozenFormat format, uint64_t seed) {
  Random random{seed};
  Problem c;
  c.cell = cell;
  for_each_cell([&](int id, auto type) {
    using Cell = decltype(type);
    if (id == cell) c.gates = Cell::kGates, c.pre = Cell::kPre, c.states = Cell::kStates;
  });
  c.header.format = format;
  const bool rounds = kRoundsInput && format == FrozenFormat::kBFloat16;  // between layers one of the two might round up, the other down
  c.header.layers = rounds ? 1 : 1 + int(random.below(3));
  c.header.directions = 1 + int(random.below(2));
  c.header.I = 1 + random.below(random.below(8) ? 40 : 700);
  c.header.H = 1 + random.below(70);
  c.header.P = c.states > 1 && random.below(3) == 0 ? 1 + random.below(c.header.H) : 0;
  c.dtype = random.below(3) ? Dtype::kFloat32 : Dtype::kBFloat16;
  c.T = 1 + random.below(random.below(4) ? 4 : 40);
  c.B = 1 + random.below(random.below(4) ? 3 : 40);
  c.threads = 1 + int(random.below(5));
  c.granted = random.below(3) ? c.threads : 1 + int(random.below(c.threads));
  c.given = random.below(3);
  c.output = random.below(8);
  std::snprintf(test::context, sizeof test::context, "cell %d format %d seed %d: T%d B%d I%d H%d P%d L%d D%d threads %d/%d",
                cell, int(format), int(seed), int(c.T), int(c.B), int(c.header.I), int(c.header.H), int(c.header.P),
                c.header.layers, c.header.directions, c.granted, c.threads);
  return c;
}

// Numbers at random, where the form has padding too.
void fill(const FrozenLayout& layout, char* packed, Random& random) {
  auto floats = [&](char* at, int64_t bytes, double low, double high) {
    for (int64_t i = 0; i < bytes / 4; ++i) test::encode(Dtype::kFloat32, at, i, random.uniform(low, high));
  };
  auto weights = [&](char* at, int64_t bytes) {
    if (layout.format == FrozenFormat::kFloat32) return floats(at, bytes, -0.3, 0.3);
    for (int64_t i = 0; layout.format == FrozenFormat::kBFloat16 && i < bytes / 2; ++i)
      test::encode(Dtype::kBFloat16, at, i, random.uniform(-0.3, 0.3));
    for (int64_t i = 0; layout.format == FrozenFormat::kInt8 && i < bytes; ++i) at[i] = char(random.below(255) + 1);
  };
  for (int64_t layer = 0; layer < layout.layers; ++layer)
    for (int64_t d = 0; d < layout.D; ++d) {
      char* at = packed + layout.direction(layer, d);
      for (int64_t block = 0; block < layout.blocks(); ++block, at += layout.block_bytes(layer)) {
        floats(at, layout.ih_scales(), -1, 1);
        floats(at + layout.ih_scales(), layout.ih() - layout.ih_scales(), 0.001, 0.003);
        weights(at + layout.ih(), layout.block_bytes(layer) - layout.ih());
      }
      for (int64_t column = 0; column < layout.columns(); ++column, at += layout.column_bytes()) {
        floats(at, layout.scales(1), 0.001, 0.003);
        weights(at + layout.scales(1), layout.column_bytes() - layout.scales(1));
      }
    }
}

// ---- the reference

double weight(FrozenFormat format, const char* lines, const char* scales, int64_t gates, int64_t gate, int64_t unit,
              int64_t k) {
  const int64_t group = format == FrozenFormat::kInt8 ? 4 : format == FrozenFormat::kBFloat16 ? 2 : 1;
  const char* word = lines + (k / group * gates + gate) * 64 + unit * 4;
  if (format == FrozenFormat::kFloat32) return test::decode(Dtype::kFloat32, word, 0);
  if (format == FrozenFormat::kBFloat16) return test::decode(Dtype::kBFloat16, word, k % 2);
  constexpr int kByte[] = {0, 2, 1, 3};
  return (uint8_t(word[kByte[k % 4]]) - 128.0) * test::decode(Dtype::kFloat32, scales, gate * 16 + unit);
}

Numbers as_multiplied(FrozenFormat format, Numbers values, bool input = false) {
  double largest = 0;
  for (double x : values) largest = std::max(largest, std::fabs(x));
  for (double& x : values)
    if (format == FrozenFormat::kInt8 && largest > 0) x = std::nearbyint(x / largest * 32639) * largest / 32639;
  for (double& x : values)
    if (format == FrozenFormat::kBFloat16 && input && kRoundsInput) {
      char rounded[2];
      test::encode(Dtype::kBFloat16, rounded, 0, x);
      x = test::decode(Dtype::kBFloat16, rounded, 0);
    }
  return values;
}

struct Results {
  Numbers output, hy, cy;
};

Results reference(const Problem& c, const char* packed, const Numbers& input, const Numbers& hx, const Numbers& cx) {
  const FrozenLayout layout = layout_of(c);
  const int64_t H = layout.H, P = layout.P, D = layout.D, rows = layout.layers * D * c.B;
  Results found{{}, Numbers(size_t(rows * P)), Numbers(size_t(c.states > 1 ? rows * H : 0))};
  Numbers below = input;
  for (int64_t layer = 0; layer < layout.layers; ++layer) {
    const int64_t depth = layout.depth(layer);
    Numbers above(size_t(c.T * c.B * D * P));
    for (int64_t d = 0; d < D; ++d)
      for (int64_t b = 0; b < c.B; ++b) {
        const int64_t row = (layer * D + d) * c.B + b;
        Numbers h(static_cast<size_t>(P)), inner(static_cast<size_t>(H));
        for (int64_t u = 0; u < P && c.given; ++u) h[size_t(u)] = hx[size_t(row * P + u)];
        for (int64_t u = 0; u < H && c.given && c.states > 1; ++u) inner[size_t(u)] = cx[size_t(row * H + u)];
        for (int64_t s = 0; s < c.T; ++s) {
          const int64_t t = d ? c.T - 1 - s : s;
          const double* from = below.data() + (t * c.B + b) * depth;
          const Numbers x = as_multiplied(layout.format, Numbers(from, from + depth), true);
          const Numbers before = as_multiplied(layout.format, h);
          Numbers made(static_cast<size_t>(H));
          for (int64_t u = 0; u < H; ++u) {
            const char* block = packed + layout.direction(layer, d) + u / 16 * layout.block_bytes(layer);
            for_each_cell([&](int id, auto type) {
              using Cell = decltype(type);
              if constexpr (fusedrnn::is_of_torch<Cell>) {
                if (id != c.cell) return;
                double pre[Cell::kPre], state[Cell::kStates], after[Cell::kStates], saved[slots(Cell::kSaved)];
                for (int k = 0; k < Cell::kPre; ++k) pre[k] = test::decode(Dtype::kFloat32, block, k * 16 + u % 16);
                for (int g = 0; g < Cell::kGates; ++g) {
                  auto w = [&](int64_t lines, int64_t scales, int64_t k) {
                    return weight(layout.format, block + lines, block + scales, Cell::kGates, g, u % 16, k);
                  };
                  for (int64_t k = 0; k < depth; ++k)
                    pre[Cell::x_pre(g)] += x[size_t(k)] * w(layout.ih(), layout.ih_scales(), k);
                  for (int64_t k = 0; k < P; ++k)
                    pre[Cell::h_pre(g)] += before[size_t(k)] * w(layout.hh(layer), layout.hh_scales(), k);
                }
                state[0] = layout.projected ? 0 : h[size_t(u)];
                if constexpr (Cell::kStates > 1) state[1] = inner[size_t(u)];
                Cell::forward(pre, state, after, saved);
                made[size_t(u)] = after[0];
                if constexpr (Cell::kStates > 1) inner[size_t(u)] = after[1];
              }
            });
          }
          if (layout.projected) {
            made = as_multiplied(layout.format, made);
            for (int64_t u = 0; u < P; ++u) {
              const char* column = packed + layout.direction(layer, d) + layout.blocks() * layout.block_bytes(layer) +
                                   u / 16 * layout.column_bytes();
              h[size_t(u)] = 0;
              for (int64_t k = 0; k < H; ++k)
                h[size_t(u)] += made[size_t(k)] * weight(layout.format, column + layout.scales(1), column, 1, 0, u % 16, k);
            }
          } else {
            h = made;
          }
          for (int64_t u = 0; u < P; ++u) above[size_t(((t * c.B + b) * D + d) * P + u)] = h[size_t(u)];
        }
        for (int64_t u = 0; u < P; ++u) found.hy[size_t(row * P + u)] = h[size_t(u)];
        for (int64_t u = 0; u < H && c.states > 1; ++u) found.cy[size_t(row * H + u)] = inner[size_t(u)];
      }
    below = above;
  }
  found.output = below;
  return found;
}

// ---- the engine

// Largest error in units of the tolerance.
double run(const Problem& c, uint64_t seed, bool spoil) {
  Random random{seed + 1000};
  const FrozenLayout layout = layout_of(c);
  const int64_t size = test::bytes_of(c.dtype), rows = layout.layers * layout.D * c.B, width = layout.D * layout.P;
  const int64_t gap = random.below(3), step = random.below(2) ? c.B * (layout.I + gap) : layout.I + gap;
  const int64_t row = step == layout.I + gap ? c.T * (layout.I + gap) : layout.I + gap;  // batch first, or not
  auto drawn = [&](int64_t count) {
    Guarded memory(count * size);
    for (int64_t i = 0; i < count; ++i) test::encode(c.dtype, memory.data(), i, random.uniform(-1, 1));
    return memory;
  };
  auto values = [&](const Guarded& memory) {
    Numbers found;
    for (int64_t i = 0; i < memory.bytes() / size; ++i) found.push_back(test::decode(c.dtype, memory.data(), i));
    return found;
  };
  Guarded packed(layout.bytes());
  fill(layout, static_cast<char*>(packed.data()), random);
  const Guarded input = drawn(c.T * c.B * (layout.I + gap) - gap), hx = drawn(c.given ? rows * layout.P : 0);
  const Guarded cx = drawn(c.given && c.states > 1 ? rows * layout.H : 0);
  const Guarded output(c.output ? c.T * c.B * width * size : 0), hy(rows * layout.P * size);
  const Guarded cy(c.states > 1 ? rows * layout.H * size : 0);

  FrozenParams p{c.cell, layout, c.dtype, c.T, c.B, c.threads, static_cast<const char*>(packed.data()), input.data(), step,
                 row, hx.data(), cx.data(), output.data(), c.B * width, width, hy.data(), cy.data()};
  const Guarded workspace(ENGINE::kFrozenEngine.workspace(p));
  test::control.granted = c.granted;
  ENGINE::kFrozenEngine.forward(p, workspace.data());
  const int asked = test::most_asked();
  teams_met += std::min(asked, c.granted) > 1;
  CHECK(asked <= c.threads, "asked for %d threads", asked);
  if (spoil && c.output) test::encode(c.dtype, output.data(), output.bytes() / size - 1, 3);

  const Numbers all = values(input);
  Numbers dense;
  for (int64_t t = 0; t < c.T; ++t)
    for (int64_t b = 0; b < c.B; ++b)
      for (int64_t k = 0; k < layout.I; ++k) dense.push_back(all[size_t(t * step + b * row + k)]);
  const Results truth = reference(c, static_cast<const char*>(packed.data()), dense, values(hx), values(cx));
  const bool rounds = kRoundsInput && layout.format == FrozenFormat::kBFloat16;  // the state to 16 bits, besides
  const double tolerance = c.dtype == Dtype::kBFloat16 ? 0.02 : layout.format == FrozenFormat::kInt8 ? 5e-3 : rounds ? 1e-3 : 1e-4;
  double worst = 0;
  auto compare = [&](const char* name, const Guarded& found, const Numbers& wanted) {
    const Numbers got = values(found);
    CHECK(found.intact() && (got.size() == wanted.size() || got.empty()), "%s: size, or written beside", name);
    for (size_t i = 0; i < got.size(); ++i) {
      const double error = std::fabs(got[i] - wanted[i]) / (tolerance * std::max(1.0, std::fabs(wanted[i])));
      worst = std::max(worst, error);
      CHECK(error <= 1, "%s[%zu] is %g, expected %g", name, i, got[i], wanted[i]);
    }
  };
  compare("output", output, truth.output);
  compare("hy", hy, truth.hy);
  compare("cy", cy, truth.cy);
  CHECK(workspace.intact() && packed.intact() && input.intact(), "written beside an argument or the workspace");
  return worst;
}

}  // namespace

int main(int count, char** arguments) {
  uint64_t cases = 40;
  bool spoil = false;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i];
    if (name == "--delays") test::control.delays = true;
    else if (name == "--spoil") spoil = true;
    else if (name == "--cases" && i + 1 < count) cases = std::stoul(arguments[++i]);
    else if (name == "--skip-barrier" && i + 1 < count) test::control.skipped = std::stoi(arguments[++i]);
    else return 2;
  }
  test::print_context_at_crash();
  double worst = 0;
  for (int cell = 0; cell < 4; ++cell)
    for (FrozenFormat format : {FrozenFormat::kFloat32, FrozenFormat::kBFloat16, FrozenFormat::kInt8})
      for (uint64_t seed = 0; seed < cases; ++seed)
        worst = std::max(worst, run(random_problem(cell, format, seed), seed, spoil));
  std::printf("largest error %.3f of the tolerance; %d cases of several threads\n", worst, teams_met);
  return test::conclude("frozen_test");
}
