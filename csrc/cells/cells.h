// The list of cells: the one place that names them all. A cell's place in it is its id inside the library.
#pragma once
#include "gru.h"
#include "lstm.h"
#include "rnn.h"

namespace fusedrnn {

// Calls fn(id, Cell{}) for every cell.
template <class Fn>
inline void for_each_cell(Fn&& fn) {
  fn(0, RnnTanhCell{});
  fn(1, RnnReluCell{});
  fn(2, LstmCell{});
  fn(3, GruCell{});
}

}  // namespace fusedrnn
