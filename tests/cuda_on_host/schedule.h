// Which of the threads that can run runs next.
#pragma once
#include <algorithm>
#include <deque>
#include <vector>

#include "options.h"
#include "state.h"

namespace cuda_on_host {

class ReadyList {
 public:
  void reset(int order, Random* random) {
    order_ = order;
    random_ = random;
    queue_.clear();
    pool_.clear();
    warps_.clear();
    favourite_ = nullptr;
    count_ = 0;
    lowest_ = 0;
    flavour_ = int(random->below(kFlavours));
  }

  // Before any thread of a block is added.
  void admit(Block& block) {
    const int64_t mine = draw();
    for (Warp& warp : block.warps) {
      warp.ready.clear();
      warp.priority = priority(*block.grid, flavour_ == kWarpsAhead ? draw() : mine);
    }
  }

  // A thread that has just become ready.
  void add(Thread& thread) {
    ++count_;
    if (order_ == kRandom) pool_.push_back(&thread);
    else if (order_ == kSkewed) add_to_warp(thread);
    else queue_.push_back(&thread);
  }

  // A thread that gives way: it is ready, but all others should run first. In random order that too is left to chance.
  void add_last(Thread& thread) {
    if (order_ == kSkewed) {
      thread.warp->priority = --lowest_;
      favourite_ = nullptr;
    }
    if (order_ != kReverse) return add(thread);
    ++count_;
    queue_.push_front(&thread);
  }

  bool empty() const { return count_ == 0; }

  Thread& take() {
    --count_;
    if (order_ == kRandom) return take_any(pool_);
    if (order_ == kSkewed) return take_from_favourite();
    Thread* next = order_ == kInOrder ? queue_.front() : queue_.back();
    order_ == kInOrder ? queue_.pop_front() : queue_.pop_back();
    return *next;
  }

 private:
  // Who is ahead in skewed order; drawn anew for every synchronize().
  enum Flavour { kWarpsAhead, kBlocksAhead, kDependentsAhead, kPredecessorsAhead, kFlavours };
  static constexpr int kDrawBits = 30;
  static constexpr uint64_t kFavourLasts = 512;  // picks, on average

  int64_t draw() { return int64_t(random_->below(uint64_t(1) << kDrawBits)); }

  int64_t priority(const Grid& grid, int64_t drawn) const {
    const int64_t number = flavour_ == kDependentsAhead     ? int64_t(grid.number)
                           : flavour_ == kPredecessorsAhead ? (int64_t(1) << 32) - int64_t(grid.number)
                                                            : 0;
    return (number << kDrawBits) + drawn;
  }

  Thread& take_any(std::vector<Thread*>& threads) {
    std::swap(threads[random_->below(threads.size())], threads.back());
    Thread& taken = *threads.back();
    threads.pop_back();
    return taken;
  }

  void add_to_warp(Thread& thread) {
    Warp& warp = *thread.warp;
    if (warp.ready.empty()) {
      warp.place = warps_.size();
      warps_.push_back(&warp);
      if (favourite_ && warp.priority > favourite_->priority) favourite_ = &warp;
    }
    warp.ready.push_back(&thread);
  }

  Thread& take_from_favourite() {
    if (!favourite_ || random_->once_in(kFavourLasts)) {
      if (favourite_) favourite_->priority = priority(*favourite_->block->grid, draw());
      favourite_ = *std::max_element(warps_.begin(), warps_.end(),
                                     [](const Warp* a, const Warp* b) { return a->priority < b->priority; });
    }
    Warp& warp = *favourite_;
    Thread& taken = take_any(warp.ready);
    if (warp.ready.empty()) {
      warps_[warp.place] = warps_.back();
      warps_[warp.place]->place = warp.place;
      warps_.pop_back();
      favourite_ = nullptr;
    }
    return taken;
  }

  int order_ = kInOrder, flavour_ = 0;
  Random* random_ = nullptr;
  size_t count_ = 0;
  std::deque<Thread*> queue_;   // in order and reverse
  std::vector<Thread*> pool_;   // random
  std::vector<Warp*> warps_;    // skewed: those with ready threads
  Warp* favourite_ = nullptr;   // the first of them in priority, if known
  int64_t lowest_ = 0;
};

}  // namespace cuda_on_host
