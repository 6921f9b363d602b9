// Proves one CPU engine (the one that engine_probe.cpp names): forward and backward of every cell and format against a plain
// reference in double, at odd shapes, packed, padded and padded with lengths, strided, projected, with any optional tensor missing, on 1 to 8
// threads of which fewer may be granted. Results and workspace are NaN beforehand, and all memory lies between guard pages.
//
//   --every N         only one case in N, taken by lot
//   --lot N           which lot
//   --dtypes A,B      only these formats (f32, f64, bf16, f16)
//   --only N          only case N
//   --most-macs N     only cases of at most N multiply-adds a step
//   --delays          random pauses of the threads
//   --skip-barrier N  barrier N of the engine does not wait (a sanitizer must find out)
//   --spoil NAME      the last number of this result is wrong (this program must find out)
#include <cstring>
#include <stdexcept>
#include <thread>

#include "engine_probe.h"
#include "engine_problem.h"
#include "threads.h"

namespace {

using test::Case;
using test::Problem;
using test::Shares;

struct Options {
  size_t every = 1, lot = 0;
  long only = -1, most_macs = 1L << 60;
  std::string dtypes = "f32,f64,bf16,f16", spoiled;
  test::TeamControl team;
};

bool wanted(const Options& options, const Case& c, size_t number) {
  if (options.only >= 0) return number == size_t(options.only);
  const long macs = long(c.B * c.H * (c.P ? c.P : c.H) * test::traits_of(c.cell).gates);
  return test::taken(number, options.every, options.lot) && macs <= options.most_macs &&
         ("," + options.dtypes + ",").find("," + std::string(test::name_of(c.dtype)) + ",") != std::string::npos;
}

// Which kinds of division the cases met: several slices, several members, both, fewer teams than strands.
struct Coverage {
  int slices = 0, members = 0, both = 0, one_for_two = 0, idle = 0;
  void add(const Shares& shares) {
    slices += shares.slices > 1;
    members += shares.members > 1;
    both += shares.slices > 1 && shares.members > 1;
    one_for_two += shares.granted < shares.strands;
    idle += shares.granted > shares.strands * shares.slices * shares.members;
  }
};

// Returns the largest error in units of the tolerance.
double run_case(const Case& c, size_t number, const Options& options, Coverage* forward = nullptr, Coverage* backward = nullptr) {
  std::snprintf(test::context, sizeof test::context, "%s", text(c, number).c_str());
  test::control = options.team;
  test::control.granted = c.granted;
  Problem problem(c);
  if (forward) forward->add(test::forward_shares(problem.forward_params(Problem::engines), c.granted));
  if (backward && c.save) backward->add(test::backward_shares(problem.backward_params(Problem::engines), c.granted));
  return problem.run(test::engine_under_test(), options.spoiled);
}

void run_all(const Options& options) {
  std::vector<Case> cases = test::all_cases();
  for (Case& c : cases)
    if (c.packed && c.seed % 3 == 0) c.packed = false, c.uneven = true;
  std::vector<size_t> chosen;
  for (size_t i = 0; i < cases.size(); ++i)
    if (wanted(options, cases[i], i)) chosen.push_back(i);
  double worst = 0;
  size_t worst_case = 0;
  Coverage forward, backward;
  for (size_t i : chosen) {
    const double error = run_case(cases[i], i, options, &forward, &backward);
    if (error > worst) worst = error, worst_case = i;
    const int asked = test::most_asked();
    CHECK(asked <= cases[i].threads, "asked for %d threads where at most %d are allowed", asked, cases[i].threads);
  }
  std::printf("%zu of %zu cases; largest error %.3f of the tolerance, in %s\n", chosen.size(), cases.size(), worst,
              text(cases[worst_case], worst_case).c_str());
  for (auto [name, met] : {std::pair<const char*, Coverage>{"forward", forward}, {"backward", backward}}) {
    std::printf("%s: %d with slices of the batch, %d with several members a team, %d with both, %d with one thread for two "
                "directions, %d with idle threads\n", name, met.slices, met.members, met.both, met.one_for_two, met.idle);
    std::snprintf(test::context, sizeof test::context, "coverage of %s", name);
    CHECK(options.only >= 0 || (met.slices && met.members && met.both && met.one_for_two && met.idle),
          "the cases leave out a way of dividing the work");
  }

  // Two callers at once.
  auto caller = [&](size_t first) {
    for (size_t i = first; i < chosen.size(); i += 2 + chosen.size() / 16) run_case(cases[chosen[i]], chosen[i], options);
  };
  std::thread other(caller, 0);
  caller(chosen.size() > 1);
  other.join();
}

// FUSEDRNN_CPU_ISA chooses among what this machine has and refuses all else.
void check_capability() {
  std::snprintf(test::context, sizeof test::context, "capability");
  const std::vector<fusedrnn::Isa> available = fusedrnn::available_isas();
  CHECK(!available.empty() && available.front() == fusedrnn::Isa::kBaseline, "the baseline is not available");
  unsetenv("FUSEDRNN_CPU_ISA");
  CHECK(fusedrnn::selected_isa() == available.back(), "without a word it is not the best that is selected");
  for (fusedrnn::Isa isa : {fusedrnn::Isa::kBaseline, fusedrnn::Isa::kAvx2, fusedrnn::Isa::kAvx512}) {
    const bool has = std::find(available.begin(), available.end(), isa) != available.end();
    setenv("FUSEDRNN_CPU_ISA", fusedrnn::isa_name(isa), 1);
    try {
      CHECK(fusedrnn::selected_isa() == isa && has, "%s is selected", isa_name(isa));
    } catch (const std::runtime_error& error) {
      CHECK(!has && std::strstr(error.what(), isa_name(isa)), "%s is refused: %s", isa_name(isa), error.what());
    }
  }
  setenv("FUSEDRNN_CPU_ISA", "mmx", 1);
  try {
    fusedrnn::selected_isa();
    CHECK(false, "an unknown instruction set is accepted");
  } catch (const std::runtime_error& error) {
    CHECK(std::strstr(error.what(), "baseline") && std::strstr(error.what(), "mmx"), "unhelpful: %s", error.what());
  }
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  for (int i = 1; i < count; ++i) {
    const std::string name = arguments[i], value = i + 1 < count ? arguments[i + 1] : "";
    if (name == "--delays") {
      options.team.delays = true;
      continue;
    }
    if (name == "--every") options.every = std::stoul(value);
    else if (name == "--lot") options.lot = std::stoul(value);
    else if (name == "--spoil") options.spoiled = value;
    else if (name == "--dtypes") options.dtypes = value;
    else if (name == "--only") options.only = std::stol(value);
    else if (name == "--most-macs") options.most_macs = std::stol(value);
    else if (name == "--skip-barrier") options.team.skipped = std::stoi(value);
    else return 2;
    ++i;
  }
  test::print_context_at_crash();
  check_capability();
  run_all(options);
  std::printf("%ld waits at barriers that can be left out\n", test::barriers_met());
  return test::conclude("engine_test");
}
