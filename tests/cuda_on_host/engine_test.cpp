// Proves the CUDA step kernels, run on the CPU: forward and backward of every cell and arithmetic against a plain reference
// in double, at sizes that fill the kernels' tiles and that do not, packed and padded, strided, projected, with any optional
// tensor missing, divided among many and few warps and blocks, in kind and unkind orders of threads and of grids. Results and
// workspace are NaN beforehand, and all memory lies between guard pages.
//
//   --every N           only one case in N, taken by lot
//   --lot N             which lot
//   --arithmetics A,B   only these (f32, tf32, f64, bf16, f16)
//   --order N           all in this order of threads (the place in test::kOrders), not each in one taken by lot
//   --chip N            all on this chip (the place in test::kChips)
//   --regime NAME       all in this one where it can be (step, block, cluster, grid)
//   --cell NAME         only this cell
//   --only N            only case N
//   --most-macs N       only cases of at most N multiply-adds a step
//   --least-layers N    only cases of so many layers, one upon the other in one launch
//   --plant N           mistake N is made, in builds that have mistakes to make (this program must find out)
//   --spoil NAME        the last number of this result is wrong (this program must find out)
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "kernel_problem.h"

namespace {

using test::KernelCase;
using test::KernelProblem;

struct Options {
  size_t every = 1, lot = 0;
  long only = -1, order = -1, chip = -1, regime = -1, most_macs = 1L << 60, least_layers = 1;
  std::string arithmetics = "f32,tf32,f64,bf16,f16", cell, spoiled;
};
const std::vector<std::string> kRegimes(fusedrnn::kRegimeNames, fusedrnn::kRegimeNames + fusedrnn::kChosenRegimes);
int planted = -1;

bool wanted(const Options& options, const KernelCase& c, size_t number) {
  if (options.only >= 0) return number == size_t(options.only);
  const long macs = long(c.B * c.H * (c.P ? c.P : c.H) * test::traits_of(c.cell).gates);
  return test::taken(number, options.every, options.lot) && macs <= options.most_macs && c.layers >= options.least_layers &&
         ("," + options.arithmetics + ",").find("," + std::string(c.arithmetic->name) + ",") != std::string::npos &&
         (options.cell.empty() || options.cell == test::traits_of(c.cell).name) && test::engine_of(c.cell);
}

// Which divisions of a product the cases met.
struct Coverage {
  int one_tile = 0, two_tiles = 0, four_tiles = 0;  // of the batch, to a warp
  int split = 0, groups = 0, both = 0, unit_tiles = 0, batch_tiles = 0, projections = 0;
  int blocks = 0, block_groups = 0, block_turns = 0, block_tiles = 0;  // one grid for all steps, its blocks alone
  struct Together {  // or together
    int all = 0, groups = 0, split = 0, turns = 0, units = 0, tiles = 0;
    void add(const fusedrnn::ProductPlan& plan) {
      ++all;
      groups += plan.groups > 1;
      split += plan.split > 1;
      turns += plan.slots < plan.split;
      units += plan.sharers > 1;
      tiles += plan.batch_tiles > 1;
    }
    void print(const char* name) const {
      std::printf("; %d of a %s, %d with groups, %d split, %d in turns, %d with several tiles of units, %d of the batch", all, name,
                  groups, split, turns, units, tiles);
    }
  } grids, clusters;
  Together stacks;  // of several layers
  int tiles_in_turn = 0;  // of units, of a block of a cluster
  int alone = 0, alone_blocks = 0;  // one grid for all steps, of a cell without a product; of several blocks
  int late = 0, rows = 0, long_rows = 0;  // steps of two kernels: of a late gate, of whole rows, of more units than threads
  void add_cell(const test::Traits& traits, int64_t units) {
    late += traits.late > 0;
    rows += traits.norms > 0;
    long_rows += traits.norms > 0 && units > fusedrnn::kRowThreads;
  }
  // `more` is of the second kernel of a step with projections.
  void add(const fusedrnn::ProductPlan& plan, const fusedrnn::ProductPlan* more = nullptr) {
    if (plan.regime == fusedrnn::Regime::kBlock) {
      ++blocks;
      block_groups += plan.groups > 1;
      block_turns += plan.unit_tiles * plan.groups > plan.warps;
      block_tiles += plan.batch_tiles > 1;
      return;
    }
    if (plan.regime == fusedrnn::Regime::kAlone) {
      ++alone;
      alone_blocks += plan.blocks() > 1;
      return;
    }
    if (plan.regime == fusedrnn::Regime::kGrid) return grids.add(plan);
    if (plan.regime == fusedrnn::Regime::kCluster) {
      tiles_in_turn += plan.unit_tiles_each > 1;
      return clusters.add(plan);
    }
    (plan.tiles == 1 ? one_tile : plan.tiles == 2 ? two_tiles : four_tiles) += 1;
    split += plan.split > 1;
    groups += plan.groups > 1;
    both += plan.split > 1 && plan.groups > 1;
    unit_tiles += plan.unit_tiles > 1;
    batch_tiles += plan.batch_tiles > 1;
    if (!more) return;
    add(*more);
    ++projections;
  }
  void print(const char* pass) const {
    std::printf("%s met: %d products of a tile, %d of two, %d of four, %d split, %d with groups, %d with both, %d with several "
                "tiles of units, %d of the batch, %d projections; %d of a block for all steps, %d with groups, %d in turns, %d with "
                "several tiles of the batch",
                pass, one_tile, two_tiles, four_tiles, split, groups, both, unit_tiles, batch_tiles, projections, blocks, block_groups,
                block_turns, block_tiles);
    grids.print("grid");
    clusters.print("cluster");
    if (stacks.all) stacks.print("stack");
    std::printf(", %d of units in turn; %d without a product, %d of several blocks; %d of a late gate; %d of normalised rows, %d of "
                "more units than threads\n", tiles_in_turn, alone, alone_blocks, late, rows, long_rows);
  }
};

// What all cases together met.
struct Report {
  double worst = 0;
  std::string worst_case;
  Coverage forward, backward;
  int overlapping = 0;
};

// run(): the largest error of a case.
template <class Run>
void judge(const std::string& name, Report& report, const Run& run) {
  try {
    const double error = run();
    if (error > report.worst) report.worst = error, report.worst_case = name;
  } catch (const std::runtime_error& error) {
    CHECK(false, "the emulator says: %s", error.what());
  }
}

void run_case(const KernelCase& c, size_t number, const Options& options, Report& report) {
  const std::string name = text(c, number);
  std::snprintf(test::context, sizeof test::context, "%s", name.c_str());
  test::schedule(c.order, c.seed);
  KernelProblem problem(c);
  if (c.layers > 1) {
    if (problem.stack_plan(false).regime != fusedrnn::Regime::kGrid || problem.stack_plan(true).regime != fusedrnn::Regime::kGrid) return;
    report.forward.stacks.add(problem.stack_plan(false));
    if (c.save) report.backward.stacks.add(problem.stack_plan(true));
    return judge(name, report, [&] { return problem.run_stack(*test::engine_of(c.cell), options.spoiled); });
  }
  const fusedrnn::StepPlan plan = problem.plan();
  report.forward.add(plan.cell, c.P ? &plan.projection : nullptr);
  report.forward.add_cell(problem.traits, c.H);
  if (c.save) report.backward.add(plan.dh, c.P ? &plan.dunprojected : nullptr);
  if (c.save) report.backward.add_cell(problem.traits, c.H);
  judge(name, report, [&] { return problem.run(*test::engine_of(c.cell), options.spoiled); });
  report.overlapping += test::most_grids_at_once() > 1;
}

void run_all(const Options& options) {
  std::vector<KernelCase> cases = test::kernel_cases();
  Report report;
  size_t run = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    if (!wanted(options, cases[i], i)) continue;
    if (options.order >= 0) cases[i].order = int(options.order);
    if (options.regime >= 0) cases[i].regime = fusedrnn::Regime(options.regime);
    if (options.chip >= 0) cases[i].chip = &test::kChips[options.chip];
    run_case(cases[i], i, options, report);
    ++run;
  }
  std::printf("%zu of %zu cases; largest error %.3f of the tolerance, in %s\n", run, cases.size(), report.worst,
              report.worst_case.c_str());
  report.forward.print("forward");
  report.backward.print("backward");
  std::printf("both met: %d calls whose grids overlapped\n", report.overlapping);
}

}  // namespace

extern "C" bool fusedrnn_test_plant(int mistake) { return mistake == planted; }

int main(int count, char** arguments) {
  Options options;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--every") options.every = std::stoul(value);
    else if (name == "--lot") options.lot = std::stoul(value);
    else if (name == "--arithmetics") options.arithmetics = value;
    else if (name == "--order") options.order = std::stol(value);
    else if (name == "--chip") options.chip = std::stol(value);
    else if (name == "--regime") options.regime = std::find(kRegimes.begin(), kRegimes.end(), value) - kRegimes.begin();
    else if (name == "--cell") options.cell = value;
    else if (name == "--only") options.only = std::stol(value);
    else if (name == "--most-macs") options.most_macs = std::stol(value);
    else if (name == "--least-layers") options.least_layers = std::stol(value);
    else if (name == "--plant") planted = std::stoi(value);
    else if (name == "--spoil") options.spoiled = value;
    else return 2;
    if (options.regime == long(kRegimes.size())) return 2;
  }
  test::print_context_at_crash();
  run_all(options);
  return test::conclude("engine_test");
}
