// The list of cells: the one place that names them all. A cell's place in it is its id inside the library.
#pragma once
#include "gru.h"
#include "gru_general.h"
#include "gru_norm.h"
#include "gru_reset_before.h"
#include "indrnn.h"
#include "lstm.h"
#include "lstm_general.h"
#include "lstm_norm.h"
#include "rnn.h"
#include "slstm.h"

namespace fusedrnn {

// Calls fn(id, Cell{}) for every cell.
template <class Fn>
inline void for_each_cell(Fn&& fn) {
  fn(0, RnnTanhCell{});
  fn(1, RnnReluCell{});
  fn(2, LstmCell{});
  fn(3, GruCell{});
  fn(4, GeneralLstmCell<false>{});
  fn(5, GeneralLstmCell<true>{});
  fn(6, GeneralGruCell{});
  fn(7, IndRnnCell{});
  fn(8, SlstmCell{});
  fn(9, NormLstmCell{});
  fn(10, NormGruCell{});
  fn(11, ResetBeforeGruCell{});
}

}  // namespace fusedrnn
