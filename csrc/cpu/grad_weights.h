// The gradients of the weights and biases of a layer. Each is a sum over all rows of the sequence: of the gradient of a gate
// times what that gate was fed with (the input, the hidden state that its step began with), or by itself (a bias).
//
// torch.nn adds up one product a step. One product over all rows, as a matrix library takes it, is a chain of hundreds of additions
// for each element and rounds more where rows are alike. Here rows are added up in parts, and the parts to a total.
#pragma once
#include "../params.h"
#include "weights.h"

namespace fusedrnn {
namespace FUSEDRNN_ISA {

template <class Cell, class F, class S>
struct GradWeightsPass {
  using V = Vec<F>;
  static constexpr int kLanes = V::kLanes, kPanelWidth = kPanelVectors * kLanes, kFirst = Cell::kGates - Cell::kLate;
  // Rows in a part: those of two steps, within these limits. The error on 800 rows that are alike, in steps of 32, in units of the
  // last place: all at once 29, in parts of 64 11, torch.nn 5 (17 is allowed).
  static constexpr int64_t kLeastPart = 32, kMostPart = 64;
  // A block of a gradient stays in the second-level cache until it is done, with what is packed for it: in float 288 + 72 + 64 KiB
  // (AVX2). Where vectors are wider, packing takes more of the time, and of large blocks there is less of it, though their sums come from
  // the cache behind: measured, of 512 units, 0.8 of the time with 2080 KiB of sums instead of 288, for one thread and for two.
  static constexpr bool kWide = FUSEDRNN_VECTOR_BYTES == 64;
  static constexpr int64_t kBlockTiles = (kWide ? 1040 : 288) / kTileRows, kBlockPanels = (kWide ? 512 : 256) / kPanelWidth;
  static constexpr int64_t kLeastTiles = 288 / kTileRows;  // that a block is not made smaller than for the sake of more threads
  static constexpr int64_t kSumColumns = 16 * kLanes;  // of the gradients of biases, to a piece of work

  // The gradient (rows, columns) of one weight, or of each head of one: what gradients of gates are multiplied with for it.
  struct Side {
    enum Kind { kInput, kRecurrent, kLate, kProjection } kind;  // kLate: weight_hh of the last gate, if that is late
    int64_t columns;
    S* grad;
    int64_t panels() const { return blocks_of(columns, kPanelWidth); }
  };
  // The sides for which the same gradients of gates are packed. A piece of work is a block, some tiles high and some panels wide; of two
  // sides, all their panels wide.
  struct Product {
    int64_t d, heads, units, rows;  // units: of a head
    Side sides[2];
    int count;
    int64_t tile_blocks, panel_blocks;

    // Whether a gradient is its own memory for sums: of the same format, and with a block's rows one behind the other. (Rows of a
    // block that lie far apart would share a few sets of the caches.)
    bool in_place(const Side& side) const {
      return heads == 1 && sizeof(F) == sizeof(S) && panel_blocks == 1 && side.columns % kPanelWidth == 0;
    }
    int64_t tiles() const { return blocks_of(rows, kTileRows); }
    int64_t panels() const { return sides[0].panels() + (count > 1 ? sides[1].panels() : 0); }
    int64_t blocks() const { return tile_blocks * panel_blocks; }  // of a head
    int64_t pieces() const { return heads * blocks(); }
    Range block_tiles(int64_t block) const { return share(tiles(), tile_blocks, block / panel_blocks); }
    Range block_panels(const Side& side, int64_t block) const { return share(side.panels(), panel_blocks, block % panel_blocks); }
  };

  const GradWeightsParams& p;
  const int64_t rows, part;      // of the sequence; of a part
  Product products[4 * kMaxDirections];
  int product_count = 0, threads = 1;
  int64_t pieces = 0;            // blocks of all products, then columns of the biases
  int64_t* next;                 // the first piece that no thread has taken
  char* scratch;                 // (threads, scratch_bytes)
  int64_t scratch_bytes;
  int64_t most_tiles = 0, most_panels = 0, most_sums = 0;  // of a block

  GradWeightsPass(const GradWeightsParams& p, Arena& arena)
      : p(p), rows(p.steps.row_count()), part(part_of(p.steps.B, rows)) {
    for (int64_t d = 0; d < p.D; ++d) {
      add(Side::kInput, d, 1, Cell::kGates * p.H, p.I, p.grad_weight_ih[d]);
      if (Cell::kMultiplies) add(Side::kRecurrent, d, p.N, kFirst * p.units(), p.depth(), p.grad_weight_hh[d]);
      if (Cell::kLate && p.grad_weight_hh[d])
        add(Side::kLate, d, p.N, p.units(), p.depth(), static_cast<S*>(p.grad_weight_hh[d]) + kFirst * p.H * p.depth());
      add(Side::kProjection, d, 1, p.P, p.H, p.grad_weight_hr[d]);
    }
    constexpr int64_t kThreadProducts = 100000;  // a thread that sleeps takes about as long to wake
    int64_t row_products = 0;
    for (int i = 0; i < product_count; ++i) row_products += products[i].heads * products[i].rows * products[i].panels() * kPanelWidth;
    const int64_t useful = 1 + rows * row_products / kThreadProducts;
    threads = int(useful < p.threads ? useful : p.threads);
    for (int i = 0; i < product_count; ++i) divide(products[i]);
    pieces += p.D * sum_blocks();

    next = arena.take<int64_t>(1);
    Arena one{nullptr};
    Block(*this, one);
    scratch_bytes = one.used;
    scratch = arena.take<char>(threads * scratch_bytes);
  }

  static int64_t part_of(int64_t batch, int64_t rows) {
    const int64_t part = 2 * batch < kLeastPart ? kLeastPart : 2 * batch > kMostPart ? kMostPart : 2 * batch;
    return part < rows ? part : rows;
  }
  void add(typename Side::Kind kind, int64_t d, int64_t heads, int64_t height, int64_t width, void* grad) {
    if (!grad) return;
    const Side side{kind, width, static_cast<S*>(grad)};
    if (product_count > 0 && kind == Side::kRecurrent && heads == 1 && same_gates()) {
      Product& last = products[product_count - 1];
      if (last.d == d && last.panels() + side.panels() <= kBlockPanels) {
        last.sides[last.count++] = side;
        return;
      }
    }
    products[product_count++] = {d, heads, p.H / heads, height, {side, {}}, 1, 0, 0};
  }
  // Whether the input's halves of all gates have the gradients of the recurrent ones.
  static constexpr bool same_gates() {
    bool same = !Cell::kLate;
    for (int g = 0; g < Cell::kGates; ++g) same = same && Cell::x_pre(g) == Cell::h_pre(g);
    return same;
  }
  // Blocks that fit the cache, and enough of them for all threads.
  void divide(Product& product) {
    product.tile_blocks = blocks_of(product.tiles(), kBlockTiles);
    product.panel_blocks = blocks_of(product.panels(), kBlockPanels);
    // Threads that take pieces in turn wait the less for the last one the more there are.
    const int64_t wanted = blocks_of(4 * threads, product.panel_blocks), finest = blocks_of(product.tiles(), kLeastTiles);
    if (threads > 2 && product.tile_blocks < wanted) product.tile_blocks = wanted < finest ? wanted : finest;
    if (product.pieces() < threads) product.tile_blocks = product.tiles() < threads ? product.tiles() : threads;
    pieces += product.pieces();
    const int64_t tiles = blocks_of(product.tiles(), product.tile_blocks);
    const int64_t panels = blocks_of(product.panels(), product.panel_blocks);
    most_tiles = most_tiles > tiles ? most_tiles : tiles;
    most_panels = most_panels > panels ? most_panels : panels;
    int64_t sums = 0;
    for (int i = 0; i < product.count; ++i)
      sums += (product.in_place(product.sides[i]) ? 1 : tiles) * blocks_of(product.sides[i].panels(), product.panel_blocks);
    most_sums = most_sums > sums ? most_sums : sums;
  }
  int64_t sum_blocks() const {
    return p.grad_bias_ih[0] || p.grad_unit[0] ? blocks_of(kGrads<Cell> * p.H, kSumColumns) : 0;
  }

  // Whoever is free takes the next piece: who computes a piece changes nothing in it.
  void run() const {
    *next = 0;
    run_team(threads, [this](int thread, int) {
      Arena arena{scratch + thread * scratch_bytes};
      Block block(*this, arena);
      for (int64_t piece; (piece = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < pieces;) {
        int i = 0;
        for (; i < product_count && piece >= products[i].pieces(); ++i) piece -= products[i].pieces();
        if (i < product_count)
          block.compute(products[i], piece);
        else
          sum(piece / sum_blocks(), piece % sum_blocks());
      }
    });
  }

  // One block of one product, over all rows of the sequence, in a thread's memory.
  struct Block {
    const GradWeightsPass& pass;
    F* const gates;  // (tiles, part, kTileRows) packed gradients of gates
    F* const fed;    // (panels, part, kPanelWidth) packed rows that these were fed with, of both sides
    F* const sums;   // (tiles * kTileRows, panels * kPanelWidth); in place: of the last tile alone, whose rows may not all be real
    F* const row;    // (tiles * kTileRows)
    const GradWeightsParams& p = pass.p;
    const int64_t part = pass.part;
    Product product{};
    int64_t first = 0;                // unit 0 of its head, in tensors
    Range tiles{}, height{};          // the block's, and as rows of the weight
    struct Half {
      Side side;
      Range panels, width;            // the block's, and as columns of the weight
      int64_t sums_row, whole_tiles;  // numbers from row to row; tiles that are added up in place
      F *grad, *sums, *fed;
      F* sums_of(int64_t tile) const {
        return tile < whole_tiles ? grad + tile * kTileRows * sums_row : sums + (tile - whole_tiles) * kTileRows * sums_row;
      }
    } halves[2]{};

    Block(const GradWeightsPass& pass, Arena& arena)
        : pass(pass), gates(arena.take<F>(pass.most_tiles * pass.part * kTileRows)),
          fed(arena.take<F>(pass.most_panels * pass.part * kPanelWidth)),
          sums(arena.take<F>(pass.most_sums * kTileRows * kPanelWidth)), row(arena.take<F>(pass.most_tiles * kTileRows)) {}

    // Some rows of the sequence.
    struct Part {
      int64_t depth = 0;
      const S *gates[kMostPart], *fed[2][kMostPart], *masks[kMostPart];  // fed: null: zeros; masks: of the recurrent half, null: none
    };

    void compute(const Product& of, int64_t piece) {
      const int64_t block = piece % of.blocks();
      product = of;
      first = piece / of.blocks() * of.units;
      tiles = product.block_tiles(block);
      height = {tiles.begin * kTileRows, tiles.end * kTileRows < product.rows ? tiles.end * kTileRows : product.rows};
      const int64_t tile_count = tiles.end - tiles.begin;
      const bool cut = height.end < tiles.end * kTileRows;
      F *to_sums = sums, *to_fed = fed;
      int64_t visits = 0;
      for (int i = 0; i < product.count; ++i) {
        Half& half = halves[i];
        half.side = product.sides[i];
        half.panels = product.block_panels(half.side, block);
        const int64_t panels = half.panels.end - half.panels.begin, end = half.panels.end * kPanelWidth;
        half.width = {half.panels.begin * kPanelWidth, end < half.side.columns ? end : half.side.columns};
        const bool in_place = product.in_place(half.side);
        half.sums_row = panels * kPanelWidth;  // in place it is that of the gradient as well
        half.whole_tiles = in_place ? tile_count - cut : 0;
        half.grad = reinterpret_cast<F*>(half.side.grad) + (in_place ? height.begin * half.side.columns : 0);
        half.sums = to_sums, half.fed = to_fed;
        const int64_t others = (tile_count - half.whole_tiles) * kTileRows * half.sums_row;
        __builtin_memset(half.grad, 0, half.whole_tiles * kTileRows * half.sums_row * sizeof(F));
        __builtin_memset(half.sums, 0, others * sizeof(F));
        to_sums += others, to_fed += panels * part * kPanelWidth, visits += panels * tile_count;
      }
      int64_t t = 0, b = 0;
      for (Part now, coming = collect(t, b); coming.depth;) {
        now = coming;
        for (int64_t k = 0; k < now.depth; ++k) {
          pack_gates(now.gates[k], k);
          for (int i = 0; i < product.count; ++i) pack_fed(halves[i], now.fed[i][k], now.masks[k], k);
        }
        coming = collect(t, b);
        int64_t visit = 0, fetched = 0;
        for (int i = 0; i < product.count; ++i)
          for (int64_t panel = 0; panel < halves[i].panels.end - halves[i].panels.begin; ++panel)
            for (int64_t k = 0; k < tile_count; ++k) {
              for (++visit; fetched < coming.depth * visit / visits; ++fetched) fetch(coming, fetched);
              F* const to = halves[i].sums_of(k) + panel * kPanelWidth;
              tile<F, kTileRows, true>(gates + k * part * kTileRows, 0, halves[i].fed + panel * part * kPanelWidth, now.depth, to,
                                       halves[i].sums_row);
            }
      }
      for (int i = 0; i < product.count; ++i) store_sums(halves[i]);
    }

    // What was not added up in place.
    void store_sums(const Half& half) const {
      const int64_t summed = height.begin + half.whole_tiles * kTileRows;
      for (int64_t m = summed; m < height.end; ++m)
        for (int64_t u = half.width.begin; u < half.width.end; u += kLanes)
          store(half.side.grad + weight_row(m) * half.side.columns + u,
                load(half.sums + (m - summed) * half.sums_row + u - half.width.begin), lanes_left<F>(u, half.width.end));
    }

    // Where row m of the product is in the weight, which has all heads' rows of a gate before those of the next.
    int64_t weight_row(int64_t m) const { return m / product.units * p.H + first + m % product.units; }

    // The next part, from row b of step t on; moves (t, b) behind it. Empty at the end. Leaves out rows that were fed with zeros alone.
    Part collect(int64_t& t, int64_t& b) const {
      Part next;
      for (; t < p.steps.T; ++t, b = 0) {
        for (; b < p.steps.rows(t) && next.depth < part; ++b) {
          bool any = false;
          for (int i = 0; i < product.count; ++i)
            any = (next.fed[i][next.depth] = fed_row(halves[i].side.kind, t, b)) || any;
          if (!any) continue;
          next.masks[next.depth] = mask_row(b);
          next.gates[next.depth++] = gates_row(t, b);
        }
        if (next.depth == part) break;
      }
      return next;
    }
    const S* gates_row(int64_t t, int64_t b) const {
      const int64_t row = p.steps.row(t, b) * p.D + product.d;
      return product.sides[0].kind == Side::kProjection ? static_cast<const S*>(p.grad_proj) + row * p.P
                                                        : static_cast<const S*>(p.grad_pre) + row * kGrads<Cell> * p.H;
    }
    const S* fed_row(typename Side::Kind kind, int64_t t, int64_t b) const {
      const int64_t d = product.d, row = p.steps.row(t, b);
      if (kind == Side::kProjection)  // the last of the states stored: the unprojected one
        return static_cast<const S*>(p.states) + ((row * p.D + d + 1) * Cell::kStates - 1) * p.H;
      if (kind == Side::kInput)
        return static_cast<const S*>(p.input) + p.steps.position(t, b, p.input_step, p.input_row);
      const bool begins = p.steps.begins(t, b, d);
      if (begins && !p.reset_hx) return nullptr;
      if constexpr (Cell::kLate)
        if (kind == Side::kLate)
          return static_cast<const S*>(p.saved) + ((row * p.D + d) * Cell::kSaved + Cell::kMiddle) * p.H + first;
      const int64_t before = p.steps.row_before(t, b, d);
      if (before >= 0 && !begins) return static_cast<const S*>(p.output) + (before * p.D + d) * p.P + first;
      const auto* given = static_cast<const S*>(begins ? p.reset_hx : p.hx);
      return given ? given + p.steps.given_row(d, b) * p.P + first : nullptr;
    }

    const S* mask_row(int64_t b) const {
      if (!p.hidden_mask) return nullptr;
      return static_cast<const S*>(p.hidden_mask) + p.steps.given_row(product.d, b) * p.P + first;
    }

    // visit(row of the weight, place in a row of gradients, count) for the runs of the block's rows that follow each other there.
    template <class Visit>
    FUSEDRNN_INLINE void for_runs(const Visit& visit) const {
      for (int64_t m = height.begin, n; m < height.end; m += n) {
        n = height.end - m;
        int64_t at = m;
        const auto kind = product.sides[0].kind;
        if (kind != Side::kProjection) {
          const int gate = int(m / product.units) + (kind == Side::kLate ? kFirst : 0);
          at = (kind == Side::kInput ? Cell::x_pre(gate) : Cell::h_pre(gate)) * p.H + first + m % product.units;
          const int64_t left = product.units - m % product.units;
          n = left < n ? left : n;
        }
        visit(m, at, n);
      }
    }

    // Asks for a row before it is packed: rows lie too far apart for the processor to guess.
    void fetch(const Part& coming, int64_t k) const {
      for_runs([&](int64_t, int64_t at, int64_t n) { ask(coming.gates[k] + at, n); });
      for (int i = 0; i < product.count; ++i)
        if (const S* fed = coming.fed[i][k]) ask(fed + halves[i].width.begin, halves[i].width.end - halves[i].width.begin);
    }
    static void ask(const S* from, int64_t n) {
      prefetch(reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + n));
    }

    // As number k of the part.
    void pack_gates(const S* from, int64_t k) const {
      for_runs([&](int64_t m, int64_t at, int64_t n) {
        F* to = row + m - height.begin;
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + at + i));
        if (i < n) store(to + i, load(from + at + i, int(n - i)), int(n - i));
      });
      for (int64_t m = height.end; m < tiles.end * kTileRows; ++m) row[m - height.begin] = F(0);
      for (int64_t i = 0; i < tiles.end - tiles.begin; ++i)
        __builtin_memcpy(gates + (i * part + k) * kTileRows, row + i * kTileRows, kTileRows * sizeof(F));
    }
    void pack_fed(const Half& half, const S* from, const S* mask, int64_t k) const {
      F* panel = half.fed + k * kPanelWidth;
      const int64_t end = half.width.end;
      for (int64_t u = half.width.begin; u < end; u += kPanelWidth, panel += part * kPanelWidth)
        for (int v = 0; v < kPanelVectors; ++v) {
          const int n = !from ? 0 : u + kPanelWidth <= end ? kLanes : lanes_left<F>(u + v * kLanes, end);
          V fed = n ? load(from + u + v * kLanes, n) : V(F(0));
          if (mask && n && half.side.kind == Side::kRecurrent) fed = fed * load(mask + u + v * kLanes, n);
          store(panel + v * kLanes, fed);
        }
    }
  };

  // The gradients of biases, and of the units' own numbers, in kSumColumns columns of grad_pre.
  void sum(int64_t d, int64_t block) const {
    const int64_t begin = block * kSumColumns, width = kGrads<Cell> * p.H;
    const int64_t count = width - begin < kSumColumns ? width - begin : kSumColumns;
    const S* from = static_cast<const S*>(p.grad_pre) + d * width + begin;
    F total[kSumColumns] = {}, sum[kSumColumns];
    S rounded[kSumColumns];
    for (int64_t first = 0; first < rows; first += part) {
      __builtin_memset(sum, 0, sizeof sum);
      for (int64_t k = first; k < first + part && k < rows; ++k) add_to(sum, from + k * p.D * width, count);
      add_to(total, sum, count);
    }
    for (int64_t i = 0; i < kSumColumns; i += kLanes) store(rounded + i, load(total + i));
    for (int g = 0; g < Cell::kGates && p.grad_bias_ih[d]; ++g)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t pre = (begin + i) / p.H, u = (begin + i) % p.H;
        if (Cell::x_pre(g) == pre) static_cast<S*>(p.grad_bias_ih[d])[g * p.H + u] = rounded[i];
        if (Cell::h_pre(g) == pre) static_cast<S*>(p.grad_bias_hh[d])[g * p.H + u] = rounded[i];
      }
    for (int64_t i = 0; i < count && p.grad_unit[d]; ++i) {
      const int64_t at = begin + i - Cell::kPre * p.H;
      if (at >= 0) static_cast<S*>(p.grad_unit[d])[at] = rounded[i];
    }
  }
  template <class From>
  static void add_to(F* sums, const From* from, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(sums + i, load(sums + i) + load(from + i));
    if (i < count) store(sums + i, load(sums + i) + load(from + i, int(count - i)));
  }
};

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
